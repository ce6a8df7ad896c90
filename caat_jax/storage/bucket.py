"""The objects below a URL, gs://BUCKET/PATH or s3://BUCKET/PATH, through TensorStore's drivers.

Credentials are found as Google's and Amazon's own tools find them.  `AWS_ENDPOINT_URL` and
`TENSORSTORE_GCS_HTTP_URL` name other servers that speak the same protocols.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tensorstore as ts

from caat_jax.errors import InputError

# Of a request, with pauses of 1, 2, 4, ... seconds; a server that is away is waited for, so long.
RETRIES = 6

_URL = re.compile(r"(gs|s3)://([A-Za-z0-9][\w.-]*)(?:/+(.*?))?/*", re.ASCII)
_NAME = re.compile(r"(?!.*(^|/)\.{0,2}(/|$))[^\0\\]+", re.DOTALL)
_DENIED = re.compile("UNAUTHENTICATED|PERMISSION_DENIED|credential", re.IGNORECASE)


class Bucket:
    """The objects below a URL, by their names relative to it, such as "checkpoints/5/digests.json".

    Every method raises InputError where the store refuses or does not answer.  `generation`s, which
    change with every write, identify what an object holds; that of no object is one too.
    """

    def __init__(self, name: str, url: str):
        """Opens it; nothing is read yet.

        Args:
          name: what the URL is, such as "--workdir", for errors.
          url: as given.

        Raises:
          InputError: it is no such URL.
        """
        match = _URL.fullmatch(url)
        if not match or not _is_name(match[3] or "x"):
            raise InputError(f"{name}={url}: give gs://BUCKET/PATH or s3://BUCKET/PATH")
        scheme, bucket, path = match.groups()
        self.url = f"{scheme}://{bucket}/{path or ''}".rstrip("/")
        self._name = name
        self._path = f"{path}/" if path else ""
        # Merged databases refer to each other's objects only within one context.
        retries = {"max_retries": RETRIES}
        self._context = ts.Context({"gcs_request_retries": retries, "s3_request_retries": retries})
        self._driver = {"gs": {"driver": "gcs"}, "s3": _amazon()}[scheme] | {"bucket": bucket}
        with self._errors("opened"):
            self._store = self._opened(self._driver | {"path": self._path})

    def read(self, name: str) -> tuple[bytes | None, bytes]:
        """An object's content, None where there is none, and its generation."""
        with self._errors("read", name):
            result = self._store.read(name).result()
            found = result.state == "value"
            return (result.value if found else None), result.stamp.generation

    def write(self, name: str, content: bytes) -> None:
        """Makes or replaces an object, and compares it with what is read back.

        Raises:
          InputError: also where something else is read back.
        """
        with self._errors("written", name):
            self._store.write(name, content).result()
        if self.read(name)[0] != content:
            raise InputError(f"{self.url}/{name} was written and is not what is read back")

    def swap(self, name: str, content: bytes | None, generation: bytes) -> bytes | None:
        """Replaces an object of this generation, or deletes it (`content` is None).

        Returns:
          Its new generation; None, and nothing has changed: it was of another.
        """
        with self._errors("written", name):
            stamp = self._store.write(name, content, if_equal=generation).result()
            return stamp.generation or None

    def names(self, below: str = "") -> list[str]:
        """Of all objects, or of those whose names begin so; sorted.

        Raises:
          InputError: also where a name would be no file's name below a folder.
        """
        with self._errors("listed"):
            found = self._store.list(_range(below)).result()
            if (
                not found
            ):  # also where Google's store refuses to list; what it says of reading counts
                self._store.read(f"{below}digests.json").result()
        names = [name.decode(errors="replace") for name in found]
        names = [name for name in names if not name.endswith("/")]  # folders, as web consoles make
        for name in names:
            if not _is_name(name):
                raise InputError(f"{self.url} has an object {name!r}, which is no file's name")
        return sorted(names)

    def delete(self, below: str) -> None:
        """Deletes the objects whose names begin so."""
        with self._errors("deleted", below):
            self._store.delete_range(_range(below)).result()

    def merge_databases(self, folder: str, parts: Sequence[str]) -> None:
        """Makes an OCDBT database in `folder` of those in its `parts`, which keep the values."""
        with self._errors("written", folder):
            merged = self._database(folder)
            transaction = ts.Transaction(atomic=True)
            for part in parts:
                source = self._database(f"{folder}/{part}")
                source.experimental_copy_range_to(merged.with_transaction(transaction)).result()
            transaction.commit_async().result()

    def _database(self, folder: str) -> ts.KvStore:
        base = self._driver | {"path": f"{self._path}{folder}/"}
        return self._opened({"driver": "ocdbt", "base": base})

    def _opened(self, spec: dict[str, Any]) -> ts.KvStore:
        return ts.KvStore.open(spec, context=self._context).result()

    @contextlib.contextmanager
    def _errors(self, done: str, name: str = "") -> Iterator[None]:
        try:
            yield
        # TensorStore maps its codes to several types, most of them to ValueError.
        except (ValueError, RuntimeError, OSError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).partition(" [")[0].split())
            where = f" ({name})" if name else ""
            hint = "; docs/scale_out.md says where credentials are looked for"
            raise InputError(
                f"{self._name}={self.url} cannot be {done}{where}:"
                f" {reason}{hint * bool(_DENIED.search(reason))}"
            ) from error


def _amazon() -> dict[str, Any]:
    spec: dict[str, Any] = {"driver": "s3"}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else Amazon's library complains of files not needed
        spec["aws_credentials"] = {"type": "environment"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    return spec


def _range(below: str) -> ts.KvStore.KeyRange:
    if not below:
        return ts.KvStore.KeyRange()
    # To the next name of this length: TensorStore sends the end to Google's store, as UTF-8.
    return ts.KvStore.KeyRange(below, below[:-1] + chr(ord(below[-1]) + 1))


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name))
