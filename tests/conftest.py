"""What holds for every test: no cluster but its own, Ctrl-C as on a terminal; what needs a GPU is skipped elsewhere.

Such tests say so with `@pytest.mark.cuda`.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; bench/gpu.py runs it where there is one"))


@pytest.fixture(scope="session", autouse=True)
def own_ray_folder() -> Iterator[None]:
    """Ray notes its running cluster in a folder of the machine: one that was killed there would be waited for."""
    folder = tempfile.mkdtemp(prefix="ray-")  # sockets lie in it, whose paths must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> Iterator[None]:
    """A shell's job in the background starts with SIGINT ignored, and so would every process that a test starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
