"""Opening a cache of very many parts: time and memory, in a process of its own.

Run: python -m eclipse.bench.opening
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from .made_cache import make_cache
from .results import arguments, hardware, record, table

ROWS_A_PART, DIM = 4, 1280
OPEN = """
import resource, sys, time
from eclipse.pipeline.cache.store import Store
held = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, began = held(), time.perf_counter()
store = Store.open(sys.argv[1])
print(time.perf_counter() - began, (held() - before) / 2**20, len(store.parts))
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", type=int, default=1000)
    options = parser.parse_args()
    machine, lines = hardware(), []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        make_cache(directory, options.parts * ROWS_A_PART, DIM, part_rows=ROWS_A_PART)
        for turn in ("first process", "second process"):
            done = subprocess.run([sys.executable, "-c", OPEN, scratch], capture_output=True, text=True, check=True)
            seconds, memory, parts = map(float, done.stdout.split())
            lines.append([turn, f"{parts:,.0f}", f"{seconds:.2f} s", f"{memory:.1f} MiB"])
    body = table(["Store.open, footers in page cache", "parts", "time", "memory gained"], lines)
    settings = {"rows a part": ROWS_A_PART, "D": DIM}
    record("python -m eclipse.bench.opening", "Opening", body, settings, machine, options.results)


if __name__ == "__main__":
    main()
