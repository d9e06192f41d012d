"""Runs scenarios on every process that torchrun starts, and writes down how far each is from one process alone.

    torchrun --nproc-per-node 2 tests/distributed/worker.py FOLDER [more | SCENARIO ...]

FOLDER/SCENARIO.json gets a dictionary of figures, or {"error": traceback}. Every process compares with a reference of
its own; the largest error of all processes is written.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scenarios import ON_FOUR, SCENARIOS
from sharding import MORE
from steps import DEVICE


def run(name: str) -> dict[str, Any]:
    try:
        return (SCENARIOS | MORE | ON_FOUR)[name]()
    except Exception:
        # The other processes may wait for this one until their time is up.
        traceback.print_exc()
        return {"error": traceback.format_exc()}


def main() -> None:
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), [*MORE] if sys.argv[2:] == ["more"] else sys.argv[2:]
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", timeout=timedelta(seconds=60))
    for name in names or (SCENARIOS if dist.get_world_size() != 4 else SCENARIOS | ON_FOUR):
        start = time.perf_counter()
        result = run(name) | {"seconds": time.perf_counter() - start}
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, result)
        if dist.get_rank() == 0:
            failed = [other for other in everywhere if "error" in other]
            (folder / f"{name}.json").write_text(json.dumps((failed or everywhere)[0], indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
