"""What is being done, and for how long, while nothing else would be seen on a terminal."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from caat_jax.devices import processes

_CLEAR_LINE = "\r\x1b[K"

# For bars of tqdm: what matters most comes first, and the bar has the columns that are left.
BAR_FORMAT = "{n_fmt}/{total_fmt}{postfix}, {remaining} left |{bar}|"


@contextlib.contextmanager
def shown(what: str, every: float = 1.0) -> Iterator[None]:
    """Writes to a terminal what is done inside, and its seconds, and takes it away at the end.

    Of several processes only the first writes.  Where stderr is no terminal, nothing is written.

    Args:
      what: such as "compiling the training step".
      every: seconds from one time to the next; the first comes after as many.
    """
    if not sys.stderr.isatty() or not processes.is_first():
        yield
        return
    over, start = threading.Event(), time.monotonic()

    def write() -> None:
        while not over.wait(every):
            seconds = time.monotonic() - start
            print(f"{_CLEAR_LINE}{what}, {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=write, name="activity", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
