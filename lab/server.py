"""Serves the shapes world's dirty list over HTTP on the loopback address, in a process of its own. Used by download.py.

The list is written once and keeps the port that was free then, so that the URLs of a resumed download agree.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..pipeline.core.errors import EclipseError
from ..pipeline.core.files import atomic_path
from ..pipeline.core.source import ShapesSource
from ..pipeline.core.workspace import Workspace
from ..pipeline.download.url_list import UrlList
from .drawing import draw
from .shapes import Scene, Split, World
from .truth import Planted, captions_of, evaluation_texts, planted

HOST = "127.0.0.1"
PORTS = range(20_000, 32_000)  # below the range from which systems lend ports to outgoing connections
BLOCK = 64  # pictures drawn at a time
STALL_S = 120.0
_PORT_KEY = b"eclipse.port"
_CHANGES = 31  # stream of the seed for what is done to near copies


def list_path(ws: Workspace) -> Path:
    """The list: Parquet with the columns url and caption; the port is in its metadata too."""
    return ws.root / "urls.parquet"


def served_list(ws: Workspace, *, anew: bool) -> AbstractContextManager[UrlList]:
    """What the registry hands to `eclipse download` for this kind of source; anew: the list is made again."""
    if anew:
        list_path(ws).unlink(missing_ok=True)
    return serve(ws)


@contextmanager
def serve(ws: Workspace) -> Iterator[UrlList]:
    """Serve the workspace's card for as long as the block runs; the list is written if it is not there yet.

    Raises EclipseError if the list's port is taken by another program.
    """
    source = ws.card.source
    assert isinstance(source, ShapesSource)
    ws.logs.mkdir(parents=True, exist_ok=True)
    with (ws.logs / "server.log").open("ab") as log:
        # A session of its own keeps Ctrl-C from it; it ends with its standard input, so with this process.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert process.stdin is not None and process.stdout is not None
    with process:
        try:
            process.stdin.write(_order(source, list_path(ws)))
            process.stdin.flush()
            answer = json.loads(process.stdout.readline() or b"{}")
            if "port" not in answer:
                raise _refused(answer, ws)
            yield UrlList((list_path(ws),))
        finally:
            process.kill()


def _order(source: ShapesSource, path: Path) -> bytes:
    order = {**source.model_dump(include={"seed", "rows", "captions", "held_out"}), "list": str(path)}
    return json.dumps(order).encode() + b"\n"


def _refused(answer: dict[str, Any], ws: Workspace) -> EclipseError:
    if "taken" in answer:
        return EclipseError(
            f"port {answer['taken']} is taken by another program, and the URLs of this workspace name it",
            where=str(list_path(ws)),
            hint="stop that program, or begin anew on another port with `eclipse download --overwrite`",
        )
    return EclipseError("the shapes server did not start", where=str(ws.logs / "server.log"), hint="see that file")


class Pictures:
    """The bytes behind every URL; pictures are drawn in blocks when the first of a block is asked for."""

    def __init__(self, world: World, plan: list[Planted]) -> None:
        self.world = world
        self.plan = plan
        self._block = lru_cache(maxsize=256)(self._drawn)

    def encoded(self, row: int) -> bytes:
        """The whole file: PNG, or JPEG for a near copy. A dead row has one too; its fault is the server's business."""
        entry = self.plan[row]
        block, place = divmod(entry.scene, BLOCK)
        picture = self._block(block)[place]
        if entry.kind == "near_copy":
            return near_copy(picture, np.random.default_rng([self.world.seed, _CHANGES, row]))
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "PNG", compress_level=1)
        return out.getvalue()

    def _drawn(self, block: int) -> np.ndarray:
        numbers = range(block * BLOCK, min((block + 1) * BLOCK, len(self.plan)))
        return draw([self.world.scene(number) for number in numbers])


def near_copy(picture: np.ndarray, rng: np.random.Generator) -> bytes:
    """The picture (H,W,3) uint8 as reposted: cropped by up to a pixel a side, recolored, re-encoded as JPEG."""
    height, width = picture.shape[:2]
    left, top, right, bottom = (int(cut) for cut in rng.integers(0, 2, size=4))
    if left + top + right + bottom == 0:
        left = 1
    cropped = picture[top : height - bottom, left : width - right].astype(np.float32)
    recolored = cropped * rng.uniform(0.97, 1.03, size=3) + rng.uniform(-3, 3)
    out = io.BytesIO()
    image = Image.fromarray(np.clip(recolored + 0.5, 0, 255).astype(np.uint8))
    image.save(out, "JPEG", quality=int(rng.integers(82, 96)), subsampling=int(rng.integers(0, 3)))
    return out.getvalue()


class _Connection(asyncio.Protocol):
    """Answers one GET after the other; closes behind a fault, and where the client asks for it."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received and not self._transport.is_closing():
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            self._last = b"HTTP/1.1" not in head or b"connection: close" in head.lower()
            self._answer(head.split(b" ", 2)[1].decode("latin-1"))
        if len(self._received) > 1 << 16:
            self._transport.abort()

    def _answer(self, path: str) -> None:
        number = path[1:].partition(".")[0]
        row = int(number) if number.isascii() and number.isdigit() else len(self._pictures.plan)
        entry = self._pictures.plan[row] if row < len(self._pictures.plan) else None
        if entry is None or entry.path != path or entry.fault == "not_found":
            self._send(b"no such picture\n", "404 Not Found", "text/plain")
        elif entry.fault == "reset":
            linger = struct.pack("ii", 1, 0)  # closing at once sends RST
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._transport.abort()
        else:
            kind = "image/jpeg" if path.endswith("jpg") else "image/png"
            self._send(self._pictures.encoded(row), "200 OK", kind, fault=entry.fault)

    def _send(self, body: bytes, status: str, kind: str, *, fault: str | None = None) -> None:
        last = "Connection: close\r\n" if self._last or fault else ""
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{last}\r\n"
        self._transport.write(head.encode() + (body[: len(body) // 2] if fault else body))
        if fault == "stall":
            asyncio.get_running_loop().call_later(STALL_S, self._transport.abort)
        elif last:
            self._transport.close()


def bind(path: Path) -> tuple[socket.socket, bool]:
    """A listening socket on the port of the list at `path`, or on a free one if there is no list: (socket, is new).

    Raises OSError if the list's port is taken.
    """
    if path.exists():
        metadata = pq.read_schema(path).metadata or {}
        return _listen(int(metadata[_PORT_KEY])), False
    for port in random.sample(PORTS, 200):
        try:
            return _listen(port), True
        except OSError:
            continue
    raise OSError("no free port")


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen(512)
    except OSError:
        listening.close()
        raise
    return listening


class _ListedWorld(World):
    """Keeps its scenes, which are told when the list is made and drawn when they are asked for: some 2 KB each."""

    def scene(self, index: int, split: Split = "train") -> Scene:
        return _scene(self, index, split)


@cache
def _scene(world: World, index: int, split: Split) -> Scene:
    return World.scene(world, index, split)


def write_list(path: Path, world: World, plan: list[Planted], captions: int, port: int) -> None:
    """The list as Parquet, whole or not at all: a row for each caption, at most `captions` of a picture."""
    without = evaluation_texts(world) if captions > 1 else set[str]()  # lists of one caption stay as they always were
    told = [captions_of(world, entry, len(plan), captions, without) for entry in plan]
    columns = {
        "url": [f"http://{HOST}:{port}{e.path}" for e, some in zip(plan, told, strict=True) for _ in some],
        "caption": [caption for some in told for caption in some],
    }
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())], metadata={_PORT_KEY: str(port).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema), temporary)


def main() -> None:
    """Read the order, bind, write the list, say the port, serve until standard input ends."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    path = Path(order["list"])
    try:
        listening, is_new = bind(path)
    except OSError:
        taken = int((pq.read_schema(path).metadata or {})[_PORT_KEY]) if path.exists() else f"{PORTS}"
        print(json.dumps({"taken": taken}), flush=True)
        return
    world = _ListedWorld(order["seed"], order["held_out"])
    plan = planted(order["seed"], order["rows"])
    port = listening.getsockname()[1]
    if is_new:
        write_list(path, world, plan, order["captions"] or 1, port)
    print(json.dumps({"port": port}), flush=True)
    asyncio.run(_serve(listening, Pictures(world, plan)))


async def _serve(listening: socket.socket, pictures: Pictures) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(pictures), sock=listening, backlog=512)
    await server.serve_forever()


if __name__ == "__main__":
    main()
