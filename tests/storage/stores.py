"""Stores of objects on this machine: folders, for what is cheap, and servers."""

import contextlib
import http.server
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorstore as ts

from caat_jax.storage import lease as lease_lib
from caat_jax.storage import mirrors
from caat_jax.storage.bucket import Bucket

FOLDERS = "FOLDERS_INSTEAD_OF_BUCKETS"


def open_folder(bucket: Bucket, spec: dict) -> ts.KvStore:
    """In place of `Bucket._opened`: TensorStore's driver for files has conditions too."""
    if spec["driver"] == "ocdbt":
        spec = spec | {"base": _folder_spec(spec["base"])}
    else:
        spec = _folder_spec(spec)
    return ts.KvStore.open(spec, context=bucket._context).result()


def _folder_spec(spec: dict) -> dict:
    return {"driver": "file", "path": f"{os.environ[FOLDERS]}/{spec['bucket']}/{spec['path']}"}


@pytest.fixture
def folder_store(tmp_path, monkeypatch) -> Path:
    """The folder that s3://bucket is, in this process."""
    monkeypatch.setenv(FOLDERS, str(tmp_path / "store"))
    monkeypatch.setattr(Bucket, "_opened", open_folder)
    monkeypatch.setattr(mirrors, "_mirrors", {})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "store" / "bucket"


class Clock:
    """In place of `time` where a run waits for another's sign of life: no time passes."""

    def __init__(self):
        self.now = 0.0
        self.meanwhile = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """That of the leases in this process, which are renewed by `clock.meanwhile` alone."""
    patched = Clock()
    monkeypatch.setattr(lease_lib, "time", patched)
    monkeypatch.setattr(lease_lib, "SECONDS", 1e6)
    return patched


@contextlib.contextmanager
def s3_server(*, checks_credentials: bool = False) -> Iterator[dict[str, str]]:
    """A server with s3://bucket; the environment variables that lead to it.

    Skips the test where moto is not installed.
    """
    if not importlib.util.find_spec("moto"):
        pytest.skip("moto, of requirements-dev.txt, is not installed")
    # Requests from then on need credentials that the server has given out: none are.
    counted = {"INITIAL_NO_AUTH_ACTION_COUNT": "0"} if checks_credentials else {}
    command = [sys.executable, "-m", "moto.server", "--host=127.0.0.1", "--port=0"]
    with subprocess.Popen(
        command, env=os.environ | counted, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as server:
        try:
            said = iter(server.stderr)
            found = (re.search(rb"Running on (http://[\d.:]+)", line) for line in said)
            endpoint = next(match for match in found if match)[1].decode()
            threading.Thread(target=lambda: list(said), daemon=True).start()
            if not checks_credentials:
                urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"))
            yield {
                "AWS_ACCESS_KEY_ID": "somebody",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_ENDPOINT_URL": endpoint,
            }
        finally:
            server.terminate()


class _Google(http.server.BaseHTTPRequestHandler):
    """Google's JSON protocol as its documentation has it: generations, conditions, pages of two."""

    objects: dict[str, tuple[bytes, int]]  # of each name: content and generation
    using = threading.Lock()
    written = itertools.count(1)

    def do_GET(self) -> None:
        if not self.path.startswith("/storage/v1/b/bucket/o"):
            return self._say(404)
        name, asked = self._asked()
        with self.using:
            if name in self.objects:
                return self._say_content(*self.objects[name])
            if name:
                return self._say(404)
            start, end = asked.get("startOffset", ""), asked.get("endOffset", "\U0010ffff")
            names = sorted(n for n in self.objects if max(start, asked.get("pageToken", "")) <= n)
        names = [name for name in names if name < end]
        page = {"items": [{"name": name} for name in names[:2]]}
        page |= {"nextPageToken": names[2]} if names[2:] else {}
        self._say(200, json.dumps(page).encode())

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        _, asked = self._asked()
        with self.using:
            if self._is_as_asked(asked["name"], asked):
                self.objects[asked["name"]] = content, next(self.written)
                generation = {"generation": str(self.objects[asked["name"]][1])}
                self._say(200, json.dumps({"name": asked["name"], **generation}).encode())

    def do_DELETE(self) -> None:
        name, asked = self._asked()
        with self.using:
            if self._is_as_asked(name, asked):
                self._say(204 if self.objects.pop(name, None) else 404)

    def _say_content(self, content: bytes, generation: int) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._say(200, content, generation)
        begin, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        place = f"bytes {begin}-{end - 1}/{len(content)}"
        self._say(206, content[begin:end], generation, place)

    def _asked(self) -> tuple[str, dict[str, str]]:
        """The object's name, if there is one, and the parameters."""
        parts = urllib.parse.urlsplit(self.path)
        name = parts.path.partition("/o/")[2]
        return urllib.parse.unquote(name), dict(
            urllib.parse.parse_qsl(parts.query, errors="strict")
        )

    def _is_as_asked(self, name: str, asked: dict[str, str]) -> bool:
        generation = self.objects.get(name, (b"", 0))[1]
        is_as_asked = int(asked.get("ifGenerationMatch", generation)) == generation
        if not is_as_asked:
            self._say(412)
        return is_as_asked

    def _say(
        self, status: int, body: bytes = b"", generation: int = 0, place: str | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-goog-generation", str(generation))
        if place:
            self.send_header("Content-Range", place)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Refusal(http.server.BaseHTTPRequestHandler):
    """What both stores say to somebody without credentials."""

    def do_GET(self) -> None:
        is_amazon = "list-type" in self.path
        body = b"<Error><Code>AccessDenied</Code></Error>" if is_amazon else b"{}"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def _served(handler: type[http.server.BaseHTTPRequestHandler], folder: Path) -> Iterator[None]:
    """Serves both protocols to this process, which finds nobody's credentials."""
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        address = f"127.0.0.1:{server.server_port}"
        for name in ("AWS_ENDPOINT_URL", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://{address}")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("GCE_METADATA_ROOT", address)
        patch.setenv("CLOUDSDK_CONFIG", str(folder))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "GOOGLE_APPLICATION_CREDENTIALS"):
            patch.delenv(name, raising=False)
        patch.setattr(mirrors, "_mirrors", {})
        patch.setattr("tempfile.tempdir", str(folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@pytest.fixture
def refusing_stores(tmp_path) -> Iterator[None]:
    """Servers of both kinds refuse everything, in this process."""
    with _served(_Refusal, tmp_path):
        yield


@pytest.fixture
def google_store(tmp_path) -> Iterator[None]:
    """A server with gs://bucket, empty, for this process."""
    with _served(type("Google", (_Google,), {"objects": {}}), tmp_path):
        yield
