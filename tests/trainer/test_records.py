"""What a run leaves in JSON, damaged: checkpoints fall back to the one before, figures lose the damaged line alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from eclipse.trainer.checkpoint import load_newest, save_checkpoint
from eclipse.trainer.guard import Guard
from eclipse.trainer.log import MetricsLog, draw_curves, read_metrics

STATE = {"fingerprint": "f", "rows": "3 rows", "guard": asdict(Guard()), "best": None}
TENSORS = {name: {"x": torch.ones(2)} for name in ("prior", "average", "optimizer")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (4, 8):
        save_checkpoint(tmp_path / "checkpoints", step, STATE, TENSORS, keep=2)
    return tmp_path / "checkpoints"


def changed(record: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**record, **changes})


def damages(record: dict[str, Any]) -> dict[str, str]:
    return {
        "list": "[]",
        "empty": "",
        "no step": json.dumps({key: value for key, value in record.items() if key != "step"}),
        "step": changed(record, step="8"),
        "state": changed(record, state=[]),
        "no guard": changed(record, state={key: value for key, value in STATE.items() if key != "guard"}),
        "guard": changed(record, state={**STATE, "guard": {"means": 1}}),
        "best": changed(record, state={**STATE, "best": "3"}),
        "checksums": changed(record, checksums=[]),
        "no checksums": changed(record, checksums={}),
        "foreign file": changed(record, checksums={"nowhere.safetensors": "crc32:0"}),
    }


@pytest.mark.parametrize("kind", damages({}))
def test_a_damaged_state_falls_back_to_the_checkpoint_before(folder: Path, kind: str) -> None:
    state = folder / "step-00000008" / "state.json"
    intact = load_newest(folder, print)
    assert intact is not None and intact.step == 8
    state.write_text(damages(json.loads(state.read_text()))[kind])
    said: list[str] = []
    found = load_newest(folder, said.append)
    assert found is not None and found.step == 4 and found.state == STATE
    assert "step-00000008 is damaged" in said[0] and "step-00000004" in said[0]


def test_damaged_figures_cost_their_own_line_alone(tmp_path: Path) -> None:
    good = [{"step": step, "kind": "train", "loss": 1 / step, "projection": None} for step in (1, 2, 3)]
    lines: list[bytes] = [json.dumps(line).encode() for line in good]
    bad = [b"[]", b"3", b'{"step": 2, "loss"', b'{"kind": "train"}', b'{"step": "2", "kind": "train"}', b"\xff\x00"]
    bad.append(b'{"step": 2, "kind": "train", "loss": "high"}')
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([lines[0], *bad, lines[1], b"", lines[2], b'{"step": 4, "ki']))
    assert read_metrics(path) == good
    draw_curves(path, tmp_path / "curves.png")
    with MetricsLog(tmp_path, 2) as log:
        log.add("train", 3, {"loss": 0.5})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 3
