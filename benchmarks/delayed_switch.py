"""A switch in user space that hands every frame on after a fixed time: for kernels without netem.

python -m benchmarks.delayed_switch SECONDS PORT...

PORTs are network devices of this network namespace, which belong to no bridge.  Frames go where
their destination was last heard from, or everywhere.  Segments that a sender left whole, and
checksums that it left open, pass as they are, in the header that the kernel keeps about them.  A
queue that is full drops a frame, as a switch's does.  Runs until it is killed; prints a line when
it listens.
"""

import collections
import contextlib
import select
import socket
import sys
import time

_EVERY_PROTOCOL = 0x0003  # ETH_P_ALL
_SOL_PACKET, _IGNORE_OUTGOING, _VNET_HEADER = 263, 23, 15
_VNET_BYTES, _ADDRESS_BYTES = 10, 6
_LARGEST = 2**17


def open_port(name: str) -> socket.socket:
    """A socket that receives and sends whole frames on a device."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY_PROTOCOL))
    port.setsockopt(_SOL_PACKET, _VNET_HEADER, 1)
    port.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**24)
    port.bind((name, 0))
    port.setblocking(False)
    return port


def run(seconds: float, ports: list[socket.socket]) -> None:
    """Switches for ever."""
    heard_on: dict[bytes, socket.socket] = {}
    waiting: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()
    while True:
        while waiting and waiting[0][0] <= time.monotonic():
            _, port, frame = waiting.popleft()
            with contextlib.suppress(OSError):
                port.send(frame)
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for port in select.select(ports, [], [], timeout)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = port.recv(_LARGEST)
                    due = time.monotonic() + seconds
                    target, source = (
                        frame[_VNET_BYTES + n : _VNET_BYTES + n + _ADDRESS_BYTES]
                        for n in (0, _ADDRESS_BYTES)
                    )
                    heard_on[source] = port
                    known = heard_on.get(target)
                    out = [known] if known else [other for other in ports if other is not port]
                    waiting.extend((due, each, frame) for each in out)


def main() -> None:
    seconds, *names = sys.argv[1:]
    ports = [open_port(name) for name in names]
    print("listening", flush=True)
    run(float(seconds), ports)


if __name__ == "__main__":
    main()
