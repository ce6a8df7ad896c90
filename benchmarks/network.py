"""Hosts with limited links on one Linux machine: network namespaces on a switch.

A program that uses them first restarts itself in its own namespaces (`isolate`) for users, mounts,
processes and networks.  Everything created inside, links and processes, belongs to those
namespaces, and the kernel removes it with the program, however the program ends.  Needs iproute2
and util-linux, and root or a kernel that lets users create namespaces.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.workers import ROOT
from caat_jax.errors import InputError

_INSIDE = "CAAT_JAX_NETWORK_INSIDE"
# Dies with the process that starts it, as do all processes inside.
_UNSHARE = [
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--user", "--map-root-user"),
    *("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
]
# The size of a shaper's bucket, that is, what may pass at once: at least two of the kernel's
# largest segments, and what flows in 4 ms, the most that a timer of 250 Hz can be late.
_LEAST_BURST_BYTES, _BURST_SECONDS = 128 * 1024, 0.004


def unavailable() -> str | None:
    """Why this machine cannot have such hosts; None if it can."""
    programs = {
        "ip": "iproute2",
        "tc": "iproute2",
        "unshare": "util-linux",
        "setpriv": "util-linux",
    }
    for program, package in programs.items():
        if not shutil.which(program):
            return f"there is no {program}; on Debian and Ubuntu: apt-get install {package}"
    tried = subprocess.run(
        [
            *_UNSHARE,
            "sh",
            "-c",
            "ip link add try0 type bridge && ip link add try1 type veth peer try2",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return f"this user may not create network namespaces ({said}); run it as root"
    return None


def isolate(module: str) -> None:
    """Runs `python -m module` with the same arguments in new namespaces, and exits as it does.

    Returns only inside those namespaces.

    Raises:
      InputError: this machine or this user cannot create them.
    """
    if _INSIDE in os.environ:
        return
    if reason := unavailable():
        raise InputError(reason)
    command = [*_UNSHARE, sys.executable, "-m", module, *sys.argv[1:]]
    inside = subprocess.Popen(command, env={**os.environ, _INSIDE: "1"})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: inside.kill())
    code = inside.wait()
    sys.exit(code if code >= 0 else 128 - code)


class Hosts:
    """Hosts `host0`, `host1`, …, each with a link to a switch; created once, after `isolate`.

    The switch is a bridge of the kernel's; one in user space (`delayed_switch.py`) where what is
    sent shall arrive later by some seconds.
    """

    def __init__(self, number: int, latency: float = 0.0):
        self.names = [f"host{host}" for host in range(number)]
        addresses = {name: f"10.0.0.{host + 1}" for host, name in enumerate(self.names)}
        _run("mount -t tmpfs tmpfs /run")  # for the names of network namespaces
        with tempfile.NamedTemporaryFile("w", delete=False) as hosts:
            hosts.write("127.0.0.1 localhost\n")
            hosts.writelines(f"{address} {name}\n" for name, address in addresses.items())
        os.chmod(hosts.name, 0o644)
        _run(f"mount --bind {hosts.name} /etc/hosts")
        Path(hosts.name).unlink()
        if not latency:
            _run("ip link add switch type bridge")
            _run("ip link set switch up")
        for name, address in addresses.items():
            _run(f"ip netns add {name}")
            _run(f"ip link add {name} type veth peer name uplink netns {name}")
            _run(f"ip link set {name} {'' if latency else 'master switch'} up")
            _run(f"ip -n {name} addr add {address}/24 dev uplink")
            _run(f"ip -n {name} link set uplink up")
            _run(f"ip -n {name} link set lo up")
        if latency:
            command = [sys.executable, "-m", "benchmarks.delayed_switch", f"{latency}", *self.names]
            switch = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
            switch.stdout.readline()

    def set_rate(self, megabits: float | None) -> None:
        """Limits every host's link, in each direction, in Mbit/s; None: no limit."""
        for name in self.names:
            for device in (f"-n {name} qdisc {{}} dev uplink", f"qdisc {{}} dev {name}"):
                if megabits is None:
                    subprocess.run(
                        f"tc {device.format('del')} root".split(), capture_output=True, check=False
                    )
                else:
                    burst = max(_LEAST_BURST_BYTES, int(megabits * 1e6 / 8 * _BURST_SECONDS))
                    _run(
                        f"tc {device.format('replace')} root tbf rate {megabits}mbit"
                        f" burst {burst} latency 100ms"
                    )

    def command(self, host: int, command: list[str]) -> list[str]:
        """The command that runs a command on a host, with the host's name as the machine's."""
        name = self.names[host]
        script = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", script, name, *command]


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
