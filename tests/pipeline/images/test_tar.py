"""Members of a tar: the short way for plain headers gives what tarfile gives, in every format."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.images.decode import read_shard
from eclipse.pipeline.images.shards import TarShard, picture_files
from eclipse.pipeline.images.tar import Member, members

NAMES = ["00000.jpg", "00000.txt", "dir/übung.jpg", "a" * 99, "b" * 100, "c" * 140 + "/" + "d" * 90, "e" * 300, "empty"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5e9 + 0.25])
def test_every_format_reads_like_tarfile(tmp_path: Path, format: int, mtime: float) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for i, name in enumerate(NAMES):
            if format == tarfile.USTAR_FORMAT and len(name) > 250:
                continue
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "empty" else int(rng.integers(1, 2000))
            info.mtime = mtime if format == tarfile.PAX_FORMAT else int(mtime)
            tar.addfile(info, io.BytesIO(rng.bytes(info.size)))
            if i == 3:
                folder = tarfile.TarInfo("folder")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
    with tarfile.open(path) as tar:
        expected = [(m.name, file.read()) for m in tar if (file := tar.extractfile(m)) is not None]
    found = list(members(path))
    assert [(m.name, m.data) for m in found if isinstance(m, Member)] == expected
    assert len(found) == len(expected)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        list(members(path))
    with pytest.raises(EclipseError, match="cannot read the image shard: not a regular file"):
        list(read_shard(path))
    with pytest.raises(EclipseError, match="cannot read the image shard: not a regular file"):
        TarShard(path).content()
    assert list(picture_files({0: TarShard(path)}, [(0, "x")])) == []
