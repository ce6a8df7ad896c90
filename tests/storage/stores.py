"""Stores of objects on this machine: folders, for what is cheap, and a server that speaks S3."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorstore as ts

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
    return tmp_path / "store" / "bucket"


@contextlib.contextmanager
def s3_server(*, checks_credentials: bool = False) -> Iterator[dict[str, str]]:
    """A server with s3://bucket; the environment variables that lead to it.

    Skips the test where moto is not installed.
    """
    if not importlib.util.find_spec("moto"):
        pytest.skip("moto, of requirements-dev.txt, is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": endpoint,
    }
    # Requests from then on need credentials that the server has given out: none are.
    counted = {"INITIAL_NO_AUTH_ACTION_COUNT": "0"} if checks_credentials else {}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command, env=os.environ | counted, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(endpoint, server)
        if not checks_credentials:
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"))
        yield environment
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def _wait_for(endpoint: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{endpoint}/moto-api/").close()
            return
        except OSError:
            assert time.monotonic() < end and server.poll() is None, "the server does not start"
            time.sleep(0.1)
