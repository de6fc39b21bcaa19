"""URLs → bytes, through aiohttp: deadlines, limits, politeness, and what a failure is called. Used by worker.py.

One client a process, on an event loop in a thread of its own. Every URL has one deadline for all of it (names,
redirects, body), from the moment its turn comes; a body has a limit, and so have all bodies held at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.robotparser import RobotFileParser

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError
from yarl import URL

from ... import __version__
from .addresses import Addresses, PrivateAddressError
from .crowd import Crowd
from .outage import Outage

BODY_LIMIT = 64 << 20  # bytes of one body, unpacked
BODIES_LIMIT = 256 << 20  # of all that a process holds: being read, or read and not yet stored
REDIRECTS = 10
NAME_THREADS = 32  # names looked up at a time: the system's resolver blocks
LONGEST_REQUESTED_WAIT_S = 120.0  # of what a server may ask for by Retry-After
TOKEN = "eclipse"  # what robots.txt and X-Robots-Tag may call us


class FetchError(Exception):
    """Why a URL gave nothing: `reason` is the code for rejected.parquet, the message adds particulars.

    silent: there was no connection, as when the network is out.
    """

    def __init__(self, reason: str, detail: object = "", *, silent: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.silent = silent

    @property
    def answered(self) -> bool:
        """Whether it shows that the network works."""
        return not self.silent and self.reason not in (
            "private_address",
            "malformed_url",
            "no_such_host",
            "connection_failed",
        )


def is_transient(reason: str) -> bool:
    """Whether another try may succeed: time-outs, broken connections, overloaded servers; not a 404."""
    passing = ("timed_out", "connection_failed", "cut_short", "robots_unavailable", "http_408", "http_425", "http_429")
    return reason in passing or reason.startswith("http_5")


def user_agent(contact: str | None) -> str:
    """Who asks, and whom to write to."""
    return f"eclipse-prior/{__version__} (img2dataset; {f'+{contact}' if contact else 'no contact given'})"


@dataclass(frozen=True)
class ClientSpec:
    """How a process fetches. concurrency: fetches at a time, at most; per_host: of these to one host."""

    timeout_s: float
    concurrency: int
    per_host: int
    patience_s: float
    contact: str | None = None
    robots_txt: bool = False
    allow_hosts: tuple[str, ...] = ()
    known: tuple[str, ...] = ()  # URLs that answered before: asked when nothing else does
    refused: tuple[str, ...] = ()  # directives of X-Robots-Tag that forbid the use


@dataclass
class _Host:
    slots: asyncio.Semaphore
    not_before: float = 0.0  # it asked to be left alone until then
    fine_at: float = float("-inf")  # when it last gave what was asked for


class Client:
    """Fetches for a whole process. `start` may be called from any thread; everything else happens on the loop's.

    said(waiting): see Outage. Raises nothing by itself: every fetch ends in `done(bytes or an exception)`.
    """

    def __init__(self, spec: ClientSpec, said: Callable[[bool], None] = lambda waiting: None) -> None:
        from img2dataset.downloader import is_disallowed  # takes seconds to import: not on the loop

        self._is_disallowed = is_disallowed
        self.spec = spec
        self.longest_wait_s = 0.0  # that a server asked for; the next pass over failures waits for it
        self._said = said
        self._hosts: dict[tuple[str, int | None], _Host] = {}
        self._robots: dict[str, asyncio.Task[RobotFileParser | FetchError]] = {}
        self._asking = 0
        self._reading: dict[object, int] = {}  # bytes of bodies so far, the oldest first
        self._waiting_to_be_stored = 0  # bytes of bodies that are complete
        self._room = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        threading.Thread(target=self._run, args=(ready,), daemon=True, name="fetch").start()
        ready.wait()

    def start(self, url: str, auth: str, done: Callable[[bytes | BaseException], None]) -> None:
        """Fetch `url` with `auth` (user:password, or empty); done is called on the loop's thread, and must be quick.

        The bytes count against BODIES_LIMIT until they are handed back with `stored`.
        """

        def begin() -> None:
            task = self._loop.create_task(self._report(url, auth, done))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    def stored(self, size: int) -> None:
        """The caller holds `size` bytes less."""
        self._loop.call_soon_threadsafe(self._give_back, size)

    async def fetch(self, url: str, auth: str = "") -> bytes:
        """The bytes behind `url`. Raises FetchError, or OutageError when nothing answers any more."""
        while True:
            await self._outage.passed()
            self._asking += 1
            try:
                data = await self._one(url, auth)
            except FetchError as error:
                if error.answered:
                    self._outage.answered(url, fine=False)
                fault = error
            else:
                self._outage.answered(url, fine=True)
                return data
            finally:
                self._asking -= 1
            if not (fault.silent and await self._outage.held_back(url)):
                raise fault

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_default_executor(ThreadPoolExecutor(NAME_THREADS, "names"))
        self._loop.run_until_complete(self._open())
        ready.set()
        self._loop.run_forever()

    async def _open(self) -> None:
        spec = self.spec
        self._proxies = {
            kind: URL(proxy) for kind, proxy in urllib.request.getproxies().items() if kind in ("http", "https")
        }
        self._crowd = Crowd(spec.concurrency)
        self._outage = Outage(self._answers, spec.patience_s, spec.known, self._said, lambda: self._asking)
        self._addresses = Addresses(spec.allow_hosts, [str(proxy.host) for proxy in self._proxies.values()])
        connector = aiohttp.TCPConnector(
            limit=0,
            limit_per_host=spec.per_host,
            ttl_dns_cache=300,
            dns_cache_max_size=10_000,
            resolver=self._addresses,
            socket_factory=self._addresses.open_socket,
            keepalive_timeout=5,
        )
        # A connection that comes about shows that the network works, whatever the server does with it.
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(_heard)
        trace.on_connection_reuseconn.append(_heard)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),  # asyncio.timeout below bounds everything at once
            headers={
                "User-Agent": user_agent(spec.contact),
                "Accept": "image/*,*/*;q=0.1",
                "Accept-Encoding": "gzip, deflate",
            },
            trace_configs=[trace],
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=1 << 16,
        )

    async def _report(self, url: str, auth: str, done: Callable[[bytes | BaseException], None]) -> None:
        try:
            done(await self.fetch(url, auth))
        except BaseException as error:  # whatever it is, the caller waits for an answer
            done(error)

    async def _one(self, text: str, auth: str) -> bytes:
        """One try at a URL: its turn, its deadline, and the name of what goes wrong."""
        try:
            url = _url(text)
        except ValueError as error:
            raise FetchError("malformed_url", error) from None
        if url.scheme not in ("http", "https") or not url.host:
            raise FetchError("malformed_url", url.scheme)
        host = self._host(url)
        async with host.slots, self._crowd:
            await self._wait_for(host)
            heard: list[bool] = []
            try:
                async with asyncio.timeout(self.spec.timeout_s):
                    if self.spec.robots_txt:
                        await self._heed_robots(url)
                    data = await self._follow(url, auth, heard)
            except TimeoutError:
                if host.fine_at > time.monotonic() - 10 * self.spec.timeout_s:
                    self._crowd.was_too_late()
                raise FetchError("timed_out", f"after {self.spec.timeout_s:g} s", silent=not heard) from None
            except FetchError:
                raise
            except Exception as error:  # whatever a server makes aiohttp run into is this URL's fault alone
                raise _named(error, bool(heard)) from None
            host.fine_at = time.monotonic()
            self._crowd.went_well()
            return data

    async def _wait_for(self, host: _Host) -> None:
        """Sit out what the host asked for, if that is no longer than a URL may take; else leave it to a later pass."""
        wait = host.not_before - time.monotonic()
        if wait > self.spec.timeout_s:
            raise FetchError("http_429", f"the server asked for {wait:.0f} s of rest")
        if wait > 0:
            await asyncio.sleep(wait)

    async def _follow(self, url: URL, auth: str, heard: list[bool]) -> bytes:
        first = url.origin()
        for _ in range(REDIRECTS):
            user, _, password = auth.partition(":")
            # Credentials are for the host that the list names; a redirect to another gets none.
            login = aiohttp.BasicAuth(user, password) if auth and url.origin() == first else None
            async with self._session.get(
                url, auth=login, allow_redirects=False, proxy=await self._proxy(url), trace_request_ctx=heard
            ) as answer:
                if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                    url = _joined(url, answer.headers["Location"])
                    continue
                self._require_fine(url, answer)
                return await self._body(answer)
        raise FetchError("too_many_redirects", f"over {REDIRECTS}")

    def _require_fine(self, url: URL, answer: aiohttp.ClientResponse) -> None:
        if answer.status in (429, 503) and (wait := _requested_wait(answer.headers.get("Retry-After"))):
            self._host(url).not_before = time.monotonic() + wait
            self.longest_wait_s = max(self.longest_wait_s, wait)
        if not 200 <= answer.status < 300:
            raise FetchError(f"http_{answer.status}", answer.reason)
        if _forbids(self._is_disallowed, answer.headers.getall("X-Robots-Tag", []), self.spec.refused):
            raise FetchError("disallowed", "X-Robots-Tag")
        if (answer.content_length or 0) > BODY_LIMIT:
            raise FetchError("too_large", f"over {BODY_LIMIT >> 20} MiB")

    async def _body(self, answer: aiohttp.ClientResponse) -> bytes:
        chunks: list[bytes] = []
        me = object()
        self._reading[me] = 0
        try:
            async for chunk in answer.content.iter_any():
                chunks.append(chunk)
                self._reading[me] += len(chunk)
                if self._reading[me] > BODY_LIMIT:
                    raise FetchError("too_large", f"over {BODY_LIMIT >> 20} MiB")
                while not self._is_room(me):
                    self._room.clear()
                    await self._room.wait()
            if not chunks:
                raise FetchError("empty", "no bytes")
            self._waiting_to_be_stored += self._reading[me]
            return b"".join(chunks)
        finally:
            del self._reading[me]
            self._room.set()

    def _is_room(self, body: object) -> bool:
        """Whether a body may be read on: while there is room for all, or for what is done and the oldest of them."""
        if self._waiting_to_be_stored + sum(self._reading.values()) <= BODIES_LIMIT:
            return True
        oldest = next(iter(self._reading))
        return body is oldest and self._waiting_to_be_stored + self._reading[body] <= BODIES_LIMIT

    def _give_back(self, size: int) -> None:
        self._waiting_to_be_stored -= size
        self._room.set()

    def _host(self, url: URL) -> _Host:
        key = (str(url.host), url.port)
        if (host := self._hosts.get(key)) is None:
            if len(self._hosts) > 100_000:
                self._hosts = {known: state for known, state in self._hosts.items() if state.slots.locked()}
            host = self._hosts[key] = _Host(asyncio.Semaphore(self.spec.per_host))
        return host

    async def _proxy(self, url: URL) -> URL | None:
        """The machine's proxy, unless the environment exempts the host or it is one that the card allows.

        The proxy connects, so that the address is judged here, as far as this machine knows it.
        """
        proxy, host = self._proxies.get(url.scheme), str(url.host)
        if proxy is None or urllib.request.proxy_bypass(host) or self._addresses.allows(host):
            return None
        with contextlib.suppress(socket.gaierror):
            await self._addresses.resolve(host)
        return proxy

    async def _answers(self, url: str) -> bool:
        """Whether anything at all comes back from there."""
        try:
            await self._one(url, "")
        except FetchError as error:
            return error.answered
        return True

    async def _heed_robots(self, url: URL) -> None:
        """Raise FetchError if the site's robots.txt (RFC 9309) forbids the URL, or cannot be had for now."""
        origin = str(url.origin())
        if (task := self._robots.get(origin)) is None:
            task = self._robots[origin] = asyncio.create_task(self._read_robots(url.origin()))
        rules = await asyncio.shield(task)
        if isinstance(rules, FetchError):
            self._robots.pop(origin, None)
            raise FetchError("robots_unavailable", rules, silent=rules.silent)
        if not rules.can_fetch(TOKEN, str(url)):
            raise FetchError("disallowed", "robots.txt")

    async def _read_robots(self, origin: URL) -> RobotFileParser | FetchError:
        rules = RobotFileParser()
        heard: list[bool] = []
        try:
            async with asyncio.timeout(self.spec.timeout_s):
                text = await self._follow(origin / "robots.txt", "", heard)
            rules.parse(text[: 1 << 20].decode("utf-8", "replace").splitlines())
            self.stored(len(text))
        except FetchError as error:
            if not error.reason.startswith("http_4") and error.reason not in ("empty", "disallowed"):
                return error
            rules.parse([])  # there is none
        except Exception as error:
            return _named(error, bool(heard))
        return rules


async def _heard(session: aiohttp.ClientSession, context: Any, params: object) -> None:
    context.trace_request_ctx.append(True)


def _url(text: str) -> URL:
    """The URL as it is asked for: percent-encoded where it must be, the host by IDNA. Raises ValueError."""
    return URL(text).with_fragment(None).with_user(None)


def _joined(url: URL, location: str) -> URL:
    """Where a redirect leads. Raises FetchError."""
    try:
        # Servers that send UTF-8 in a header are read as Latin-1 with surrogates.
        target = url.join(URL(location.encode("utf-8", "surrogateescape").decode("utf-8", "replace")))
    except ValueError as error:
        raise FetchError("malformed_url", f"redirect: {error}") from None
    if target.scheme not in ("http", "https") or not target.host:
        raise FetchError("malformed_url", f"redirect to {target.scheme or 'nowhere'}")
    return target.with_fragment(None).with_user(None)


def _requested_wait(header: str | None) -> float:
    """Seconds that a Retry-After asks for (a number, or a date), within reason; 0 if it says nothing."""
    if not header:
        return 0.0
    try:
        wait = float(header) if header.strip().isdecimal() else _seconds_until(header)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(wait, 0.0), LONGEST_REQUESTED_WAIT_S)


def _seconds_until(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()


def _forbids(is_disallowed: Callable[..., bool], values: Sequence[str], directives: Sequence[str]) -> bool:
    """img2dataset's own reading of X-Robots-Tag, which wants the standard library's headers."""
    if not values:
        return False
    headers = Message()
    for value in values:
        headers["X-Robots-Tag"] = value
    return is_disallowed(headers, TOKEN, directives)


def _named(error: Exception, heard: bool) -> FetchError:
    """What aiohttp ran into, by a name of ours; without its texts, which may hold the URL's credentials."""
    cause = getattr(error, "os_error", None) or error.__cause__
    if isinstance(cause, PrivateAddressError) or isinstance(error, PrivateAddressError):
        return FetchError("private_address", cause or error)
    if isinstance(error, aiohttp.InvalidURL) or (
        isinstance(error, ValueError) and not isinstance(error, aiohttp.ClientError)
    ):
        return FetchError("malformed_url", type(error).__name__)
    if isinstance(error, aiohttp.ClientPayloadError):
        broken = isinstance(error.__cause__, ContentEncodingError)
        return FetchError("bad_answer" if broken else "cut_short", type(error.__cause__ or error).__name__)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return FetchError("bad_certificate", getattr(error.certificate_error, "verify_message", ""))
    if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
        return FetchError("no_such_host", cause.strerror)
    if isinstance(error, aiohttp.ClientConnectorError):
        return FetchError(
            "connection_failed", getattr(cause, "strerror", None) or type(error).__name__, silent=not heard
        )
    if isinstance(error, aiohttp.ClientResponseError):  # no HTTP, or headers without end
        return FetchError("bad_answer", type(error).__name__)
    return FetchError("connection_failed", getattr(error, "strerror", None) or type(error).__name__)
