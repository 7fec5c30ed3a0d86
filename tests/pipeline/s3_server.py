"""moto's S3 over HTTP on a free loopback port, with faults: what it answers is its own, what goes wrong is ours.

A fault is a function of the request that returns how to spoil it, or None. It may be changed while the server runs.

The fixtures are a plugin of the tests that name it. There is nothing to assert in here: PYTEST_DONT_REWRITE
"""

import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import parse_qs, quote
from xml.sax.saxutils import escape

import pytest
import ray
import s3fs
from moto.server import create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from pipeline.shards import remote

Fault = Callable[["Request"], str | None]
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
SIGNED = "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
MANY, PAGE = 100_500, 1000  # keys of the bucket `many`, which has no objects, and keys a page


@dataclass(frozen=True)
class Request:
    number: int  # from 0, in order of arrival
    method: str
    path: str
    query: dict[str, str]
    first: int | None  # byte of its range

    @property
    def lists(self) -> bool:
        return self.method == "GET" and "list-type" in self.query


class _Quiet(WSGIRequestHandler):
    def log(self, *args: object) -> None:
        pass


class Server:
    """`requests` is what came, `fault` what to do to it."""

    def __init__(self) -> None:
        self.fault: Fault = lambda request: None
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._moto = create_backend_app("s3")
        self._http = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @contextmanager
    def running(self) -> Iterator["Server"]:
        thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            thread.join()
            self._http.server_close()

    def calm(self) -> None:
        self.fault = lambda request: None
        self.requests = []

    def put(self, path: str, data: bytes = b"") -> None:
        """Make the bucket `/b`, or the object `/b/key`, past all faults."""
        self._ask("PUT", path, data)

    def get(self, path: str) -> bytes:
        return self._ask("GET", path)

    def begin_upload(self, path: str) -> None:
        self._ask("POST", f"{path}?uploads", b"")

    def uploads(self, bucket: str) -> int:
        """Multipart uploads that are neither completed nor aborted."""
        return self._ask("GET", f"/{bucket}?uploads").count(b"<UploadId>")

    def _ask(self, method: str, path: str, data: bytes | None = None) -> bytes:
        url = self.url + quote(path, safe="/?=")
        headers = {"X-Test": "1", "Content-Type": "application/octet-stream", "Authorization": SIGNED}
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method)) as answer:
            return answer.read()

    def _answer(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        if "HTTP_X_TEST" in environ:
            return self._moto(environ, start_response)
        query = {k: v[0] for k, v in parse_qs(environ["QUERY_STRING"], keep_blank_values=True).items()}
        with self._lock:
            span = environ.get("HTTP_RANGE", "").removeprefix("bytes=").split("-")[0]
            asked = (environ["REQUEST_METHOD"], environ["PATH_INFO"], query, int(span) if span else None)
            request = Request(len(self.requests), *asked)
            self.requests.append(request)
        match self.fault(request):
            case "slow down":
                return _error(environ, start_response, "503 Slow Down", SLOW_DOWN)
            case "too many":
                return _error(environ, start_response, "429 Too Many Requests", SLOW_DOWN)
            case "denied":
                return _error(environ, start_response, "403 Forbidden", DENIED)
            case "torn":
                return _torn(environ, self._moto(environ, start_response))
            case "lost":  # done, but the answer never arrives
                b"".join(self._moto(environ, lambda *_: None))
                return _torn(environ, [])
            case "short" if request.first is not None:
                return _short(self._moto, environ, start_response)
            case "late":
                time.sleep(2.5)
        if request.path.strip("/") == "many" and request.lists:
            start_response("200 OK", [("Content-Type", "application/xml")])
            return [_page(query)]
        return self._moto(environ, start_response)


def _error(environ: dict, start_response: Callable, status: str, body: bytes) -> list[bytes]:
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    body = b"" if environ["REQUEST_METHOD"] == "HEAD" else body
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _torn(environ: dict, answer: Iterable[bytes]) -> Iterator[bytes]:
    if half := (whole := b"".join(answer))[: len(whole) // 2]:
        yield half
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


def _short(app: Callable, environ: dict, start_response: Callable) -> list[bytes]:
    """Half of the body, and headers that call it all of it."""
    told: list = []
    body = b"".join(app(environ, lambda status, headers, *_: told.extend((status, headers))))
    body = body[: len(body) // 2]
    start_response(
        told[0], [h for h in told[1] if h[0].lower() != "content-length"] + [("Content-Length", str(len(body)))]
    )
    return [body]


def _page(query: dict[str, str]) -> bytes:
    """A page of `MANY` keys `crawl/000000.tar` …; the token is the number of its first key."""
    begin = int(query.get("continuation-token", 0))
    keys = [f"crawl/{n:06d}.tar" for n in range(begin, min(begin + PAGE, MANY))]
    rows = "".join(
        f'<Contents><Key>{escape(k)}</Key><Size>5</Size><ETag>"{n:032x}"</ETag>'
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for n, k in enumerate(keys, begin)
        if k.startswith(query.get("prefix", ""))
    )
    more = begin + PAGE < MANY
    token = f"<NextContinuationToken>{begin + PAGE}</NextContinuationToken>" if more else ""
    text = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}</ListBucketResult>"
    return b'<?xml version="1.0" encoding="UTF-8"?>' + text.encode()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A store of its own, and the environment that leads to it."""
    before = dict(os.environ)
    with Server().running() as server:
        for name in [name for name in before if name.startswith("AWS_")]:
            del os.environ[name]
        settings = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        settings |= {"AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1", "RAY_ADDRESS": "local"}
        os.environ |= settings
        reconnect()
        yield server
    os.environ.clear()
    os.environ |= before
    reconnect()


@pytest.fixture(scope="module")
def workers(server: Server) -> Iterator[str]:
    """A Ray whose workers are born into that environment; its address."""
    ray.shutdown()
    # four processors: two runs at once would else take each other's, and Ray starts workers anew for each change
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def reconnect() -> None:
    """Forget connections that were made under other settings."""
    remote._opened.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server: Server, request) -> Iterator[str]:
    """An empty bucket; its URL."""
    name = f"test-{abs(hash(request.node.name)) % 10**12}"
    server.calm()
    server.put(f"/{name}")
    yield f"s3://{name}"
    server.calm()
