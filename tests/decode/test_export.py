"""Exports: their files and card, what they spare, and the hub, which is a stand-in that the real client talks to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from eclipse.decode.export import FILES, describe, export_prior, push_prior, read_record
from eclipse.pipeline.core import hub as client
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace
from eclipse.pipeline.run import locate
from fake_hub import fake_hub, hub_environment
from records import finish
from tiny_workspace import DIM, make_workspace

QUIET = Progress(quiet=True)
SUMMARIES: dict[str, dict[str, Any]] = {
    "download": {"rows": 100, "rejected": {"http_404": 7}, "folder": "/secret/place"},
    "embed": {"rows": 93, "rejected": {}},
    "filter": {"rows": 93, "kept": 80, "rejected": {"exact_copy": 13}},
    "train": {"train_rows": 76, "validation_rows": 4, "seconds": 1.5, "device": "1 × CPU", "curves": "/secret/place"},
    "evaluate": {"accuracy": {"color": {"prior_seen": 0.75, "oracle_seen": 1.0}}, "report": "/secret/place"},
}


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    ws = make_workspace(tmp_path)
    for stage, summary in SUMMARIES.items():
        finish(ws, stage, summary=summary)
    return ws


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_an_export_says_what_it_is_and_how_it_was_made(ws: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = export_prior(ws, out, QUIET)
    assert summary["files"] == sorted({*FILES} - {"gallery.png"})
    text = (out / "README.md").read_text()
    assert front_matter(text)["pipeline_tag"] == "text-to-image"
    for said in (
        "rows of the list | 100",
        "http 404 | −7",
        "exact copies | −13",
        "pairs trained on | 76",
        "| color | 0.75 |",
    ):
        assert said in text
    record = read_record(out)
    assert record is not None and record.encoder == ws.card.encoder.model
    assert record.stages["train"] == {"train_rows": 76, "validation_rows": 4, "seconds": 1.5, "device": "1 × CPU"}
    assert "/secret" not in text + (out / "eclipse.json").read_text()


def test_an_export_is_replaced_on_demand_and_nothing_else_is(ws: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_prior(ws, out, QUIET)
    with pytest.raises(UsageError, match="an export already"):
        export_prior(ws, out, QUIET)
    (out / ".gitattributes").write_text("theirs")
    (out / "README.md").write_text("by hand")
    export_prior(ws, out, QUIET, overwrite=True)
    assert (out / ".gitattributes").read_text() == "theirs" and (out / "README.md").read_text() == "by hand"
    export_prior(ws, out, QUIET, overwrite=True)
    assert (out / "README.md").read_text() == "by hand"
    (out / "notes.txt").touch()
    with pytest.raises(UsageError, match="no export"):
        export_prior(ws, out, QUIET, overwrite=True)


def test_what_is_published_names_no_directory_of_this_machine(ws: Workspace, tmp_path: Path) -> None:
    assert str(tmp_path) in json.dumps(describe(ws, DIM, public=False))
    text = json.dumps(describe(ws, DIM, public=True))
    assert str(tmp_path) not in text and '"local-dir:clip"' in text


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"encoder": 3}', '{"name": "x", "encoder": {"model": 1, "pretrained": null}}'):
        (tmp_path / "eclipse.json").write_text(text)
        with pytest.raises(EclipseError, match="unreadable record"):
            read_record(tmp_path)


def test_a_dry_run_sends_nothing(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "unreachable", lambda: pytest.fail("asked the network"))
    summary = push_prior(ws, "me/prior", QUIET, dry_run=True)
    assert summary["sent"] is False and summary["files"]["diffusion_pytorch_model.safetensors"] > 1000
    assert 'eclipse.load("me/prior")' in summary["model_card"]
    with pytest.raises(UsageError, match="no repository's id"):
        push_prior(ws, "prior", QUIET, dry_run=True)


def test_rendering_outside_a_workspace_takes_the_prior_s_own_card(
    ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_prior(ws, tmp_path / "out", QUIET)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="its decoder is a directory"):  # no path from a file is followed
        locate(None, None, QUIET, prior="out")
    record = json.loads((tmp_path / "out" / "eclipse.json").read_text())
    record["card"]["decoder"]["path"] = "{models}/decoder"
    (tmp_path / "out" / "eclipse.json").write_text(json.dumps(record))
    made = locate(None, None, QUIET, prior="out")
    assert made.root == tmp_path / "eclipse-tiny-pictures" and made.card.encoder == ws.card.encoder
    assert locate(None, ws.root, QUIET, prior="out").root == ws.root
    with pytest.raises(UsageError, match="no workspace here"):
        locate(None, None, QUIET)
    (tmp_path / "out" / "eclipse.json").unlink()
    with pytest.raises(UsageError, match=r"no eclipse\.json with this prior"):
        locate(None, None, QUIET, prior="out")


PUSH_AND_LOAD = """
import sys, eclipse
from pathlib import Path
from eclipse.decode.export import push_prior
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.workspace import Workspace

ws, encoder = Workspace.open(Path(sys.argv[1])), sys.argv[2]
print(push_prior(ws, "me/prior", Progress(quiet=True))["address"])
for repo, options in (("me/prior", {}), ("me/none", {}), ("me/other", {})):
    try:
        eclipse.load(repo, **options)
    except EclipseError as error:
        print(error.what)
try:
    push_prior(ws, "me/other", Progress(quiet=True))
except EclipseError as error:
    print(error.what)
there = eclipse.load("me/prior", encoder=encoder)
here = eclipse.open(ws.root).prior()
print((there("a red dog").image_embeds == here("a red dog").image_embeds).all().item())
"""


def test_a_prior_travels_through_the_hub(ws: Workspace, tmp_path: Path) -> None:
    with fake_hub() as hub:
        hub.repos["me/other"] = {"model.bin": b"theirs"}
        command = [sys.executable, "-c", PUSH_AND_LOAD, str(ws.root), ws.card.encoder.model]
        environment = {**os.environ, **hub_environment(hub, tmp_path / "hf")}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        address, *refused, equal = result.stdout.splitlines()
        assert address == hub.url("me/prior") and equal == "True"
        assert "local-dir:clip, of the machine it was trained on" in refused[0]  # no path from a file is followed
        assert "no such prior" in refused[1] and "no config.json" in refused[2] and "did not send" in refused[3]
        assert hub.repos["me/other"] == {"model.bin": b"theirs"}
        assert len(hub.uploaded) == 1 and str(tmp_path) not in json.dumps([*map(repr, hub.repos["me/prior"].items())])
        assert front_matter(hub.cards[0])["library_name"] == "eclipse-prior"


def test_a_hub_that_refuses_or_does_not_answer_is_said_once(ws: Workspace, tmp_path: Path) -> None:
    code = PUSH_AND_LOAD.split("for repo")[0]
    load = "import eclipse\neclipse.load('me/prior')"
    with fake_hub() as hub:
        environment = {**os.environ, **hub_environment(hub, tmp_path / "hf", HF_TOKEN="hf_wrong")}
        command = [sys.executable, "-c", code, str(ws.root), ws.card.encoder.model]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert "EclipseError: the hub refuses: no token" in result.stderr and not hub.repos
    gone = {**environment, "HF_ENDPOINT": hub.url()}  # nobody listens there any more
    result = subprocess.run([sys.executable, "-c", load], env=gone, capture_output=True, text=True, check=False)
    assert "me/prior is not on this machine, and the hub cannot be reached" in result.stderr
    assert "of unknown size" in result.stderr and str(tmp_path / "hf") in result.stderr and "Retry" not in result.stderr
