import gzip
import hashlib
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import boto3
import fsspec
import gcs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from topklm.data import sources
from topklm.data.sources import FileReader, SourceFile, find
from topklm.errors import UserError

TEXTS = [f"text {i}" for i in range(2000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def table():
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": TEXTS}), buffer, row_group_size=100)
    return buffer.getvalue().to_pybytes()


FILES = {
    "a.jsonl": LINES,
    "b.jsonl.gz": gzip.compress(LINES),
    "deep/c.jsonl.zst": zstandard.compress(LINES),
    "deep/down/d.parquet": table(),
    "deep/e [1].jsonl": LINES,
    "notes.md": b"x",
}


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    """As on a machine on which nobody has logged in to any store."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "FSSPEC_", "STORAGE_EMULATOR")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield
    for protocol in ("s3", "gs"):  # fsspec keeps what it has opened, with the environment of that time
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


def texts_of(file):
    reader = FileReader(file, "text")
    texts = [item.text for item in reader]
    return texts, reader


def check_all_files(root):
    """What holds for every store with FILES in the folder `root`."""
    assert [file.url for file in find([f"{root}/*.jsonl*"])] == [f"{root}/a.jsonl", f"{root}/b.jsonl.gz"]
    assert [file.url for file in find([f"{root}/a.jsonl", f"{root}/a*"])] == [f"{root}/a.jsonl"]
    everything = find([root])
    assert [file.url for file in everything] == sorted(f"{root}/{n}" for n in FILES if n != "notes.md")
    assert find([f"{root}/"]) == everything
    assert find([f"{root}/deep/**", f"{root}/*.jsonl*"]) == everything
    assert [file.url for file in find([f"{root}/deep/e [1].jsonl"])] == [f"{root}/deep/e [1].jsonl"]
    for file in everything:
        content = FILES[file.url.removeprefix(f"{root}/")]
        assert file.size == len(content)
        assert file.version
        texts, reader = texts_of(file)
        assert texts == TEXTS
        assert reader.sha256 == hashlib.sha256(content).hexdigest()
        assert reader.bytes_read == len(content)
    for nothing in (f"{root}/nothing.txt", f"{root}/*.txt", f"{root}/nothing/"):
        with pytest.raises(UserError, match="matches no file"):
            find([nothing])
    with pytest.raises(UserError, match=r"notes\.md': files must end in \.txt, \.jsonl"):
        find([f"{root}/*"])


# Any store of fsspec.


def test_a_store_in_memory_is_listed_and_read():
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/books/{name}": content for name, content in FILES.items()})
    try:
        check_all_files("memory://books")
    finally:
        memory.rm("/books", recursive=True)


def test_a_remote_file_that_changes_or_vanishes_before_it_is_read_stops_the_reading():
    memory = fsspec.filesystem("memory")
    memory.pipe("/books/a.jsonl", LINES)
    (file,) = find(["memory://books/a.jsonl"])
    memory.pipe("/books/a.jsonl", LINES + LINES)
    with pytest.raises(UserError, match=r"memory://books/a\.jsonl has changed since the command began"):
        texts_of(file)
    memory.rm("/books", recursive=True)
    with pytest.raises(UserError, match=r"'memory://books/a\.jsonl' matches no file"):
        texts_of(file)


def test_a_damaged_remote_file_is_a_problem_and_its_hash_is_of_all_bytes():
    memory = fsspec.filesystem("memory")
    content = gzip.compress(LINES) + b"garbage"
    memory.pipe("/books/a.jsonl.gz", content)
    reader = FileReader(*find(["memory://books/a.jsonl.gz"]), "text")
    *documents, problem = reader
    memory.rm("/books", recursive=True)
    assert [document.text for document in documents] == TEXTS
    assert (problem.kind, problem.where) == ("damaged file", "line 2001")
    assert reader.sha256 == hashlib.sha256(content).hexdigest()


# S3.


@pytest.fixture(scope="module")
def s3_server():
    """The URL of an S3 server with the bucket `books`."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url).close()
                break
            except OSError:
                time.sleep(0.1)
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id="a",
            aws_secret_access_key="b",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="books")
        for name, content in FILES.items():
            client.put_object(Bucket="books", Key=f"shelf/{name}", Body=content, ACL="public-read")
        yield url
    finally:
        process.kill()
        process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def s3(s3_server, monkeypatch):
    """Credentials for the server, as a user would set them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")


def test_a_bucket_of_s3_is_listed_and_read(s3):
    check_all_files("s3://books/shelf")
    assert len(find(["s3://books"])) == len(find(["s3a://books/**/*.*[a-ce-z]"])) == len(FILES) - 1


def test_a_bucket_of_s3_can_be_set_up_by_the_configuration_of_fsspec(s3_server, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3_server, "anon": True})
    (file,) = find(["s3://books/shelf/a.jsonl"])
    assert texts_of(file)[0] == TEXTS


def test_a_bucket_of_s3_that_does_not_exist_is_named(s3):
    for name in ("a.txt", "*.txt", ""):
        with pytest.raises(
            UserError, match=r"SOURCE: 's3://nosuch/.*there is no s3://nosuch.*check the name"
        ):
            find([f"s3://nosuch/{name}"])


def test_s3_without_credentials_says_what_to_set(s3_server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    for name in ("shelf/a.jsonl", "shelf/*.jsonl"):
        with pytest.raises(UserError, match=r"no access to s3://books .*set AWS_ACCESS_KEY_ID and AWS"):
            find([f"s3://books/{name}"])
    file = SourceFile("s3://books/shelf/a.jsonl", ".jsonl", 1, "")
    with pytest.raises(UserError, match=r"reading: no access to s3://books .*set AWS_ACCESS_KEY_ID"):
        texts_of(file)


class AccessDenied(BaseHTTPRequestHandler):
    """Refuses everything, as S3 words it."""

    def do_GET(self):
        content = b"<Error><Code>AccessDenied</Code></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_):
        pass


def test_a_key_that_is_refused_says_what_to_set(s3, monkeypatch):
    with gcs.serving(AccessDenied) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        for name in ("a.jsonl", "*.jsonl"):
            with pytest.raises(UserError, match=r"no access to s3://books .*set AWS_ACCESS_KEY_ID"):
                find([f"s3://books/{name}"])


def test_a_store_that_does_not_answer_is_given_up_soon(s3, monkeypatch):
    monkeypatch.setattr(sources, "_ANSWER_SECONDS", 1.0)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        for store in ("s3://books", "gs://books"):
            for name in ("a.txt", "*.txt"):
                with pytest.raises(UserError, match=f"{store} gives no answer for .*check the network"):
                    find([f"{store}/{name}"])


# Google Cloud Storage.


def shelf():
    return gcs.Bucket("books", {f"shelf/{name}": content for name, content in FILES.items()})


def test_a_bucket_of_gcs_is_listed_and_read(monkeypatch):
    with shelf().served() as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        check_all_files("gs://books/shelf")
        with pytest.raises(UserError, match=r"there is no gs://nosuch"):
            find(["gs://nosuch/*.txt"])


@pytest.mark.parametrize("status", [401, 403])
def test_gcs_without_credentials_says_what_to_run(monkeypatch, status, capfd):
    monkeypatch.setattr(sources, "_ANSWER_SECONDS", 5.0)
    bucket = shelf()
    bucket.fail(status, lambda _: True)
    with bucket.served() as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        for name in ("a.txt", "*.txt"):
            with pytest.raises(UserError, match=r"no access to gs://books .*run `gcloud auth application-d"):
                find([f"gs://books/{name}"])
    assert "Traceback" not in capfd.readouterr().err


# The web.


class Web(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_files_of_a_web_server_are_listed_and_read(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(FILES[name])
    monkeypatch.chdir(tmp_path)
    with gcs.serving(Web) as url:
        files = find([f"{url}/*.jsonl*", f"{url}/a.jsonl"])
        assert [file.url for file in files] == [f"{url}/a.jsonl", f"{url}/b.jsonl.gz"]
        assert [texts_of(file)[0] for file in files] == [TEXTS, TEXTS]
        (file,) = find([f"{url}/a.jsonl?key=1"])
        assert file.ending == ".jsonl"
        assert texts_of(file)[0] == TEXTS
        with pytest.raises(UserError, match=r"c\.jsonl' matches no file"):
            find([f"{url}/c.jsonl"])
