"""Short stages stopped at every file operation they make, then run again: the same files, bit for bit, no others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from eclipse.bench.faults import Faults, compiler
from eclipse.bench.flips import try_bits
from learnable_cache import make_workspace as make_learnable
from shards import good_samples, make_workspace, write_shard
from tiny_clip import make_clip
from tiny_workspace import make_workspace as make_tiny

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C compiler, to build bench/faults.c")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    with Faults(tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.fixture
def base(faults: Faults, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A workspace in which the stage named by the parameter is to be run."""
    shutil.rmtree(faults.ws, ignore_errors=True)
    if request.param == "train":
        make_learnable(faults.ws, pictures=20, steps=2, batch_size=8, checkpoint_every=1, validate_every=2)
    elif request.param == "render":
        with make_tiny(faults.folder).stage("train") as run:
            run.begin()
            run.finish({})
    else:
        ws = make_workspace(faults.ws, make_clip(tmp_path / "clip"))
        write_shard(ws.images / "00000.tar", good_samples(0, 3))
        if request.param == "filter":
            assert (outcome := faults.run(["embed", "--quiet"])).code == 0, outcome.said
    shutil.copytree(faults.ws, tmp_path / "base")
    return tmp_path / "base"


# How far apart the points are that are taken; `python -m eclipse.bench.faults` takes every one, of every stage.
@pytest.mark.parametrize(
    ("base", "every"), [("filter", 1), ("render", 6), ("embed", 8), ("train", 25)], indirect=["base"]
)
def test_a_stage_stopped_anywhere_ends_as_if_it_never_had_been(
    faults: Faults, base: Path, every: int, request: pytest.FixtureRequest
) -> None:
    stage = request.node.callspec.params["base"]
    found = faults.stop_everywhere(
        stage, base, [stage, "--quiet", *(["a red cube"] if stage == "render" else [])], every=every
    )
    print(
        f"{stage}: {sum(found.points.values())} points {dict(found.points)}, {found.runs} runs, {found.resumed} resumed"
    )
    assert not found.wrong, "\n".join(found.wrong)
    assert {"rename", "fsync", "write", "create"} <= set(found.points) and found.runs >= 10


@pytest.mark.parametrize(
    ("base", "files", "step"),
    [
        ("filter", "embeddings/*", "filter"),
        ("filter", "logs/state/embed.json", "filter"),
        ("train", "embeddings/*", "train"),
        ("train", "selection.parquet", "train"),
        ("render", "prior/final/*", "render cube"),
        ("render", "logs/state/train.json", "render cube"),
    ],
    indirect=["base"],
)
def test_a_flipped_bit_is_noticed_by_name_or_changes_nothing(faults: Faults, base: Path, files: str, step: str) -> None:
    tally = try_bits(faults, base, files, step, bits=3)
    assert not tally.silent, "\n".join(tally.silent)
    assert tally.bits["named"] + tally.bits["harmless or mended"] == 3


def test_a_write_that_is_not_made_whole_is_found(faults: Faults, tmp_path: Path) -> None:
    """The check itself: a file changed, missing or left over after a resume does not pass."""
    from eclipse.bench.faults import contents, differences

    shutil.rmtree(faults.ws, ignore_errors=True)
    (faults.ws / "prior").mkdir(parents=True)
    (faults.ws / "prior" / "a.bin").write_bytes(b"whole")
    (faults.ws / "prior" / "b.bin").write_bytes(b"whole")
    wanted = contents(faults.ws)
    (faults.ws / "prior" / "a.bin").write_bytes(b"torn.")
    (faults.ws / "prior" / "b.bin").rename(faults.ws / "prior" / ".tmp-1-b.bin")
    told = differences(wanted, contents(faults.ws))
    assert told == "missing: prior/b.bin; left over: prior/.tmp-1-b.bin; different: prior/a.bin"
