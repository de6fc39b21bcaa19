"""A small HTTP server on the loopback address whose answers a test chooses, path by path."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Handler", int], None]  # the handler, and how often the path was asked for before


class Handler(BaseHTTPRequestHandler):
    server: Web  # type: ignore[assignment]

    def do_GET(self) -> None:
        with self.server.lock:
            before = self.server.hits[self.path]
            self.server.hits[self.path] += 1
        answer = self.server.answers.get(self.path)
        try:
            if answer is None:
                self.send_error(404)
            else:
                answer(self, before)
        except OSError:
            pass  # the client has left

    def give(self, body: bytes, *, length: int | None = None, **headers: str) -> None:
        """A good answer; a `length` that is not the body's cuts it short."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Web(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answers: dict[str, Answer], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answers = answers
        self.hits: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


@contextmanager
def serving(answers: dict[str, Answer], port: int = 0) -> Iterator[Web]:
    web = Web(answers, port)
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield web
    finally:
        web.closing.set()
        web.shutdown()
        web.server_close()


def picture_answer(body: bytes) -> Answer:
    return lambda handler, before: handler.give(body)


def drip(handler: Handler, before: int) -> None:
    """A byte now and then, for ever: every single wait is short."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def drip_headers(handler: Handler, before: int) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"X-More: yes\r\n")
        handler.wfile.flush()
