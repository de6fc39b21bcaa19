"""clip-retrieval's inference on some tars, timed. Run by embed_peer.py with the Python of clip-retrieval's environment.

Its own worker, as its command runs it; the model is loaded and warmed up beforehand, into the cache that it looks in.
"""

from __future__ import annotations

import json
import os
import sys
import time

from all_clip import load_clip  # pyright: ignore[reportMissingImports]
from clip_retrieval.clip_inference.worker import worker  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Argument: {"tars", "output", "model", "batch", "workers"} as JSON. Last line printed: {"seconds", "cpu"}."""
    job = json.loads(sys.argv[1])
    loading = {"clip_model": job["model"], "use_jit": False, "warmup_batch_size": job["batch"], "clip_cache_path": None}
    load_clip(**loading)
    began, used = time.perf_counter(), _cpu_seconds()
    worker(
        tasks=[0],
        input_dataset=job["tars"],
        output_folder=job["output"],
        output_partition_count=1,
        input_format="webdataset",
        batch_size=job["batch"],
        num_prepro_workers=job["workers"],
        enable_metadata=True,  # ours keeps key and URL as well
        clip_model=job["model"],
        use_jit=False,
    )
    print(json.dumps({"seconds": time.perf_counter() - began, "cpu": _cpu_seconds() - used}))


def _cpu_seconds() -> float:
    """Of this process and of the DataLoader's workers that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
