"""What became of every input of one image shard, kept in its part's footer. Written by lanes, added up by stage.py."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints

from ..cache.part import PartMeta, read_account, read_part
from ..core.errors import EclipseError
from ..core.files import require_regular, sealed, unsealed
from ..images.rejects import Reject
from .tasks import ShardTask


@dataclass
class Fate:
    """The account of one shard: inputs = rows + rejected, or something was lost."""

    tar: str
    content: str
    inputs: int = 0
    rows: int = 0
    truncated: int = 0  # captions cut to the context length
    rejected: list[Reject] = field(default_factory=list)

    def check(self) -> None:
        """Raise EclipseError if an input got neither a row nor a reason."""
        if self.inputs != self.rows + len(self.rejected):
            raise EclipseError(
                f"{self.inputs} inputs gave {self.rows} rows and {len(self.rejected)} rejects: some have no fate",
                where=self.tar,
                hint="this is a fault of eclipse: please report it with the shard",
            )

    def to_dict(self) -> dict[str, Any]:
        return sealed(asdict(self))

    @classmethod
    def load(cls, task: ShardTask) -> Fate | None:
        """The account in the part's footer, or the file that older versions kept beside it.

        None if there is none that can be read: then the shard is embedded again.
        """
        try:
            data = read_account(task.part)
            if data is None:
                require_regular(task.fate)
                data = json.loads(task.fate.read_text(encoding="ascii"))
            data = unsealed(data)
            fate = cls(**{**data, "rejected": [Reject(**reject) for reject in data["rejected"]]})
        except (EclipseError, OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return fate if all(map(_well_typed, (fate, *fate.rejected))) else None


def _well_typed(record: Fate | Reject) -> bool:
    """Whether the plain fields of a record read from JSON are of their types."""
    plain = {name: kind for name, kind in get_type_hints(type(record)).items() if kind in (str, int)}
    return all(type(getattr(record, name)) is kind for name, kind in plain.items())


def finished(task: ShardTask, meta: PartMeta) -> Fate | None:
    """The account of a shard whose part is on disk and whole, None if it is to be embedded (again).

    Raises EclipseError if the part is whole but was made with other settings: nothing is ever mixed in.
    """
    if not task.part.exists():
        return None
    fate = Fate.load(task)
    try:
        part = read_part(task.part)
    except EclipseError:
        if task.part.is_dir():  # which no new part could replace
            raise
        return None
    if changes := _differences(part.meta, meta):
        raise EclipseError(
            f"this part was made with other settings: {'; '.join(changes)}",
            where=str(task.part),
            hint="undo the change, use another workspace, or start over with `eclipse embed --overwrite`",
        )
    if fate is None or fate.rows != part.rows or fate.content != task.shard.content():
        return None
    return fate


def _differences(before: PartMeta, after: PartMeta) -> list[str]:
    old, new = asdict(before), asdict(after)
    named = {"encoder_fingerprint": "weights of the encoder", "card": "source or encoder section of the card"}
    return [
        f"{named.get(key, key)} ({str(old[key])[:40]} → {str(new[key])[:40]})" for key in old if old[key] != new[key]
    ]
