"""One URL → its bytes, within a deadline for all of it and a limit on its size. Called by fetch.py's threads.

A socket's timeout only bounds the wait for the next byte: a server that drips can hold a thread for hours. Here every
read gets what is left of one deadline. Only the resolver's own time-out (the system's) lies outside it.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from email.message import Message
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit

BYTE_LIMIT = 64 << 20
USER_AGENT = "Mozilla/5.0 (compatible; eclipse-prior; img2dataset)"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SAFE = "%/:=&?~#+!$,;'@()*[]"
_deadline = threading.local()


class FetchError(Exception):
    """Why a URL gave nothing: `reason` is the code for rejected.parquet, the message adds particulars."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def is_transient(reason: str) -> bool:
    """Whether another try may succeed: time-outs, broken connections, overloaded servers; not a 404."""
    return reason in ("timed_out", "connection_failed", "cut_short", "http_408", "http_425", "http_429") or (
        reason.startswith("http_5")
    )


def fetch_url(url: str, timeout_s: float, refused: Callable[[Message], bool]) -> bytes:
    """GET `url`; at most timeout_s seconds from the first packet to the last, and BYTE_LIMIT bytes.

    refused: told the answer's headers, says whether they forbid the use. Raises FetchError.
    """
    try:
        request = urllib.request.Request(_ascii(url), headers={"User-Agent": USER_AGENT})
        opener = _opener(request.host.partition(":")[0] in _LOOPBACK)
        _deadline.at = time.monotonic() + timeout_s
        with opener.open(request, timeout=timeout_s) as answer:
            if refused(answer.headers):
                raise FetchError("disallowed", "X-Robots-Tag")
            return _body(answer)
    except FetchError:
        raise
    except HTTPError as error:
        error.close()
        raise FetchError(f"http_{error.code}", error.reason) from None
    except Exception as error:  # whatever urllib runs into on the open web is this URL's fault alone
        cause = error.reason if isinstance(error, URLError) else error
        raise FetchError(_reason(cause), cause) from None


def _body(answer: Any) -> bytes:
    chunks, size = [], 0
    while chunk := answer.read(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > BYTE_LIMIT:
            raise FetchError("too_large", f"over {BYTE_LIMIT >> 20} MiB")
    if answer.length:  # http.client keeps quiet about a body that ends early when it is read in pieces
        raise FetchError("cut_short", f"{answer.length} bytes missing")
    if not size:
        raise FetchError("empty", "no bytes")
    return b"".join(chunks)


def _reason(cause: object) -> str:
    if isinstance(cause, TimeoutError):
        return "timed_out"
    if isinstance(cause, http.client.IncompleteRead):
        return "cut_short"
    if isinstance(cause, socket.gaierror):
        return "connection_failed" if cause.errno == socket.EAI_AGAIN else "no_such_host"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "bad_certificate"
    if isinstance(cause, (http.client.InvalidURL, ValueError)):
        return "malformed_url"
    return "connection_failed"


def _ascii(url: str) -> str:
    """Percent-encode what browsers would: spaces and letters beyond ASCII; the host by IDNA."""
    parts = urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return urlunsplit((parts.scheme, host, quote(parts.path, _SAFE), quote(parts.query, _SAFE), ""))


def _left() -> float:
    left = _deadline.at - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for this URL is over")
    return left


class _Raw(io.RawIOBase):
    """A socket's stream that waits no longer than the deadline allows."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Stream:
    """What http.client's response asks of a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Raw(self._sock))


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_Stream(sock), *args, **kwargs)  # type: ignore[arg-type]


class _Connection(http.client.HTTPConnection):
    response_class = _Response

    def connect(self) -> None:
        self.timeout = _left()
        super().connect()


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response

    def connect(self) -> None:
        self.timeout = _left()
        super().connect()


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)


class _Https(urllib.request.AbstractHTTPHandler):
    https_request = urllib.request.AbstractHTTPHandler.do_request_

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, req, context=_TLS)  # type: ignore[arg-type]


_TLS = ssl.create_default_context()  # shared: reading the certificates takes longer than many a download


@functools.cache
def _opener(loopback: bool) -> urllib.request.OpenerDirector:
    """HTTP and HTTPS and nothing else, redirects included; the machine's proxy, unless this very machine serves."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler({} if loopback else None),
        _Http(),
        _Https(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
