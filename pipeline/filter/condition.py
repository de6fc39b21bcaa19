"""A condition over the columns of a part, written in SQL: `filter.keep_where`; called by rules.py.

polars' SQL reader makes an expression over columns of it; nothing runs as code. But a query within a condition may
name a file, which polars opens already when it parses (`width IN (SELECT a FROM read_csv('/etc/passwd'))`). A card is
no place for that: words that begin a query are refused before polars sees them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ..cache.vectors import chunks
from ..core.errors import UsageError

if TYPE_CHECKING:
    from ..cache.store import Store

HINT = "such as: width >= 200 AND caption NOT LIKE '%http%'"
AT_ONCE = 1 << 20  # rows
_LITERAL = re.compile(r"'[^']*'")  # a doubled quote within one makes it two, which leaves the same words outside
# In literals too for the first: whatever a dialect may think of quotes, nothing is read without one of these.
_QUERY = re.compile(r"\b(select|read_\w+|scan_\w+)\b", re.IGNORECASE)
_QUERY_OUTSIDE = re.compile(r"\b(from|table|values|with|union|into)\b|\$|--|/\*|[;`]", re.IGNORECASE)


def holds(condition: str, store: Store, rows: np.ndarray) -> np.ndarray:
    """Whether the condition is true for each of `rows`, (n,) bool; null is not true.

    Raises UsageError for what is no condition, no column, or does not give true or false for each row by itself.
    """
    import polars as pl

    plain = ["uid", "key", "url", "caption", "width", "height", "n_tokens", "clip_score", *store.meta.head_scores]
    where = f"filter.keep_where: {condition}"
    if query := _QUERY.search(condition) or _QUERY_OUTSIDE.search(_LITERAL.sub("''", condition)):
        raise UsageError(f"a condition, not a query: {query[0]} is not allowed in it", where=where, hint=HINT)
    try:
        expression = pl.sql_expr(condition)
        names = expression.meta.root_names()
    except Exception as error:  # of many classes, for all that can be wrong with a text
        raise UsageError(f"no condition in SQL: {error}", where=where, hint=HINT) from None
    if missing := [name for name in names if name not in plain]:
        what = f"no column {missing[0]} to filter by; there are {', '.join(plain)}"
        raise UsageError(what, where=where, hint=HINT)
    if not names:
        raise UsageError("a condition that names no column", where=where, hint=HINT)
    result = np.empty(len(rows), bool)
    for some in chunks(len(rows), AT_ONCE):
        frame = pl.DataFrame({name: pl.from_arrow(store.column(name, rows[some])) for name in names})
        try:
            values = frame.select(expression.alias("keep"))["keep"]
        except pl.exceptions.PolarsError as error:
            raise UsageError(f"this condition cannot be computed: {error}", where=where, hint=HINT) from None
        if values.dtype != pl.Boolean or len(values) != len(frame):
            found = f"{values.dtype}, {len(values):,} values for {len(frame):,} rows"
            raise UsageError(f"this gives no true or false for each row, but {found}", where=where, hint=HINT)
        result[some] = values.fill_null(False).to_numpy()
    return result
