"""Parquet pages as raw memory: maps a file, finds the values of a PLAIN page in it, checks its CRC. Used by store.py.

An uncompressed PLAIN page of required values ends with those values, bit for bit as they lie in memory; levels, if
any, come before. Format: https://parquet.apache.org/docs/file-format/data-pages, page headers in Thrift compact form.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:  # the same CRC-32 some five times faster, with a processor's own instructions
    from zlib_ng.zlib_ng import crc32
except ImportError:  # a training node may have torch, numpy, pyarrow and safetensors alone
    from zlib import crc32

DATA_PAGE, PLAIN = 0, 0  # PageType.DATA_PAGE and Encoding.PLAIN of parquet.thrift
HEADER_ROOM = 256  # bytes; headers without statistics take about 30
MADV_WILLNEED = 3
READ_AHEAD = 128 << 10  # bytes; Linux may ignore what a single request asks beyond its read-ahead size

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One column of one row group, as the footer describes it: where its single page starts, its bytes, its values."""

    offset: int
    size: int
    values: int


@dataclass(frozen=True, slots=True)
class Page:
    """The one data page of a chunk: its body is `start`..`end` of the file; `crc` covers it, None if not written."""

    start: int
    end: int
    crc: int | None


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, (size,) uint8, read-only and unread until touched. Raises OSError.

    Python's own mmap keeps a file descriptor for as long as it lives, and a cache has thousands of parts; the mapping
    made here keeps none. It is dropped with the last array that looks into it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Whoever shortens a mapped file in place kills its readers with SIGBUS. Parts are never written in place: a new
        # one is renamed over the old, and a mapping keeps the old file's pages for as long as it lives.
        size = os.fstat(descriptor).st_size
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address is None or address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(descriptor)
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, size)
    mapped = np.ctypeslib.as_array(memory)
    mapped.flags.writeable = False
    return mapped


def will_need(values: np.ndarray, first: np.ndarray, end: np.ndarray) -> None:
    """Ask the kernel to read rows first[i]..end[i] of a page's values in the background, all at once."""
    address, width = values.ctypes.data, values.shape[1]
    starts = address + first * width
    starts -= starts % mmap.PAGESIZE
    sizes = address + end * width - starts
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        for piece in range(0, size, READ_AHEAD):
            _libc.madvise(start + piece, min(READ_AHEAD, size - piece), MADV_WILLNEED)


def find_page(mapped: np.ndarray, chunk: Chunk) -> Page:
    """The page of `chunk`. Raises ValueError unless it is one raw PLAIN data page that fills the chunk exactly."""
    try:
        header, length = _read_struct(mapped[chunk.offset : chunk.offset + HEADER_ROOM].tobytes(), 0)
        kind, raw_size, size, data = header[1], header[2], header[3], header[5]
        values, encoding = data[1], data[2]
        crc = None if (signed := header.get(4)) is None else signed & 0xFFFFFFFF
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("no page header where the footer says") from error
    if (kind, encoding) != (DATA_PAGE, PLAIN) or raw_size != size:
        raise ValueError("its page is not plain and uncompressed")
    start = chunk.offset + length
    if start + size != chunk.offset + chunk.size or values != chunk.values or start + size > len(mapped):
        raise ValueError("its page does not have the length that the footer says")
    return Page(start, start + size, crc)


def page_values(mapped: np.ndarray, chunk: Chunk, rows: int, width: int) -> np.ndarray:
    """The tail of the chunk's page as (rows, width) uint8, zero-copy; `width` is the bytes of one row."""
    # Counted from the page's end: what comes before is levels, whose encoding and length are the writer's choice. So
    # the start may be odd: numpy reads float16 that is not aligned, and what leaves the store is a copy.
    page = find_page(mapped, chunk)
    if page.end - page.start < rows * width:
        raise ValueError(f"its page is too short for {rows} rows of {width} bytes")
    return mapped[page.end - rows * width : page.end].reshape(rows, width)


def page_is_intact(mapped: np.ndarray, page: Page) -> bool:
    """Whether the page's body still has the CRC-32 written with it; a page without one counts as damaged."""
    return page.crc is not None and crc32(mapped[page.start : page.end].data) == page.crc


def _read_struct(data: bytes, at: int) -> tuple[dict, int]:
    """One Thrift compact struct: {field id: int | bytes | dict} and where it ends. Lists and doubles do not occur."""
    fields: dict = {}
    field = 0
    while (head := data[at]) != 0:
        at += 1
        delta, kind = head >> 4, head & 0x0F
        if delta == 0:
            raise ValueError("no page header where the footer says")
        field += delta
        if kind in (1, 2):  # booleans live in the head
            fields[field] = kind == 1
        elif kind in (4, 5, 6):  # integers: zigzag varints
            raw, at = _read_varint(data, at)
            fields[field] = (raw >> 1) ^ -(raw & 1)
        elif kind == 8:
            length, at = _read_varint(data, at)
            fields[field] = data[at : at + length]
            at += length
        elif kind == 12:
            fields[field], at = _read_struct(data, at)
        else:
            raise ValueError("no page header where the footer says")
    return fields, at + 1


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
