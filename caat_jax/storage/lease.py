"""That one run at a time writes below a URL, where no lock ends with the process that held it.

The object "lock" is made where there is none, and replaced again and again by the run that made it,
each time only where it is as that run left it.  Where it stays the same for `SECONDS`, that run is
gone, and another may take it over; should the first wake up, it finds out before it writes.  No
clocks are compared, but the store must honour conditions (`If-Match`, `ifGenerationMatch`).
"""

import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING

from caat_jax.errors import InputError

if TYPE_CHECKING:
    from caat_jax.storage.bucket import Bucket

OBJECT = "lock"
SECONDS = 60.0
_RENEWALS = 4  # within that time


class Lease:
    """What a run holds while it writes; a context manager."""

    def __init__(self, bucket: "Bucket"):
        self._bucket = bucket
        self._generation = b""  # of the object as this run left it
        self._lost = False
        self._using = threading.Lock()
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew_regularly, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Takes it, and waits up to `SECONDS` for that where a run may have been killed.

        Raises:
          InputError: another run holds it.
        """
        content, generation = self._bucket.read(OBJECT)
        if content is not None:
            generation = self._when_free(_holder(content), generation)
        self._generation = generation
        if not self._swap():
            raise self._busy("another run")
        self._renewing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewing.join()
        with contextlib.suppress(InputError):
            self._bucket.swap(OBJECT, None, self._generation)

    def check(self) -> None:
        """To be called before anything is written that another run may write too.

        Raises:
          InputError: another run has taken over.
        """
        with self._using:
            self._lost = self._lost or self._bucket.read(OBJECT)[1] != self._generation
        if self._lost:
            raise InputError(
                f"another run has taken over --workdir={self._bucket.url}, since this one gave no"
                f" sign of life for {SECONDS:.0f} s; nothing more is written"
            )

    def renew(self) -> None:
        """Gives a sign of life, unless another run has taken over; raises as `Bucket.swap` does."""
        with self._using:
            self._lost = self._lost or not self._swap()

    def _when_free(self, holder: str, generation: bytes) -> bytes:
        """The generation to replace."""
        print(
            f"--workdir={self._bucket.url}: {holder} trained there and has not said that it ended;"
            f" waiting {SECONDS:.0f} s for a sign of life",
            file=sys.stderr,
        )
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            time.sleep(SECONDS / _RENEWALS / 4)
            content, now = self._bucket.read(OBJECT)
            if content is None:
                return now
            if now != generation:
                raise self._busy(_holder(content))
        return generation

    def _busy(self, holder: str) -> InputError:
        return InputError(
            f"--workdir={self._bucket.url}: {holder} is training there; wait for its end, or give"
            " another folder"
        )

    def _swap(self) -> bool:
        """Whether the object was as this run left it, and is as it leaves it now."""
        content = f"{_process()}, {uuid.uuid4().hex}\n".encode()
        new = self._bucket.swap(OBJECT, content, self._generation)
        if new is None:
            # An attempt whose answer was lost, and that was made again, finds its own content.
            found, new = self._bucket.read(OBJECT)
            if found != content:
                return False
        self._generation = new
        return True

    def _renew_regularly(self) -> None:
        while not self._ended.wait(SECONDS / _RENEWALS):
            # A store that does not answer now may do so before anybody takes over.
            with contextlib.suppress(InputError):
                self.renew()


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(content: bytes) -> str:
    return content.partition(b",")[0].decode(errors="replace")[:100]
