"""Members of a tar that anyone may have written or broken: bounded reads, no hang, damage named. Used by images.py."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..core.files import require_regular

MEMBER_LIMIT = 256 << 20  # bytes; a header may claim anything
READ_AHEAD = 1 << 20  # bytes: members are read one after the other
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of the tar."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that gives no file: name as far as it is known, and why."""

    name: str
    reason: str


def is_remote(address: Path | str) -> bool:
    """Whether it is a URL for fsspec, and not a path."""
    return "://" in str(address)


@contextmanager
def opened(address: Path | str, read_ahead: int = -1) -> Iterator[tuple[BinaryIO, int]]:
    """A file to read and seek in, and its size in bytes. Raises OSError if there is none.

    read_ahead: bytes that a local file is read in; -1: few, for reading here and there.
    """
    if not is_remote(address):
        require_regular(Path(address))
        with Path(address).open("rb", buffering=read_ahead) as file:
            yield file, os.fstat(file.fileno()).st_size
        return
    import fsspec

    try:
        with fsspec.open(str(address), "rb") as file:
            yield cast(BinaryIO, file), int(file.size)  # type: ignore[union-attr]
    except (ImportError, ValueError, TypeError) as error:  # of a protocol that needs another package, or is none
        raise OSError(str(error)) from error


def members(address: Path | str) -> Iterator[Member | Damage]:
    """Every regular file in tar order, and a Damage for what cannot be read. Directories are passed over.

    After a damaged header reading goes on at the next one that is whole. Raises OSError if the file cannot be opened.
    """
    with opened(address, READ_AHEAD) as (file, size):
        if size == 0:
            return
        try:
            # A parser of our own for plain headers took a quarter of tarfile's time; all of it is 0.1 ms per picture,
            # where decoding one takes milliseconds. ignore_zeros also skips blocks that are no header, which is how
            # tarfile finds the next whole one.
            archive = tarfile.open(fileobj=cast(Any, _Bounded(file, size)), mode="r:", ignore_zeros=True)  # noqa: SIM115
        except Exception as error:  # tarfile raises whatever its parsing of broken headers runs into
            yield Damage("", _reason(error))
            return
        yield from _read(archive, size)


def _read(archive: Any, size: int) -> Iterator[Member | Damage]:
    expected = 0  # where the next header should start
    while True:
        try:
            info = archive.next()
        except Exception as error:
            yield Damage("", _reason(error))
            return
        if info is None:
            break
        archive.members = []  # tarfile remembers every member otherwise
        if info.offset < expected or info.size < 0:  # broken sizes can lead backwards, and round in circles
            yield Damage(info.name, "damaged_tar")
            return
        if _holds_data(archive, expected, info.offset):
            yield Damage("", "damaged_tar")
        expected = info.offset_data + (-(-info.size // _BLOCK) * _BLOCK if info.isreg() else 0)
        if info.isdir():
            continue
        yield _member(archive, info, size)
    if _holds_data(archive, expected, size):
        yield Damage("", "damaged_tar")


def _member(archive: Any, info: tarfile.TarInfo, size: int) -> Member | Damage:
    if not info.isreg() or info.issparse():
        return Damage(info.name, "not_a_file")
    if info.size > MEMBER_LIMIT:
        return Damage(info.name, "too_large")
    if info.offset_data + info.size > size:
        return Damage(info.name, "cut_short")
    archive.fileobj.seek(info.offset_data)
    return Member(info.name, archive.fileobj.read(info.size))


def _holds_data(archive: Any, start: int, end: int) -> bool:
    """Whether anything but zeros lies between two members."""
    file = archive.fileobj
    file.seek(start)
    while start < end:
        block = file.read(min(end - start, 1 << 20))
        if not block:
            return False
        if block.strip(b"\0"):
            return True
        start += len(block)
    return False


def _reason(error: Exception) -> str:
    return "cut_short" if "unexpected end" in str(error) or "truncated" in str(error) else "damaged_tar"


class _Bounded:
    """A file whose reads never ask for more than it holds: headers claim sizes that would fill the memory.

    It knows its place: asking the file takes a system call, and tarfile asks six times a member.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._place = file.tell()

    def read(self, n: int = -1) -> bytes:
        left = max(self._size - self._place, 0)
        data = self._file.read(left if n < 0 else min(n, left))
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset != self._place:
            self._place = self._file.seek(offset, whence)
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        self._file.close()
