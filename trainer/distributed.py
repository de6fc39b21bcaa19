"""One process per GPU: where this process stands, and the collective operations training needs. Used by stage.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..pipeline.core.errors import EclipseError, UsageError


class LostProcessError(EclipseError):
    """Another of the processes that train together is gone. What it says of itself, if anything, explains more."""


@dataclass(frozen=True)
class DistEnv:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """(B, D) on every process → (size·B, D) in rank order. Carries no gradient."""
        if self.size == 1:
            return rows
        everywhere = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(everywhere, rows.contiguous())
        return everywhere


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether this device has products of bfloat16 in hardware: Ampere cards and later.

    A CPU never counts. Some have them, but most emulate them at a fiftieth of float32's speed, and one card shall mean
    the same arithmetic on every CPU.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def describe(device: torch.device) -> str:
    """The card's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def under_launcher() -> bool:
    """Whether torchrun, or `spawn`, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def count_gpus(wanted: int | None) -> int:
    """GPUs of this machine to train on, 0 for the CPU; None: all there are. UsageError if there are fewer."""
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is not None and wanted > present:
        hint = "leave --gpus out to use what is there, or --gpus 0 for the CPU"
        raise UsageError(f"{wanted} GPUs asked for, {present} here", where="--gpus", hint=hint)
    return present if wanted is None else wanted


@contextmanager
def join(*, on_cpu: bool) -> Iterator[DistEnv]:
    """This process's place: alone, or RANK of WORLD_SIZE in a process group for as long as the block runs."""
    rank, size, local = (
        int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if not under_launcher():
        rank, size, local = 0, 1, 0
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local)
    if not on_cpu:
        torch.cuda.set_device(device)
    if size == 1:
        yield DistEnv(rank, size, device)
        return
    dist.init_process_group("gloo" if on_cpu else "nccl", device_id=None if on_cpu else device)
    try:
        dist.barrier()  # what the leading process removed before, is gone for all
        yield DistEnv(rank, size, device)
    except RuntimeError as error:
        # NCCL's errors are of a class of their own, gloo's are not.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise LostProcessError(
            "the connection to another training process broke: it ended, or its machine did",
            where=f"process {rank} of {size}",
            hint="see what the other process said; if it was killed for memory, lower train.microbatch; the same"
            " command continues from the last checkpoint",
        ) from error
    finally:
        dist.destroy_process_group()
