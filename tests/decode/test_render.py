"""The render stage end to end on untrained models of the real classes: files, resuming, settings, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from eclipse.decode import render as module
from eclipse.decode.kandinsky import KandinskyDecoder
from eclipse.decode.render import render
from eclipse.pipeline.core.errors import EclipseError, UsageError
from eclipse.pipeline.core.progress import Progress
from eclipse.pipeline.core.sections import Scheduler
from eclipse.pipeline.core.workspace import Workspace
from PIL import Image
from records import forget
from tiny_workspace import DIM, make_workspace, save_tiny_prior

QUIET = Progress(quiet=True)
SCHEDULERS = get_args(Scheduler)
TEXTS = ["a red dog", "two cats / a hat"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("render"))


@pytest.fixture
def ws(made: Workspace, tmp_path: Path) -> Workspace:
    """A workspace of its own; the models are shared, and so is one rendering where a test asks for it."""
    shutil.copytree(made.root, tmp_path / "ws")
    return Workspace.open(tmp_path / "ws")


def short(ws: Workspace) -> Workspace:
    """The same workspace with one prompt in its card, so that the stage is quick."""
    ws.card.model_copy(update={"render": ws.card.render.model_copy(update={"prompts": TEXTS[:1]})}).dump(ws.card_path)
    return Workspace.open(ws.root)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(folder).as_posix(): np.asarray(Image.open(path)).astype(int)
        for path in sorted(folder.rglob("*.png"))
        if path.name != "contact_sheet.png"
    }


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Same files, same pictures; batches of other sizes may round a level apart."""
    return a.keys() == b.keys() and all(np.abs(a[name] - b[name]).max() <= 1 for name in a)


def test_the_stage_renders_the_world_once_and_says_so(ws: Workspace) -> None:
    summary = render(ws, QUIET)
    folder = Path(summary["folder"])
    assert (summary["prompts"], summary["pictures"], summary["made"]) == (48, 48, 48)
    assert 0 <= summary["right"] <= 1
    assert len(pixels(folder)) == 48
    page = Path(summary["gallery"]).read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 48
    assert page.count('data-verdict="wrong"') + page.count('data-verdict="right"') >= 48
    assert "orange square" in page
    with Image.open(summary["contact_sheet"]) as sheet:
        assert sheet.width > 1000
    assert render(ws, QUIET) == {**summary, "already_complete": True}


def test_a_reference_prior_draws_the_world_s_prompts_once_more(ws: Workspace, tmp_path: Path) -> None:
    """Beside the first picture of each prompt, with its seed; what a user asks for is drawn by one prior alone."""
    other = save_tiny_prior(tmp_path / "other", seed=4)
    named = ws.card.evaluate.model_copy(update={"reference": str(other)})
    ws.card.model_copy(update={"evaluate": named}).dump(ws.card_path)
    ws = Workspace.open(ws.root)
    summary = render(ws, QUIET)
    assert (summary["prompts"], summary["pictures"], summary["made"]) == (48, 96, 96)
    assert 0 <= summary["right_reference"] <= 1
    shown = pixels(Path(summary["folder"]))
    alone = render(ws, QUIET, prior=str(other), out=tmp_path / "alone")
    assert alone["pictures"] == 48 and "right_reference" not in alone
    theirs = {name.replace("samples/", "reference/"): x for name, x in pixels(tmp_path / "alone").items()}
    assert equal({name: x for name, x in shown.items() if name.startswith("reference/")}, theirs)
    page = Path(summary["gallery"]).read_text(encoding="utf-8")
    assert page.count('class="reference"') == 48 and "seen compositions, reference prior" in page
    one = next(Path(summary["folder"], "reference").iterdir())
    with Image.open(one) as image, Image.open(tmp_path / "alone" / "samples" / one.name) as same:
        assert image.info["prior"] == same.info["prior"] and image.info["seed"] == same.info["seed"]
    one.unlink()
    forget(ws, "render")
    assert render(ws, QUIET)["made"] == 1


def test_what_a_picture_was_made_with_travels_in_it(ws: Workspace) -> None:
    texts = ["a königin, 日本"]
    summary = render(ws, QUIET, prompts=texts, samples=1)
    manifest = json.loads(Path(summary["folder"], "manifest.json").read_text())
    (path,) = [Path(summary["folder"], name) for name in manifest["files"]]
    with Image.open(path) as image:
        assert image.size == (64, 64)
        assert image.info["prompt"] == texts[0]
        assert image.info["prior"] == manifest["settings"]["prior"] != "text"
        assert int(image.info["seed"]) >= 0


def test_geneval_t2i_and_dpg_layouts(ws: Workspace, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    entries = [{"prompt": text, "tag": "colors", "include": [{"class": "dog"}]} for text in TEXTS]
    prompts.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    geneval = Path(render(ws, QUIET, prompts=prompts, layout="geneval")["folder"])
    assert sorted(p.name for p in geneval.iterdir() if p.is_dir()) == ["00000", "00001"]
    assert json.loads((geneval / "00001" / "metadata.jsonl").read_text()) == entries[1]
    assert len(list((geneval / "00001" / "samples").iterdir())) == 4

    out = tmp_path / "t2i"
    render(ws, QUIET, prompts=prompts, layout="t2i-compbench", samples=2, out=out)
    names = sorted(path.name for path in (out / "samples").iterdir())
    assert names[0] == "a red dog_000000.png" and names[-1] == "two cats   a hat_000003.png" and len(names) == 4

    folder = tmp_path / "dpg"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"item{i}.txt").write_text(text)
    grids = pixels(Path(render(ws, QUIET, prompts=folder, layout="dpg")["folder"]))
    flat = pixels(Path(render(ws, QUIET, prompts=TEXTS, samples=4)["folder"]))
    first = [flat[name] for name in sorted(flat)][:4]
    grid = np.concatenate([np.concatenate(first[:2], axis=1), np.concatenate(first[2:], axis=1)])
    assert np.abs(grids["samples/item0.png"] - grid).max() <= 1


def test_an_interrupted_rendering_ends_in_the_same_pictures(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pixels(Path(render(ws, QUIET, prompts=TEXTS, samples=3, out=ws.root / "whole")["folder"]))
    write_batch = module._write_batch

    def stops(job: Any, batch: Any, images: Any, missing: Any) -> None:
        write_batch(job, batch[:2], images, missing)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        render(ws, QUIET, prompts=TEXTS, samples=3)
    monkeypatch.undo()
    folder = ws.renders / "custom-flat"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("samples/*.png")}
    assert len(before) == 2
    (folder / "samples" / ".tmp-1-half.png").write_bytes(b"half")
    summary = render(ws, QUIET, prompts=TEXTS, samples=3)
    assert summary["made"] == 4
    found = pixels(folder)
    assert found.keys() == whole.keys() and all((found[name] == whole[name]).all() for name in whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(folder.rglob(".tmp-*"))


def test_a_batch_that_exhausts_the_memory_is_halved(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same pictures; a card's batch size is kept to, and changing it makes nothing stale."""
    plain, sizes = KandinskyDecoder.decode, []

    def decode(decoder: KandinskyDecoder, embedding: torch.Tensor, **options: object) -> list[Image.Image]:
        sizes.append(len(embedding))
        if len(embedding) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(decoder, embedding, **options)  # type: ignore[arg-type]

    undisturbed = render(ws, QUIET, prompts=TEXTS[:1], samples=6, out=ws.root / "plain")
    monkeypatch.setattr(KandinskyDecoder, "decode", decode)
    section = ws.card.decoder.model_copy(update={"batch_size": 5})
    ws.card.model_copy(update={"decoder": section}).dump(ws.card_path)
    halved = render(Workspace.open(ws.root), QUIET, prompts=TEXTS[:1], samples=6, out=ws.root / "halved")
    assert sizes == [5, 2, 2, 2]
    assert equal(pixels(Path(undisturbed["folder"])), pixels(Path(halved["folder"])))
    again = render(Workspace.open(ws.root), QUIET, prompts=TEXTS[:1], samples=6, out=ws.root / "plain")
    assert again["already_complete"]


def test_settings_are_never_mixed_in_a_folder(ws: Workspace) -> None:
    out = ws.root / "pictures"
    first = render(ws, QUIET, prompts=TEXTS, samples=1, out=out)
    assert render(ws, QUIET, prompts=TEXTS, samples=1, out=out)["already_complete"] is True
    with pytest.raises(UsageError, match=r"guidance_scale: 2\.0 → 1\.0") as error:
        render(ws, QUIET, prompts=TEXTS, samples=1, out=out, guidance_scale=1.0)
    assert error.value.where == str(out)
    before = pixels(out)
    (out / "mine.txt").write_text("keep me")
    again = render(ws, QUIET, prompts=TEXTS[:1], samples=1, out=out, guidance_scale=1.0, overwrite=True)
    assert (first["pictures"], again["pictures"]) == (2, 1)
    assert len(pixels(out)) == 1 and not equal(before, pixels(out))
    assert (out / "mine.txt").read_text() == "keep me"


def test_a_folder_of_somebody_else_is_left_alone(ws: Workspace, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "photo.png").write_bytes(b"x")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="did not make"):
            render(ws, QUIET, prompts=TEXTS, out=tmp_path / "theirs", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["photo.png"]


def test_another_prior_and_the_raw_text_embedding_make_other_pictures(ws: Workspace, tmp_path: Path) -> None:
    other = save_tiny_prior(tmp_path / "other", seed=1)
    pictures = [
        pixels(Path(render(ws, QUIET, prompts=TEXTS, samples=1, prior=prior, out=tmp_path / f"{i}")["folder"]))
        for i, prior in enumerate([None, str(other), "text"])
    ]
    assert not equal(pictures[0], pictures[1]) and not equal(pictures[0], pictures[2])


def test_karlo_reads_the_prompt_unless_it_is_blanked(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path, kind="karlo")
    plain, blank = (
        pixels(Path(render(ws, QUIET, prompts=TEXTS, samples=1, out=tmp_path / f"{b}", blank_decoder_text=b)["folder"]))
        for b in (False, True)
    )
    assert len(plain) == 2 and not equal(plain, blank)


def test_what_is_missing_is_named_and_nothing_is_left(ws: Workspace, tmp_path: Path) -> None:
    with pytest.raises(EclipseError, match="the prior has embedding dim 48"):
        wide = str(save_tiny_prior(tmp_path / "wide", dim=DIM + 16))
        render(ws, QUIET, prompts=TEXTS, out=tmp_path / "a", prior=wide)
    assert not list((tmp_path / "a").rglob("*.png"))
    assert render(ws, QUIET, prompts=TEXTS, out=tmp_path / "a", samples=1)["made"] == 2  # an empty start is no setting
    shutil.rmtree(ws.prior)
    with pytest.raises(EclipseError, match="there is no prior") as error:
        render(ws, QUIET)
    assert error.value.hint and "eclipse train" in error.value.hint
    assert not (ws.renders / "default").exists()


def test_a_new_prior_replaces_the_stages_own_pictures(ws: Workspace) -> None:
    card = ws.card.model_copy(update={"render": ws.card.render.model_copy(update={"prompts": TEXTS})})
    card.dump(ws.card_path)
    ws = Workspace.open(ws.root)
    before = pixels(Path(render(ws, QUIET)["folder"]))
    save_tiny_prior(ws.prior / "final", seed=2)
    forget(ws, "render")
    after = pixels(Path(render(ws, QUIET)["folder"]))
    assert len(after) == 2 and not equal(before, after)


def test_what_cannot_work_is_refused_before_anything_is_removed(ws: Workspace, tmp_path: Path) -> None:
    ws = short(ws)
    folder = Path(render(ws, QUIET)["folder"])
    (tmp_path / "p.txt").write_text("a dog\n")
    before = contents(ws.root)
    for options, said in (
        ({"scheduler": "euler"}, "unknown scheduler 'euler'"),
        ({"scheduler": ""}, "unknown scheduler"),
        ({"guidance_scale": float("inf")}, "a guidance scale of inf"),
        ({"guidance_scale": float("nan")}, "a guidance scale of nan"),
        ({"steps": 5000}, "5000 denoising steps"),
        ({"blank_decoder_text": True}, "kandinsky22 decoder reads no text"),
        ({"prior": "nothere"}, "no such prior"),
        ({"prior": ""}, "no such prior"),
        ({"prior": "./not/there"}, "no such prior"),
        ({"prior": str(ws.card_path)}, "a file, not the directory of a prior"),
        ({"prompts": tmp_path / "none.txt"}, "no such prompts file"),
    ):
        with pytest.raises(UsageError, match=said):
            render(ws, QUIET, overwrite=True, out=folder, **options)
        with pytest.raises(UsageError, match=said):
            render(ws, QUIET, out=tmp_path / "new", **options)
    assert contents(ws.root) == before and not (tmp_path / "new").exists()


def test_old_pictures_outlive_a_prior_or_decoder_that_cannot_be_loaded(ws: Workspace, tmp_path: Path) -> None:
    ws = short(ws)
    render(ws, QUIET)
    config, card = ws.prior / "final" / "config.json", ws.card
    whole = config.read_bytes()
    config.write_bytes(b'{"_class_name": ')
    before = contents(ws.root)
    with pytest.raises(EclipseError, match="cannot read the prior's config"):
        render(ws, QUIET, overwrite=True)
    with pytest.raises(EclipseError, match="cannot read the prior's config"):
        render(ws, QUIET, prompts=TEXTS, out=tmp_path / "new")
    assert contents(ws.root) == before and not (tmp_path / "new").exists()
    config.write_bytes(whole)
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "gone", "no such decoder"),
        (ws.card_path, "a file, not the directory of a decoder"),
        (tmp_path / "empty", "weights cannot be loaded"),
    ):
        card.model_copy(update={"decoder": card.decoder.model_copy(update={"path": str(path)})}).dump(ws.card_path)
        before = contents(ws.root)
        with pytest.raises(EclipseError, match=said):
            render(Workspace.open(ws.root), QUIET, overwrite=True)
        assert contents(ws.root) == before


def test_a_damaged_manifest_is_named_and_replaced_on_demand(ws: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    render(ws, QUIET, prompts=TEXTS, samples=1, out=out)
    shutil.copytree(out, tmp_path / "theirs")
    (out / "samples" / "photo.png").write_bytes(b"mine")
    for damage in ("", '{"settings": ', "[]", "[" * 100_000, '{"settings": {}, "files": [7], "summary": null}'):
        (out / "manifest.json").write_text(damage)
        before = contents(out)
        with pytest.raises(EclipseError, match="manifest") as error:
            render(ws, QUIET, prompts=TEXTS[:1], samples=1, out=out)
        assert error.value.where == str(out / "manifest.json") and "--overwrite" in str(error.value.hint)
        assert contents(out) == before
    summary = render(ws, QUIET, prompts=TEXTS[:1], samples=1, out=out, overwrite=True)
    assert summary["made"] == 1 and len(list((out / "samples").iterdir())) == 2
    assert (out / "samples" / "photo.png").read_bytes() == b"mine"
    assert render(ws, QUIET, prompts=TEXTS[:1], samples=1, out=out)["already_complete"] is True
    # A manifest that is not ours stays, --overwrite or not.
    shutil.rmtree(tmp_path / "theirs" / "samples")
    (tmp_path / "theirs" / "manifest.json").write_text('{"name": "a web page"}')
    before = contents(tmp_path / "theirs")
    with pytest.raises(EclipseError, match="unreadable manifest"):
        render(ws, QUIET, prompts=TEXTS, samples=1, out=tmp_path / "theirs", overwrite=True)
    assert contents(tmp_path / "theirs") == before


def test_karlo_has_a_schedule_of_its_own(tmp_path: Path) -> None:
    ws = make_workspace(tmp_path, kind="karlo")
    for options, said in (({"scheduler": "ddim"}, "scheduler of its own"), ({"steps": 1}, "1 denoising steps")):
        with pytest.raises(UsageError, match=said):
            render(ws, QUIET, prompts=TEXTS, **options)
    assert not ws.renders.exists()


def test_size_scheduler_and_negative_prompt(ws: Workspace) -> None:
    plain = pixels(Path(render(ws, QUIET, prompts=TEXTS, width=128)["folder"]))
    assert {picture.shape for picture in plain.values()} == {(64, 128, 3)}
    away = render(ws, QUIET, prompts=TEXTS, width=128, negative_prompt="ugly", out=ws.root / "away")
    assert not equal(plain, pixels(Path(away["folder"])))
    for path in Path(away["folder"], "samples").iterdir():
        with Image.open(path) as image:
            assert image.info["negative_prompt"] == "ugly"
    made = [
        pixels(Path(render(ws, QUIET, prompts=TEXTS[:1], scheduler=name, steps=4)["folder"])) for name in SCHEDULERS
    ]
    assert len({next(iter(pictures.values())).tobytes() for pictures in made}) == len(SCHEDULERS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 100}, "multiples of 64"),
        ({"negative_prompt": "ugly", "guidance_scale": 1.0}, "no effect"),
        ({"scheduler": "euler"}, "unknown scheduler"),
        ({"prompt_column": "x"}, "has columns"),
    ],
)
def test_what_cannot_be_rendered_is_said_at_once(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(module, "_load", lambda *_: pytest.fail("loaded a model"))
    with pytest.raises(UsageError, match=said):
        render(ws, QUIET, prompts=TEXTS, **options)
