"""What every section of a card is made of. Used by card.py and source.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

# Far above what anybody means, and below what the libraries behind a key break on.
MANY = 1_000_000_000
MAX_SEED = 2**32 - 1  # what torch's CPU generator reads of a seed
MAX_IMAGE_SIZE = 4096
MAX_DENOISING_STEPS = 1000  # the steps every published decoder was trained with


@dataclass(frozen=True)
class Decides:
    """Beside a key's type: the first stages whose outputs it decides. What is built on those follows."""

    stages: tuple[str, ...]


NOTHING = Decides(())  # speed, patience, records: whatever changes here, what was made stays as good as it was


class Section(BaseModel):
    """Base of every section: unknown keys and numbers that are not finite are refused; nothing changes once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)
    decides: ClassVar[tuple[str, ...]] = ()  # the first stages whose outputs keys of this section decide
