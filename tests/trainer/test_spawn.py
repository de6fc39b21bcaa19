"""Processes of one machine: their places, what they return, how they fail and stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import spawned
from eclipse.pipeline.core.errors import EclipseError, Terminated
from eclipse.trainer.distributed import LostProcessError
from eclipse.trainer.spawn import spawn


def test_each_process_knows_its_place_and_the_first_answers() -> None:
    assert spawn(spawned.place, 2, 10) == {"RANK": 10, "LOCAL_RANK": 10, "WORLD_SIZE": 12}


def test_the_error_meant_for_the_user_is_the_one_raised() -> None:
    with pytest.raises(EclipseError, match="this part is damaged"):
        spawn(spawned.fail_on_rank_1, 2)


def test_a_killed_process_is_named() -> None:
    with pytest.raises(EclipseError, match="process 1 ended without a word"):
        spawn(spawned.die_on_rank_1, 2)


def test_a_process_killed_amid_a_collective_is_one_message_on_the_others() -> None:
    """On the machine of the killed one its end is named; elsewhere (torchrun), that the connection broke."""
    with pytest.raises(EclipseError, match="process 1 ended without a word"):
        spawn(spawned.die_amid_a_collective, 2)
    with pytest.raises(LostProcessError, match="the connection to another training process broke") as error:
        spawn(spawned.fail_amid_a_collective, 2)
    assert "process 0 of 2" in str(error.value.where)


def test_sigterm_reaches_all_and_is_waited_for(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def terminate() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(Terminated):
        spawn(spawned.stop_when_told, 2, str(started))
