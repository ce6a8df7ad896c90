"""Objects, names and URLs; the lease; mirrors of what is below a URL."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from caat_jax.errors import InputError
from caat_jax.storage import bucket as bucket_lib
from caat_jax.storage import lease as lease_lib
from caat_jax.storage import mirrors
from caat_jax.storage.bucket import Bucket
from caat_jax.storage.lease import Lease
from tests.command_line import assert_refused, run_as_users_do, run_here
from tests.storage.stores import clock, folder_store, google_store, refusing_stores, s3_server

__all__ = ["clock", "folder_store", "google_store", "refusing_stores"]  # fixtures


@pytest.fixture
def bucket(folder_store):
    return Bucket("--workdir", "s3://bucket/run")


@pytest.mark.parametrize("url", ["s3://", "gs:///run", "s3://bucket/../run", "s3://bucket/a//b"])
def test_what_is_no_url_of_a_bucket_is_refused(url):
    with pytest.raises(InputError, match="give gs://BUCKET/PATH or s3://BUCKET/PATH"):
        Bucket("--workdir", url)


def test_names_are_those_below_the_url_alone(bucket):
    Bucket("", f"{bucket.url}2").write("other", b"x")
    for name in ("b", "a/1", "a/2", "ab"):
        bucket.write(name, name.encode())
    assert bucket.names() == ["a/1", "a/2", "ab", "b"]
    assert bucket.names("a/") == ["a/1", "a/2"]
    assert bucket.names("a") == ["a/1", "a/2", "ab"]
    bucket.delete("a/")
    assert bucket.names() == ["ab", "b"] and bucket.read("a/1")[0] is None


def test_only_one_of_those_who_saw_the_same_object_replaces_it(bucket):
    _, nothing = bucket.read("lock")
    first = bucket.swap("lock", b"1", nothing)
    assert first and bucket.swap("lock", b"2", nothing) is None
    assert bucket.swap("lock", b"3", first) and bucket.swap("lock", None, first) is None
    assert bucket.read("lock")[0] == b"3"


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside", "a\\b", "a//b"])
def test_a_name_that_leads_out_of_a_folder_is_refused(bucket, monkeypatch, name):
    class Store:
        def list(self, _):
            return self

        def result(self):
            return [b"fine", name.encode()]

    monkeypatch.setattr(bucket, "_store", Store())
    with pytest.raises(InputError, match="which is no file's name"):
        bucket.names()


def test_what_is_not_read_back_as_it_was_written_is_noticed(bucket, monkeypatch):
    monkeypatch.setattr(Bucket, "read", lambda self, name: (b"other", b""))
    with pytest.raises(InputError, match=r"s3://bucket/run/a was written and is not what is read"):
        bucket.write("a", b"content")


def test_of_many_that_replace_it_at_once_one_does(bucket):
    _, nothing = bucket.read("lock")
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: bucket.swap("lock", b"%d" % n, nothing), range(8)))
    assert len([generation for generation in done if generation]) == 1


def test_one_run_at_a_time(bucket, clock):
    with Lease(bucket) as first:
        clock.meanwhile = first.renew
        with pytest.raises(InputError, match=r"//bucket/run: process \d+ on .* is training"):
            with Lease(bucket):
                raise AssertionError("two runs at a time")
        first.check()
    assert bucket.names() == []
    with Lease(bucket) as lease:
        lease.check()


def test_a_run_that_ends_while_another_waits_is_followed_at_once(bucket, clock):
    first = Lease(bucket)
    first.__enter__()
    clock.meanwhile = first.__exit__
    with Lease(bucket) as second:
        second.check()
    assert clock.now < lease_lib.SECONDS


def test_a_run_that_gives_no_sign_of_life_is_followed(bucket, clock):
    first = Lease(bucket)
    first.__enter__()
    with Lease(bucket) as second:
        assert clock.now >= lease_lib.SECONDS
        with pytest.raises(InputError, match="another run has taken over"):
            first.check()
        first.renew()
        first.__exit__()
        second.check()


def test_a_run_renews_its_lease_until_it_ends(bucket, monkeypatch):
    monkeypatch.setattr(lease_lib, "SECONDS", 0.01)
    with Lease(bucket):
        first = bucket.read("lock")[0]
        while bucket.read("lock")[0] == first:
            pass
    assert bucket.names() == []


def test_a_mirror_holds_what_is_there_and_brings_back_what_changes(bucket, folder_store):
    bucket.write("metrics.jsonl", b"{}\n")
    bucket.write("tokenizer/tokenizer.json", b"[]")
    left_there = ["checkpoints/5/state/d/1", "profile/a/1", "tensorboard/events"]
    for name in left_there:
        bucket.write(name, b"large")
    with mirrors.pushed():
        folder = mirrors.folder("--workdir", "s3://bucket/run/")
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert found == {"metrics.jsonl", "tokenizer/tokenizer.json"}
        assert folder.name == "run"
        assert mirrors.with_urls(f"{folder}/metrics.jsonl") == "s3://bucket/run/metrics.jsonl"
        bucket.delete("tokenizer/")  # not changed here: it is not brought back
        (folder / "metrics.jsonl").write_bytes(b"{}\n{}\n")
        (folder / ".evaluation.json.1.new").write_bytes(b"unfinished")
        (folder / "evaluation.json").write_bytes(b"{}")
        (folder / "link").symlink_to("/etc/passwd")
    assert bucket.names() == sorted(["evaluation.json", "metrics.jsonl", *left_there])
    assert bucket.read("metrics.jsonl")[0] == b"{}\n{}\n"
    assert not folder.exists()


def test_a_run_goes_on_from_what_another_wrote_while_it_waited(bucket):
    bucket.write("metrics.jsonl", b"1\n")
    first, second = (mirrors.folder("--workdir", bucket.url) for _ in range(2))
    with mirrors.of(first).held():
        (first / "metrics.jsonl").write_text("1\n2\n")
    with mirrors.of(second).held():
        with open(second / "metrics.jsonl", "a") as metrics:
            metrics.write("3\n")
    assert bucket.read("metrics.jsonl")[0] == b"1\n2\n3\n"


def test_mirrors_of_killed_programs_are_removed(folder_store, tmp_path):
    killed = tmp_path / "caat_jax_mirror_killed"
    (killed / "run").mkdir(parents=True)
    running = mirrors.folder("--workdir", "s3://bucket/run")
    other = mirrors.folder("--workdir", "s3://bucket/run")
    assert not killed.exists() and running.exists() and other.exists()


def test_the_protocol_of_google(google_store, clock):
    check_protocol("gs://bucket/run", clock)


def test_databases_are_merged(google_store):
    bucket = Bucket("--workdir", "gs://bucket/run")
    for part in ("one", "two"):
        database = bucket._database(f"state/{part}")
        for number in range(9):
            database.write(f"{part}/{number}", bytes([number]) * 3000).result()
    bucket.merge_databases("state", ["one", "two"])
    merged = Bucket("--workdir", "gs://bucket/run")._database("state")
    found = {name.decode(): merged.read(name).result().value for name in merged.list().result()}
    assert found == {f"{p}/{n}": bytes([n]) * 3000 for p in ("one", "two") for n in range(9)}


def check_protocol(url, clock):
    bucket = Bucket("--workdir", url)
    test_names_are_those_below_the_url_alone(bucket)
    test_only_one_of_those_who_saw_the_same_object_replaces_it(bucket)
    bucket.delete("")
    test_one_run_at_a_time(bucket, clock)
    test_a_run_that_gives_no_sign_of_life_is_followed(bucket, clock)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.mark.slow
def test_the_protocol_s3(s3, clock):
    check_protocol("s3://bucket/run", clock)


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_named(s3):
    with pytest.raises(InputError, match=r"--workdir=s3://other/run cannot be listed: NOT_FOUND"):
        mirrors.folder("--workdir", "s3://other/run")


@pytest.mark.slow
def test_credentials_that_do_not_fit_are_said(monkeypatch):
    with s3_server(checks_credentials=True) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=r"cannot be listed.*where credentials are looked for"):
            mirrors.folder("--workdir", "s3://bucket/run")


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run"])
def test_without_credentials_one_line_says_where_they_are_looked_for(
    refusing_stores, tmp_path, capfd, url
):
    result = run_here(["eval.py", f"--workdir={url}"], tmp_path)
    assert_refused(result, f"--workdir={url} cannot be listed", "docs/scale_out.md says where")
    assert capfd.readouterr().err == ""  # what TensorStore itself prints


def test_a_store_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(bucket_lib, "RETRIES", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    with pytest.raises(InputError, match=r"--workdir=s3://bucket/run cannot be listed"):
        mirrors.folder("--workdir", "s3://bucket/run")


@pytest.mark.slow
def test_folders_do_not_wait_for_the_library_of_stores():
    code = "import sys, caat_jax.storage.mirrors; assert 'tensorstore' not in sys.modules"
    assert run_as_users_do("-c", code)[0] == 0
