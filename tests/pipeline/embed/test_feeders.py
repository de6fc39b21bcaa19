"""The processes that read and decode for a GPU's lane, here beside a CPU's: same parts, no orphans, deaths noticed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from eclipse.pipeline.cache.part import part_name
from eclipse.pipeline.core.errors import EclipseError
from eclipse.pipeline.embed.fates import Fate
from eclipse.pipeline.embed.lane import Lane, LaneSpec
from eclipse.pipeline.embed.prepare import Feeders
from eclipse.pipeline.embed.tasks import Event, ShardDone, ShardFailed, ShardTask
from eclipse.pipeline.embed.writer import Picture
from eclipse.pipeline.images.decode import Sample
from eclipse.pipeline.images.shards import TarShard
from shards import good_samples, picture, write_shard
from tiny_clip import make_clip


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Lane:
    """Without feeders."""
    return LaneSpec(make_clip(tmp_path_factory.mktemp("clip")), None, "fp32", (), True, "").build("cpu")


@contextmanager
def fed(lane: Lane) -> Iterator[tuple[Lane, Feeders]]:
    other = Lane(lane.encoder, lane.heads, lane.meta, decoders=2)
    try:
        assert other._feeders is not None
        yield other, other._feeders
    finally:
        other.close()


def tasks_of(shards: list[Path], out: Path) -> list[ShardTask]:
    return [
        ShardTask(number, TarShard(shard), out / part_name(number), out / f"{number}.json", 8)
        for number, shard in enumerate(shards)
    ]


def test_the_parts_are_those_of_threads_byte_for_byte(lane: Lane, tmp_path: Path) -> None:
    """Good pictures, broken and too narrow ones, several captions, an empty shard, one that cannot be read; twice."""
    shards = [tmp_path / f"{number:05d}.tar" for number in range(4)]
    several = ("s", picture(5, (300, 200)), ["one caption", "another", "word " * 100])
    broken = [("b", b"no picture", "caption"), ("n", picture(6, (1200, 1)), "narrow"), ("m", None, "missing")]
    write_shard(shards[0], [*good_samples(0, 70), several, *broken])
    write_shard(shards[1], [])
    shards[2].mkdir()
    write_shard(shards[3], good_samples(3, 5))
    plain: list[Event] = []
    lane.run(tasks_of(shards, tmp_path / "plain"), plain.append)
    with fed(lane) as (other, _):
        for turn in ("first", "second"):
            events: list[Event] = []
            tasks = tasks_of(shards, tmp_path / turn)
            other.run(tasks, events.append)
            ends = [event for event in events if isinstance(event, ShardDone | ShardFailed)]
            assert ends == [event for event in plain if isinstance(event, ShardDone | ShardFailed)]
            assert [event.number for event in ends if isinstance(event, ShardFailed)] == [2]
            for number in (0, 1, 3):
                made, expected = (
                    hashlib.sha256((tmp_path / folder / part_name(number)).read_bytes()).hexdigest()
                    for folder in (turn, "plain")
                )
                assert made == expected, (turn, number)
            fate = Fate.load(tasks[0])
            assert fate is not None
            assert sorted(reject.reason for reject in fate.rejected) == ["no_picture", "too_narrow", "unreadable"]


def test_groups_that_wait_for_a_decoder_keep_their_pixels(lane: Lane, tmp_path: Path) -> None:
    """Seven groups and two decoders, all taken at the end: each picture still has its own pixels."""
    write_shard(tmp_path / "00000.tar", good_samples(0, 200))
    with fed(lane) as (_, feeders):
        groups = list(feeders.read(TarShard(tmp_path / "00000.tar")))
        decoded = [feeders.decode(items) for items in groups]
        found = [outcome for group in decoded for outcome in group.result()]
    samples = [item for items in groups for item in items]
    assert len(found) == len(samples) == 200
    for outcome, sample in zip(found, samples, strict=True):
        assert isinstance(outcome, Picture) and isinstance(sample, Sample)
        alone = lane._prepare([sample])[0]
        assert isinstance(alone, Picture)
        assert outcome.sample.key == sample.key and outcome.sample.data == b""
        assert (outcome.pixels == alone.pixels).all() and (outcome.thumbnail == alone.thumbnail).all()


@pytest.mark.parametrize("who", ["decoder", "reader"])
def test_a_killed_one_ends_the_lane_and_is_no_fault_of_a_shard(lane: Lane, tmp_path: Path, who: str) -> None:
    """Else every shard after it would fail, and be given up after three attempts."""
    shards = [write_shard(tmp_path / f"{n:05d}.tar", good_samples(n, 5)) or tmp_path / f"{n:05d}.tar" for n in range(6)]
    events: list[Event] = []
    with fed(lane) as (other, feeders):
        other.run(tasks_of(shards[:1], tmp_path / "before"), lambda event: None)
        for victim in feeders._processes[:-1] if who == "decoder" else feeders._processes[-1:]:
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(SystemExit, match="died"):
            other.run(tasks_of(shards, tmp_path / "after"), events.append)
    assert not [event for event in events if isinstance(event, ShardFailed)]


def test_what_cannot_be_read_is_said_and_the_next_shard_is_read(lane: Lane, tmp_path: Path) -> None:
    write_shard(tmp_path / "00001.tar", good_samples(1, 3))
    with fed(lane) as (_, feeders):
        with pytest.raises(EclipseError, match=r"cannot read the image shard[\s\S]*nowhere\.tar"):
            list(feeders.read(TarShard(tmp_path / "nowhere.tar")))
        assert [len(items) for items in feeders.read(TarShard(tmp_path / "00001.tar"))] == [3]


FEEDS = """
import sys, time
from eclipse.pipeline.embed.clip import Encoder
from eclipse.pipeline.embed.prepare import Feeders, Preparation
from eclipse.pipeline.images.shards import TarShard
encoder = Encoder.load(sys.argv[1])
feeders = Feeders(Preparation(encoder.preprocess, encoder.tokenize_captions), 2)
done = [feeders.decode(items) for items in feeders.read(TarShard(sys.argv[2]))]
for group in done:
    group.result()
print(*(process.pid for process in feeders._processes), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_they_end_with_the_lane_however_it_ends(lane: Lane, tmp_path: Path, how: signal.Signals) -> None:
    write_shard(tmp_path / "00000.tar", good_samples(0, 70))
    clip = lane.meta.encoder
    process = subprocess.Popen(
        [sys.executable, "-c", FEEDS, clip, str(tmp_path / "00000.tar")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()]
    assert len(children) == 3
    os.killpg(process.pid, signal.SIGINT) if how == signal.SIGINT else process.kill()  # Ctrl-C reaches all of them
    process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while left := [pid for pid in children if _lives(pid)]:
        assert time.monotonic() < deadline, f"orphans: {left}"
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
