"""`eclipse doctor`: the real packages, the real machine, and stored features with and without damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eclipse.cli import app
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.doctor import TextTower, examine, size_text, text_tower
from shards import make_workspace
from synthetic_cache import Maker, write
from tiny_clip import make_clip
from typer.testing import CliRunner


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def found(result: dict, title: str) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in result["checks"][title]}


def look(card: str | None = None, root: Path | None = None) -> dict:
    return examine(card, root, Progress(quiet=True))


def test_installation_and_machine(elsewhere: Path):
    result = look("shapes")
    installation, machine = found(result, "installation"), found(result, "machine")
    for name in ("Python", "torch", "open_clip_torch", "faiss-gpu", "img2dataset", "typer"):
        assert installation[name]["state"] == "ok" and installation[name]["found"][0].isdigit()
    assert {"ray", "faiss GPUs"} <= set(installation)
    assert {"CPU cores", "memory", "free disk", "open files"} <= set(machine)


def test_a_card_says_what_is_missing_and_what_to_do(elsewhere: Path):
    card = found(look("cc12m"), "card cc12m")
    assert card["URL list"]["state"] == "missing" and "eclipse cards cc12m" in card["URL list"]["to_do"]
    assert card["encoder"]["state"] == card["decoder"]["state"] == "missing"
    assert "eclipse embed" in card["encoder"]["to_do"] and "eclipse render" in card["decoder"]["to_do"]
    assert card["text states"]["found"] == "307 GB to 512 GB for 10,000,000 rows"
    (elsewhere / "cc12m.tsv").touch()
    (elsewhere / "hub/models--laion--CLIP-ViT-bigG-14-laion2B-39B-b160k/snapshots/1/file").mkdir(parents=True)
    (elsewhere / "hub/models--kandinsky-community--kandinsky-2-2-decoder/snapshots/1/file").mkdir(parents=True)
    card = found(look("cc12m"), "card cc12m")
    assert {card[name]["state"] for name in ("URL list", "encoder", "decoder")} == {"ok"}


def test_every_card_is_examined_when_none_is_named(elsewhere: Path):
    titles = set(look()["checks"])
    assert {"card shapes", "card coco", "card cc3m", "card cc12m", "card laion_highres"} <= titles
    assert "workspace" not in titles


def test_text_towers_come_from_configs_alone():
    assert text_tower("ViT-bigG-14") == TextTower(width=1280, layers=32)
    assert text_tower("ViT-L-14") == TextTower(width=768, layers=12)
    assert text_tower("no-such-model") is None


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 B"), (2.5e9, "2.5 GB"), (3.07e11, "307 GB"), (1.25e12, "1.25 TB")]
)
def test_sizes_read_well(size: float, text: str):
    assert size_text(size) == text


def test_damaged_features_are_named_and_fail_the_command(elsewhere: Path):
    maker = Maker()
    ws = write(elsewhere / "ws", [maker.row(number) for number in range(40)])
    assert found(look(root=ws.root), "workspace")["stored features"]["state"] == "ok"
    part = ws.embeddings / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    result = CliRunner().invoke(app, ["doctor", "-w", str(ws.root), "--json"])
    assert result.exit_code == 1
    damage = found(json.loads(result.stdout), "workspace")["stored features"]
    assert damage["state"] == "broken" and "part-00000.parquet" in damage["found"]


@pytest.mark.parametrize("kind", ["truncated", "garbage", "config"])
def test_damaged_weights_of_the_encoder_fail_the_command(elsewhere: Path, kind: str):
    ws = make_workspace(elsewhere / "ws", make_clip(elsewhere / "clip"))
    assert found(look(root=ws.root), "card test")["encoder"]["state"] == "ok"
    file = elsewhere / "clip" / "open_clip_model.safetensors"
    if kind == "config":
        file = file.with_name("open_clip_config.json")
        file.write_text("[]")
    else:
        file.write_bytes(file.read_bytes()[:-1] if kind == "truncated" else b"garbage" * 1000)
    result = CliRunner().invoke(app, ["doctor", "-w", str(ws.root), "--json"])
    assert result.exit_code == 1
    line = found(json.loads(result.stdout), "card test")["encoder"]
    assert line["state"] == "broken" and line["found"] == str(file) and "card" in line["to_do"]
