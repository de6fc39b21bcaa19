"""Tests that need a GPU say so with `@pytest.mark.cuda`; elsewhere they are skipped, by name of the reason."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; bench/gpu.py runs it where there is one"))
