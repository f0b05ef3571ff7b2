"""A Google Cloud Storage server on loopback, with one bucket in memory, and failures on demand.

It speaks as much of the JSON API (cloud.google.com/storage/docs/json_api) as gcsfs, google-cloud-storage and
TensorStore use: real requests over real sockets. It knows nothing of permissions.
"""

import base64
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import email.parser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import itertools
import json
import re
import socket
import threading
import time
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import google_crc32c

from topklm.storage import remote

DROP = "drop"  # instead of a status: hang up without an answer


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves with a handler on a free port; gives the URL."""
    server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 256})(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # a client may hang up
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def environment(url: str) -> dict[str, str]:
    """The variables that send gcsfs, google-cloud-storage and TensorStore to a server, as nobody special."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
        # gcsfs would ask by gRPC which kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def forget_connections() -> None:
    """fsspec and TensorStore keep what they have opened, with the environment of that time."""
    remote._context.cache_clear()
    fsspec.get_filesystem_class("gs").clear_instance_cache()


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asks for."""

    method: str
    path: str  # decoded
    query: dict[str, str]
    range: str = ""  # its header


@dataclasses.dataclass(frozen=True)
class Object:
    content: bytes
    generation: int


class Bucket:
    """The bucket's objects, and how the server shall fail."""

    def __init__(self, name: str = "bucket", objects: dict[str, bytes] | None = None):
        self.name = name
        self.objects: dict[str, Object] = {}
        self.requests: list[Request] = []  # answered ones
        self.delay = 0.0  # seconds before each answer
        self.lock = threading.Lock()
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self._failures: list[tuple[Callable[[Request], bool], int | str, Iterator[Any]]] = []
        self._generations = itertools.count(17)
        for key, content in (objects or {}).items():
            self.put(key, content)

    def put(self, key: str, content: bytes) -> Object:
        self.objects[key] = Object(bytes(content), next(self._generations))
        return self.objects[key]

    def fail(self, status: int | str, where: Callable[[Request], bool], times: int | None = None) -> None:
        """Answers the next `times` requests (None: all) that `where` holds for with a status, or `DROP`."""
        counter = itertools.count() if times is None else iter(range(times))
        self._failures.append((where, status, counter))

    def recover(self) -> None:
        """Fails no more."""
        self._failures.clear()

    def failure(self, request: Request) -> int | str | None:
        for where, status, counter in self._failures:
            if where(request) and next(counter, None) is not None:
                return status
        return None

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        """Serves the bucket; gives the URL."""
        with serving(type("Handler", (Handler,), {"bucket": self})) as url:
            yield url


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    bucket: Bucket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def _answer_request(self) -> None:
        body = self._body()
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        request = Request(self.command, unquote(url.path), query, self.headers.get("Range", ""))
        time.sleep(self.bucket.delay)
        with self.bucket.lock:
            status = self.bucket.failure(request)
            if status is None:
                status, content, headers = self._handle(url.path, query, body)
                self.bucket.requests.append(request)
            elif status != DROP:
                error = {"code": status, "message": "a failure on demand"}
                content, headers = json.dumps({"error": error}).encode(), {}
        if status == DROP:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _answer_request  # noqa: N815 - http.server's names

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _handle(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(.*))?)?", path)
        if path == "/storage/v1/b":
            return _json({"items": [{"name": self.bucket.name}]})
        if not found or unquote(found[2]) != self.bucket.name:
            return _error(404, "The specified bucket does not exist.")
        kind, _, key, rest = found.groups()
        is_bucket = "/o" not in path.removeprefix(f"{kind or ''}/storage/v1/b/{found[2]}")
        if kind == "/upload":
            return self._upload(query, body)
        if key is None:
            return _json({"name": self.bucket.name}) if is_bucket else self._list(query)
        return self._object(unquote(key), unquote(rest), query)

    def _object(self, key: str, rest: str, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        existing = self.bucket.objects.get(key)
        if (refused := _precondition(existing, query)) is not None:
            return refused
        if existing is None:
            return _error(404, f"No such object: {self.bucket.name}/{key}")
        if copied := re.fullmatch(rf"/rewriteTo/b/{self.bucket.name}/o/(.*)", rest):
            self.bucket.put(copied[1], existing.content)
            return _json({"done": True, "resource": self._facts(copied[1])})
        if moved := re.fullmatch(r"/moveTo/o/(.*)", rest):
            self.bucket.put(moved[1], self.bucket.objects.pop(key).content)
            return _json(self._facts(moved[1]))
        if self.command == "DELETE":
            del self.bucket.objects[key]
            return 204, b"", {}
        if query.get("alt") != "media":
            return _json(self._facts(key))
        return self._media(existing)

    def _media(self, found: Object) -> tuple[int, bytes, dict[str, str]]:
        size = len(found.content)
        headers = {"x-goog-generation": str(found.generation), "Content-Type": "application/octet-stream"}
        asked = self.headers.get("Range")
        if asked is None:
            return 200, found.content, headers
        begin, _, end = asked.removeprefix("bytes=").partition("-")
        start = int(begin) if begin else max(size - int(end), 0)
        stop = min(int(end) + 1, size) if begin and end else size
        if start >= size:
            return 416, b"", headers
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return 206, found.content[start:stop], headers

    def _list(self, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        begin, end = query.get("startOffset", ""), query.get("endOffset")
        names, folders = [], set()
        for name in sorted(self.bucket.objects):
            if not name.startswith(prefix) or name < begin or (end and name >= end):
                continue
            folder, separator, rest = name.removeprefix(prefix).partition(delimiter or "\0")
            if separator and (rest or query.get("includeTrailingDelimiter") != "true"):
                folders.add(f"{prefix}{folder}{delimiter}")
            else:
                names.append(name)
        first = int(query.get("pageToken") or 0)
        last = first + int(query.get("maxResults") or len(names) or 1)
        page: dict[str, Any] = {"items": [self._facts(name) for name in names[first:last]]}
        if not first:
            page["prefixes"] = sorted(folders)
        return _json(page | ({"nextPageToken": str(last)} if last < len(names) else {}))

    def _upload(self, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if upload := query.get("upload_id"):
            return self._continue_upload(upload, body)
        if query["uploadType"] == "multipart":
            facts, content = _parts(self.headers["Content-Type"], body)
            return self._finish_upload(facts["name"], query, content)
        if query["uploadType"] == "media":
            return self._finish_upload(query["name"], query, body)
        name = query.get("name") or json.loads(body)["name"]
        upload = f"upload-{len(self.bucket.uploads)}"
        self.bucket.uploads[upload] = (name, query, bytearray())
        address = f"http://{self.headers['Host']}{urlsplit(self.path).path}"
        return 200, b"{}", {"Location": f"{address}?uploadType=resumable&upload_id={upload}"}

    def _continue_upload(self, upload: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        name, query, content = self.bucket.uploads[upload]
        content += body
        total = self.headers.get("Content-Range", "bytes */*").rpartition("/")[2]
        if total == "*" or len(content) < int(total):
            return 308, b"", {"Range": f"bytes=0-{len(content) - 1}"}
        return self._finish_upload(name, query, bytes(content))

    def _finish_upload(self, key: str, query: dict[str, str], content: bytes) -> Any:
        if (refused := _precondition(self.bucket.objects.get(key), query)) is not None:
            return refused
        self.bucket.put(key, content)
        return _json(self._facts(key))

    def _facts(self, key: str) -> dict[str, Any]:
        found = self.bucket.objects[key]
        checksum = google_crc32c.Checksum(found.content).digest()
        return {
            "kind": "storage#object",
            "name": key,
            "bucket": self.bucket.name,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "metageneration": "1",
            "crc32c": _base64(checksum),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def log_message(self, *_: Any) -> None:
        pass


def _precondition(existing: Object | None, query: dict[str, str]) -> Any:
    """The answer where a request's conditions on the generation do not hold; 0 means that there is none."""
    generation = existing.generation if existing else 0
    if int(query.get("ifGenerationMatch", generation)) != generation:
        return _error(412, "At least one of the pre-conditions you specified did not hold.")
    if int(query.get("ifGenerationNotMatch", -1)) == generation:
        return 304, b"", {}
    if int(query.get("generation", generation)) != generation:
        return _error(404, "No such object")
    return None


def _parts(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON and the content of a multipart/related body."""
    header = email.parser.Parser().parsestr(f"Content-Type: {content_type}\n\n")
    boundary = header.get_boundary().encode()
    _, facts, content, _ = body.split(b"--" + boundary, 3)
    first, second = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (facts, content))
    return json.loads(first), second.removesuffix(b"\n").removesuffix(b"\r")


def _json(content: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(content).encode(), {}


def _error(status: int, message: str) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps({"error": {"code": status, "message": message}}).encode(), {}


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
