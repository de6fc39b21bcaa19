"""One URL: its bytes or one reason, within the deadline whatever the server does."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from email.message import Message

import pytest
from eclipse.pipeline.download import http as module
from eclipse.pipeline.download.http import FetchError, fetch_url, is_transient
from web import Handler, Web, drip, drip_headers, picture_answer, serving


def redirect(handler: Handler, before: int) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/picture")
    handler.end_headers()


def refuse(handler: Handler, before: int) -> None:
    handler.give(b"x", X_Robots_Tag="noai")


def overloaded(handler: Handler, before: int) -> None:
    handler.send_error(503)


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    answers = {
        "/picture": picture_answer(b"bytes"),
        "/with%20space/%C3%A4.png": picture_answer(b"encoded"),
        "/redirect": redirect,
        "/short": lambda handler, before: handler.give(b"half", length=8),
        "/empty": picture_answer(b""),
        "/large": picture_answer(bytes(300_000)),
        "/drip": drip,
        "/drip-headers": drip_headers,
        "/refused": refuse,
        "/overloaded": overloaded,
    }
    with serving(answers) as server:
        yield server


def robots(headers: Message) -> bool:
    return headers["X-Robots-Tag"] == "noai"


def reason(url: str, timeout_s: float = 5.0) -> str:
    with pytest.raises(FetchError) as caught:
        fetch_url(url, timeout_s, robots)
    assert str(caught.value).startswith(f"{caught.value.reason}: ")
    return caught.value.reason


def test_bytes_come_through_redirects_and_odd_paths(web: Web, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # this very machine is asked directly
    module._opener.cache_clear()
    assert fetch_url(web.url("/picture"), 5, robots) == b"bytes"
    assert fetch_url(web.url("/redirect"), 5, robots) == b"bytes"
    assert fetch_url(web.url("/with space/ä.png"), 5, robots) == b"encoded"


def test_every_failure_has_its_reason(web: Web, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BYTE_LIMIT", 200_000)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        assert reason(closed) == "connection_failed"
    assert reason(web.url("/missing")) == "http_404"
    assert reason(web.url("/overloaded")) == "http_503"
    assert reason(web.url("/short")) == "cut_short"
    assert reason(web.url("/empty")) == "empty"
    assert reason(web.url("/large")) == "too_large"
    assert reason(web.url("/refused")) == "disallowed"
    assert reason("http://[::1/x") == "malformed_url"
    assert reason("file:///etc/passwd"), "only HTTP is spoken"


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_a_server_that_drips_is_left_at_the_deadline(web: Web, path: str):
    started = time.monotonic()
    assert reason(web.url(path), timeout_s=0.4) == "timed_out"
    assert time.monotonic() - started >= 0.4


def test_only_what_may_pass_is_tried_again():
    assert all(map(is_transient, ["timed_out", "connection_failed", "cut_short", "http_429", "http_500", "http_503"]))
    assert not any(map(is_transient, ["http_404", "http_403", "unreadable", "disallowed", "too_large", "empty"]))
