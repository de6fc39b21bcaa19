"""Files that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eclipse.pipeline.core.files import atomic_path, write_json


def test_atomic_path_replaces_files_and_directories_whole(tmp_path: Path):
    target = tmp_path / "deep" / "file.txt"
    for text in ("first", "second"):
        with atomic_path(target) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".txt"
        assert target.read_text() == text
    for name in ("a", "b"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "deep", "file.txt", "folder"]


def test_atomic_path_keeps_the_old_file_on_an_error(tmp_path: Path):
    target = tmp_path / "file.json"
    write_json(target, {"good": 1})
    with pytest.raises(TypeError):
        write_json(target, {"bad": object()})
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(target.read_text()) == {"good": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
