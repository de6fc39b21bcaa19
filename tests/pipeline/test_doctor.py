"""`eclipse doctor`: the real packages, the real machine, and stored features with and without damage."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eclipse.cli import app
from eclipse.pipeline.core.card import Card
from eclipse.pipeline.core.hub import size_text
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.doctor import TextTower, examine, text_tower
from shards import make_workspace, picture, write_shard
from synthetic_cache import Maker, write
from tiny_clip import TINY, make_clip
from tiny_decoders import save_tiny_kandinsky
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


def test_the_installation(elsewhere: Path):
    result = look("shapes")
    installation = found(result, "installation")
    for name in ("Python", "eclipse-prior"):
        assert installation[name]["state"] == "ok" and installation[name]["found"][0].isdigit()
    assert installation["[data]"]["state"] == installation["[train]"]["state"] == "ok"
    assert {"[ray]", "GPU"} <= set(installation)


def test_an_extra_that_is_not_installed_is_named_with_the_command(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "aiohttp" else find(name, *rest)
    )
    data = found(look("shapes"), "installation")["[data]"]
    assert data["state"] == "note" and "aiohttp" in data["found"] and '"eclipse-prior[data]"' in data["to_do"]


def test_the_machine(elsewhere: Path):
    machine = found(look("shapes"), "machine")
    assert {"CPU cores", "memory", "free disk", "open files"} <= set(machine)


def test_a_card_says_what_is_missing_and_what_to_do(elsewhere: Path):
    card = found(look("cc12m"), "card cc12m")
    assert card["URL list"]["state"] == "missing" and "eclipse cards cc12m" in card["URL list"]["to_do"]
    assert card["encoder"]["state"] == card["decoder"]["state"] == "missing"
    assert "eclipse embed" in card["encoder"]["to_do"] and "eclipse render" in card["decoder"]["to_do"]
    assert "they take 307 GB to 512 GB" in card["text states"]["to_do"]
    assert card["dimensions"] == {
        "state": "ok",
        "name": "dimensions",
        "found": "1280, of encoder and decoder",
        "to_do": "",
    }
    (elsewhere / "cc12m.tsv").write_text("url\tcaption\nhttp://example.org/1.jpg\ta cat\n")
    (elsewhere / "hub/models--laion--CLIP-ViT-bigG-14-laion2B-39B-b160k/snapshots/1/file").mkdir(parents=True)
    (elsewhere / "hub/models--kandinsky-community--kandinsky-2-2-decoder/snapshots/1/file").mkdir(parents=True)
    card = found(look("cc12m"), "card cc12m")
    assert {card[name]["state"] for name in ("URL list", "encoder", "decoder")} == {"ok"}


def test_every_card_is_examined_when_none_is_named(elsewhere: Path):
    titles = set(look()["checks"])
    assert {"card shapes", "card coco", "card cc3m", "card cc12m", "card laion_highres"} <= titles
    assert "workspace" not in titles


def test_text_towers_come_from_configs_alone():
    assert text_tower("ViT-bigG-14") == TextTower(width=1280, layers=32, embedding_dim=1280)
    assert text_tower("ViT-L-14") == TextTower(width=768, layers=12, embedding_dim=768)
    assert text_tower("no-such-model") is None


LIST = "url\tcaption\nhttp://example.org/1.jpg\ta cat\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LIST.replace("caption", "words").encode(), "no column caption; it has: url, words"),
        (LIST.replace("a cat", "").encode(), "none of the first 1000 pairs can be used: no_caption"),
        (LIST.replace("a cat", "une été").encode("latin-1") * 30, "not UTF-8"),
        (b"", "cannot read the URL list"),
    ],
)
def test_a_list_that_cannot_be_read_is_broken(elsewhere: Path, content: bytes, said: str):
    ws = make_workspace(elsewhere / "ws", make_clip(elsewhere / "clip"))
    card = ws.card.model_copy(update={"source": ws.card.source.model_copy(update={"urls": "list.tsv"})})
    card.dump(ws.card_path)
    (ws.root / "list.tsv").write_text(LIST)
    assert found(look(root=ws.root), "card test")["URL list"]["state"] == "ok"
    (ws.root / "list.tsv").write_bytes(content)
    line = found(look(root=ws.root), "card test")["URL list"]
    assert line["state"] == "broken" and said in line["to_do"]


@pytest.mark.parametrize("kind", ["webdataset", "table"])
def test_pictures_without_captions_are_broken(elsewhere: Path, kind: str):
    if kind == "table":
        pq.write_table(pa.table({"image": [picture(0)], "words": ["a cat"]}), elsewhere / "pictures.parquet")
        source = {"kind": "table", "table": str(elsewhere / "pictures.parquet")}
    else:
        write_shard(elsewhere / "0.tar", [("a", picture(0), ""), ("b", picture(1), "")])
        source = {"kind": "webdataset", "shards": str(elsewhere / "0.tar")}
    card = {"name": "test", "source": source, "encoder": {"model": "none"}, "decoder": {"path": "none"}}
    ws = Workspace.create(elsewhere / "ws", Card.model_validate(card))
    line = found(look(root=ws.root), "card test")["pictures"]
    assert line["state"] == "broken" and ("no column text" if kind == "table" else "no_caption") in line["to_do"]


def test_a_decoder_of_other_dimensions_than_the_encoder_is_broken(elsewhere: Path):
    ws = make_workspace(elsewhere / "ws", make_clip(elsewhere / "clip"))
    decoder = elsewhere / "decoder"
    (decoder / "unet").mkdir(parents=True)
    for dim, state in ((32, "ok"), (48, "broken")):
        (decoder / "unet" / "config.json").write_text(json.dumps({"encoder_hid_dim": dim}))
        section = ws.card.decoder.model_copy(update={"path": str(decoder)})
        ws.card.model_copy(update={"decoder": section}).dump(ws.card_path)
        line = found(look(root=ws.root), "card test")["dimensions"]
        assert line["state"] == state and str(dim) in line["found"]
    assert "32 dims, the decoder takes 48" in line["found"]


def test_text_states_of_another_width_than_the_embedding_are_broken(elsewhere: Path):
    config = {**TINY, "embed_dim": 48}
    ws = make_workspace(elsewhere / "ws", make_clip(elsewhere / "clip", config))
    section = ws.card.decoder.model_copy(update={"path": str(save_tiny_kandinsky(elsewhere / "d", embedding_dim=48))})
    ws.card.model_copy(update={"decoder": section}).dump(ws.card_path)
    line = found(look(root=ws.root), "card test")["dimensions"]
    assert line["state"] == "broken" and "token states of 32" in line["found"]


def test_a_disk_that_is_too_small_and_halves_on_a_cpu(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    card = found(look("cc12m"), "card cc12m")
    assert card["precision"]["found"] == "encoder.precision and train.precision: float32 on a CPU"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300 * 10**9))
    card = found(look("cc12m"), "card cc12m")
    assert card["disk"]["state"] == "missing" and "pictures" in card["disk"]["found"]
    assert card["disk"]["to_do"] == "300 GB are free: more disk, or embed --no-text-states"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3000 * 10**9))
    assert found(look("cc12m"), "card cc12m")["disk"]["state"] == "ok"


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


def test_files_of_a_stage_are_looked_at_and_those_known_by_size_alone_are_counted(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    ws = make_workspace(elsewhere / "ws", "ViT-L-14")
    (ws.prior / "final").mkdir(parents=True)
    monkeypatch.setattr("eclipse.pipeline.core.stage.DIGESTED_BYTES", 10)
    with ws.stage("train") as run:
        run.begin()
        for name in ("config.json", "weights.safetensors"):
            (ws.prior / "final" / name).write_bytes(b"8 bytes.")
        run.finish({})
    line = found(look(root=ws.root), "workspace")["files of train"]
    assert line["state"] == "ok" and line["found"].startswith("1 by SHA-256; 1 by size alone")
    (ws.prior / "final" / "config.json").write_bytes(b"8 bytes!")
    line = found(look(root=ws.root), "workspace")["files of train"]
    assert line["state"] == "broken" and "config.json has other content" in line["found"]


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
