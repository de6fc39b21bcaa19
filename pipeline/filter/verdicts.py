"""What selection.parquet says of some rows, for people. Called by `eclipse why` and `eclipse search`.

Training reads it through cache/store.read_selection, which holds it against the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..cache.store import REFILTER
from ..core.errors import EclipseError

if TYPE_CHECKING:
    import pyarrow.compute as pc

    from ..core.workspace import Workspace


def read_verdicts(ws: Workspace, where: pc.Expression, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows that meet a condition, as dicts of these columns, or of all. EclipseError if they are unreadable."""
    try:
        table = pq.read_table(ws.selection, columns=columns, filters=where, page_checksum_verification=True)
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise EclipseError(f"no readable selection: {error}", where=str(ws.selection), hint=REFILTER) from error
    return table.to_pylist()
