"""A chat with an OpenAI-compatible server: bounded in time and size, asked again where that can help.

Trade-off: a connection a request and the standard library alone; beside a second of a visual-language model both cost
nothing.
"""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import InputError

KEY = "MITHRIDATE_JUDGE_KEY"
ATTEMPTS = 4
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; doubled each time, and drawn from [0, pause]
MAX_ANSWER = 1024**2  # bytes
_BUSY = (408, 425, 429, 502, 503, 504)  # the server's state
_BROKEN = 500  # the server's state or this very request; asked again, and then taken for the latter
_OTHERS = (400, 413, 415, 422)  # this very request


class Refused(Exception):
    """The server answers, but not this request, or not in a way that can be read."""


@dataclass(frozen=True)
class Endpoint:
    """`url` up to and with the version, such as http://localhost:8000/v1."""

    url: str
    model: str
    timeout: float

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("endpoint is a URL like http://localhost:8000/v1")
        if parts.username or parts.password:
            raise ValueError(f"no credentials in the endpoint: it is recorded with the scores; set {KEY}")

    def chat(self, content: str | list[dict[str, Any]], tokens: int) -> str:
        """The answer to one message. Raises Refused, or InputError where no request will get further."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": tokens,
        }
        attempt = 0
        while True:
            attempt += 1
            try:
                return _said(self._post(json.dumps(body).encode()))
            except urllib.error.HTTPError as error:
                error.close()
                self._explain(error.code, attempt)
            except (OSError, http.client.HTTPException) as error:
                if attempt == ATTEMPTS:
                    reason = getattr(error, "reason", error)
                    raise InputError(
                        f"{self.url}: no answer in {ATTEMPTS} attempts ({type(error).__name__}: {reason}); start the "
                        "server or mend endpoint=…, and run the same command again"
                    ) from error
            except Refused:
                if attempt == ATTEMPTS:
                    raise
            time.sleep(random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))))  # noqa: S311

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)  # noqa: S310
        opener = _DIRECT if urlsplit(self.url).hostname in _HERE else _OPENER
        with opener.open(request, timeout=self.timeout) as response:
            answer: bytes = response.read(MAX_ANSWER + 1)
            if len(answer) > MAX_ANSWER:
                raise Refused(f"an answer of more than {MAX_ANSWER} bytes")
            if response.length:  # torn: read(n) does not say so
                raise http.client.IncompleteRead(answer, response.length)
        return answer

    def _explain(self, status: int, attempt: int) -> None:
        """Returns where asking again may help."""
        if status in _OTHERS or (status == _BROKEN and attempt == ATTEMPTS):
            raise Refused(f"HTTP {status}")
        if status == _BROKEN or (status in _BUSY and attempt < ATTEMPTS):
            return
        if status in _BUSY:
            raise InputError(f"{self.url}: busy (HTTP {status}, {ATTEMPTS} times); run the same command again later")
        if status in (401, 403):
            raise InputError(f"{self.url}: access denied (HTTP {status}); set {KEY} in the environment")
        raise InputError(f"{self.url}: HTTP {status}; is it an OpenAI-compatible endpoint that has {self.model!r}?")


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key and the picture to a host that nobody named."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)
_DIRECT = urllib.request.build_opener(_Stay, urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine
_HERE = ("localhost", "127.0.0.1", "::1")


def _said(answer: bytes) -> str:
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Refused("not the JSON of a chat completion") from error
    if not isinstance(text, str):
        raise Refused("a chat completion without text")
    return text
