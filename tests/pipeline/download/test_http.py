"""URLs → bytes or one reason: within the deadline, within the limits, politely, whatever the servers do."""

from __future__ import annotations

import base64
import gzip
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from eclipse.pipeline.download import http as module
from eclipse.pipeline.download.http import Client, ClientSpec, FetchError, is_transient
from eclipse.pipeline.download.outage import OutageError
from web import Handler, Web, drip, drip_headers, picture_answer, serving

LOCAL = ("127.0.0.1",)


def redirect(target: str):
    def answer(handler: Handler, before: int) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def endless(handler: Handler, before: int) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.closing.is_set():
        handler.wfile.write(bytes(1 << 16))


def endless_headers(handler: Handler, before: int) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.closing.is_set():
        handler.wfile.write(b"X-More: yes\r\n" * 1000)


def secret(handler: Handler, before: int) -> None:
    wanted = "Basic " + base64.b64encode(b"ann:p:w").decode()
    handler.give(b"for ann") if handler.headers["Authorization"] == wanted else handler.send_error(401)


def overloaded(handler: Handler, before: int) -> None:
    if before:
        handler.give(b"better now")
    else:
        handler.send_response(503)
        handler.send_header("Retry-After", "1")
        handler.send_header("Content-Length", "0")
        handler.end_headers()


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    answers: dict[str, Any] = {
        "/picture": picture_answer(b"bytes"),
        "/with%20space/%C3%A4.png": picture_answer(b"encoded"),
        "/redirect": redirect("/picture"),
        "/loop": redirect("/loop"),
        "/to-file": redirect("file:///etc/passwd"),
        "/short": lambda handler, before: handler.give(b"half", length=8),
        "/empty": picture_answer(b""),
        "/large": picture_answer(bytes(300_000)),
        "/endless": endless,
        "/endless-headers": endless_headers,
        "/drip": drip,
        "/drip-headers": drip_headers,
        "/refused": lambda handler, before: handler.give(b"x", X_Robots_Tag="eclipse: noai"),
        "/for-others": lambda handler, before: handler.give(b"x", X_Robots_Tag="other: noai"),
        "/missing-at-all": lambda handler, before: handler.send_error(410),
        "/gzip": lambda handler, before: handler.give(gzip.compress(b"packed"), Content_Encoding="gzip"),
        "/no-gzip": lambda handler, before: handler.give(b"packed", Content_Encoding="gzip"),
        "/bomb": lambda handler, before: handler.give(gzip.compress(bytes(1 << 20)), Content_Encoding="gzip"),
        "/secret": secret,
        "/overloaded": overloaded,
        "/agent": lambda handler, before: handler.give(str(handler.headers["User-Agent"]).encode()),
        "/robots.txt": picture_answer(b"User-agent: *\nDisallow: /picture\nUser-agent: other\nDisallow: /\n"),
        "/slow": lambda handler, before: (time.sleep(0.15), handler.give(b"late")),
    }
    for place, target in enumerate(
        ["127.0.0.2", "[::1]", "[::ffff:127.0.0.2]", "[::ffff:7f00:2]", "0x7f000002", "169.254.169.254"]
    ):
        answers[f"/private-{place}"] = redirect(f"http://{target}:9/x")
    with serving(answers) as server:
        yield server


def client(**spec: Any) -> Client:
    told = {"timeout_s": 3.0, "concurrency": 64, "per_host": 32, "patience_s": 1.0, "allow_hosts": LOCAL}
    return Client(ClientSpec(**{**told, "refused": ("noai",), **spec}))


def fetch(using: Client, *urls: str, auth: str = "", seconds: float = 20.0) -> list[bytes | BaseException]:
    """What becomes of these URLs, asked for at the same time."""
    answers: queue.SimpleQueue[tuple[int, bytes | BaseException]] = queue.SimpleQueue()
    for place, url in enumerate(urls):
        using.start(url, auth, lambda result, at=place: answers.put((at, result)))
    found = dict(answers.get(timeout=seconds) for _ in urls)
    return [found[place] for place in range(len(urls))]


def reasons(results: list[Any]) -> list[str]:
    found = []
    for result in results:
        assert isinstance(result, FetchError), result
        assert str(result).startswith(f"{result.reason}: ")
        found.append(result.reason)
    return found


def test_bytes_come_through_redirects_odd_paths_and_encodings(web: Web):
    paths = ["/picture", "/redirect", "/with space/ä.png", "/gzip", "/for-others"]
    assert fetch(client(), *map(web.url, paths)) == [b"bytes", b"bytes", b"encoded", b"packed", b"x"]


def test_every_failure_has_its_reason(web: Web, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BODY_LIMIT", 200_000)
    expected = {
        "/missing": "http_404", "/missing-at-all": "http_410", "/short": "cut_short", "/empty": "empty",
        "/large": "too_large", "/endless": "too_large", "/bomb": "too_large", "/refused": "disallowed",
        "/loop": "too_many_redirects", "/to-file": "malformed_url", "/no-gzip": "bad_answer",
        "/endless-headers": "bad_answer",
    }  # fmt: skip
    using = client()
    assert reasons(fetch(using, *map(web.url, expected))) == list(expected.values())
    assert reasons(fetch(using, "http://[::1/x", "file:///etc/passwd", "http://no-such.invalid/")) == [
        "malformed_url", "malformed_url", "no_such_host",
    ]  # fmt: skip
    assert not using._reading and not using._waiting_to_be_stored, "bodies that were given up hold no room"


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_a_server_that_drips_is_left_at_the_deadline(web: Web, path: str):
    started = time.monotonic()
    assert reasons(fetch(client(timeout_s=0.4), web.url(path))) == ["timed_out"]
    assert time.monotonic() - started >= 0.4


def test_redirects_to_private_addresses_are_refused_in_every_spelling(web: Web):
    hits = sum(web.hits.values())
    assert reasons(fetch(client(), *(web.url(f"/private-{place}") for place in range(6)))) == ["private_address"] * 6
    assert sum(web.hits.values()) - hits == 6, "asked for the redirects, and for nothing else"
    assert reasons(fetch(client(allow_hosts=()), web.url("/picture"))) == ["private_address"]


def test_credentials_reach_their_own_host_alone(web: Web):
    assert fetch(client(), web.url("/secret"), auth="ann:p:w") == [b"for ann"]
    assert reasons(fetch(client(), web.url("/secret"), auth="bob:x")) == ["http_401"]
    seen: list[str | None] = []

    def listen(handler: Handler, before: int) -> None:
        seen.append(handler.headers["Authorization"])
        handler.give(b"x")

    with serving({"/x": listen}) as elsewhere:
        web.answers["/away"] = redirect(elsewhere.url("/x"))
        assert fetch(client(), web.url("/away"), auth="ann:p:w") == [b"x"]
    assert seen == [None]


def test_who_asks_is_said_honestly(web: Web):
    agents = [fetch(client(contact=contact), web.url("/agent"))[0] for contact in (None, "mailto:ann@example.org")]
    assert all(agent.startswith(b"eclipse-prior/") for agent in agents if isinstance(agent, bytes))
    assert isinstance(agents[1], bytes) and b"+mailto:ann@example.org" in agents[1]


def test_robots_txt_is_heeded_where_the_card_says_so(web: Web):
    before = web.hits["/robots.txt"]
    assert fetch(client(), web.url("/picture")) == [b"bytes"]
    assert web.hits["/robots.txt"] == before
    using = client(robots_txt=True)
    found = fetch(using, web.url("/picture"), web.url("/gzip"), web.url("/redirect"))
    assert reasons(found[:1]) == ["disallowed"] and found[1] == b"packed"
    assert web.hits["/robots.txt"] == before + 1, "asked for once a site"


def test_a_server_that_asks_for_rest_gets_it(web: Web):
    web.hits["/overloaded"] = 0
    using = client()
    assert reasons(fetch(using, web.url("/overloaded"))) == ["http_503"]
    assert using.longest_wait_s == 1.0
    started = time.monotonic()
    assert fetch(using, web.url("/overloaded")) == [b"better now"]
    assert time.monotonic() - started > 0.5


def test_a_host_is_asked_by_no_more_than_the_limit_at_a_time(web: Web):
    most, now, lock = 0, 0, threading.Lock()

    def crowded(handler: Handler, before: int) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        handler.give(b"x")

    web.answers["/crowded"] = crowded
    assert fetch(client(per_host=3), *[web.url("/crowded")] * 20) == [b"x"] * 20
    assert most <= 3


def test_bodies_that_are_held_have_a_limit_and_wait_for_room(web: Web, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BODIES_LIMIT", 400_000)
    using = client()
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(4):
        using.start(web.url("/large"), "", answers.put)
    first = answers.get(timeout=5)
    assert len(first) == 300_000
    time.sleep(0.3)
    assert answers.empty(), "the others wait until there is room"
    using.stored(300_000)
    for _ in range(3):
        assert len(answers.get(timeout=5)) == 300_000
        using.stored(300_000)


def test_an_outage_is_waited_for_and_no_result():
    said: list[bool] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    spec = ClientSpec(3.0, 32, 32, patience_s=60.0, allow_hosts=LOCAL)
    using = Client(spec, said.append)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for number in range(100):
        using.start(f"http://127.0.0.1:{port}/{number}", "", answers.put)
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        time.sleep(0.02)
    assert said == [True] and answers.empty()
    paths = {f"/{number}": picture_answer(b"back") for number in range(100)}
    with serving(paths, port) as web:
        assert [answers.get(timeout=60) for _ in range(100)] == [b"back"] * 100
        assert said == [True, False] and max(web.hits.values()) <= 3


def test_nothing_for_too_long_ends_it():
    answers = fetch(client(patience_s=0.5), *(f"http://127.0.0.1:9/{number}" for number in range(10)))
    assert all(isinstance(answer, OutageError) for answer in answers)


def test_dead_hosts_are_results_while_others_live(web: Web):
    using = client(patience_s=30.0, timeout_s=60.0)
    assert fetch(using, web.url("/picture")) == [b"bytes"]
    found = fetch(using, *(f"http://127.0.0.1:9/{number}" for number in range(120)), web.url("/picture"))
    assert reasons(found[:-1]) == ["connection_failed"] * 120 and found[-1] == b"bytes"


def test_only_what_may_pass_is_tried_again():
    assert all(map(is_transient, ["timed_out", "connection_failed", "cut_short", "http_429", "http_500", "http_503"]))
    assert not any(map(is_transient, ["http_404", "http_403", "unreadable", "disallowed", "too_large", "empty"]))
