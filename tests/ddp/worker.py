"""One of several processes: runs a job and saves what it returns."""

import logging
import os
import pkgutil
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is, and a folder that all see."""

    rank: int
    size: int
    folder: Path


def _follow(parent: int) -> None:
    """End with the process that has started this one, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(job: str, target: Path) -> None:
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    place = Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), target.parent)
    saved = pkgutil.resolve_name(job)(place)
    part = target.with_suffix(".part")
    torch.save(saved, part)
    part.rename(target)
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's own way out is where gloo likes to abort


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
