"""Ctrl-C and SIGTERM end a command at once, in one line, whatever it is doing.

The interpreter would raise a `KeyboardInterrupt` between any two instructions, also in an import or
in a callback from compiled code, where it becomes a traceback or a crash; and not before compiled
code returns, such as XLA's compiler, which may take minutes.  Nothing needs to be unwound: what is
written can be read after a kill at any moment (`caat_jax.files`, `caat_jax.checkpoints`).
"""

import atexit
import os
import signal
import threading
from types import FrameType

from caat_jax.errors import Interrupted

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_ending = threading.Lock()


def end_at_once() -> None:
    """From now on both signals end the process, unless `processes.StopRequest` waits for them.

    Commands call it before their imports, which take seconds, in the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in _NAMES:
        signal.signal(number, _end)
    # The handler itself, in the main thread, waits for compiled code; this thread does not.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    atexit.register(_ignore)  # the first to be registered is the last to be called
    threading.Thread(target=_watch, args=[reader], name="interrupts", daemon=True).start()


def _watch(reader: int) -> None:
    while numbers := os.read(reader, 1):
        if signal.getsignal(numbers[0]) is _end:
            _end(numbers[0], None)


def _ignore() -> None:
    """What there was to do is done; the interpreter, as it ends, would let a signal kill it."""
    for number in _NAMES:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, _: FrameType | None) -> None:
    if _ending.acquire(blocking=False):
        # A progress bar leaves the cursor in its line.
        line = "\n" if os.isatty(2) else ""
        line += f"stopped by {_NAMES[signal.Signals(number)]}; the same command starts again\n"
        try:
            os.write(2, line.encode())
        finally:
            os._exit(Interrupted.exit_code)
