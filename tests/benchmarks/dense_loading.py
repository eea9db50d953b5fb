"""How fast NYUv2 and Cityscapes are read, at true resolution.

    python -m tests.benchmarks.dense_loading [--images 64] [--workers 0 2] [--threads 1]

Writes synthetic packs (float64, as large as the real ones) into a temporary folder, and prints
images per second of the training loader, augmented, at the published batch sizes; the best of three
epochs after the first one, which starts the workers. The files lie in the page cache by then, so
the speed of a disk is not in the figures. Also printed: how long ``setup`` looks the files over and
the processor time of an image without workers, which a busy machine does not lengthen much.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from lightning_flatmtl.data import Cityscapes, NYUv2
from tests.benchmarks.machine import describe
from tests.data.writers import cityscapes, nyuv2


def seconds(batches: Iterable[object]) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def measure(data: NYUv2 | Cityscapes, workers: int) -> float:
    """Images per second."""
    data.num_workers = workers
    loader = data.train_dataloader()
    seconds(loader)
    return len(loader) * data.batch_size / min(seconds(loader) for _ in range(3))


def processor(data: NYUv2 | Cityscapes) -> float:
    """Milliseconds of processor time of an image, the least of three epochs."""
    data.num_workers = 0
    loader = data.train_dataloader()
    taken = []
    for _ in range(3):
        start = time.process_time()
        seconds(loader)
        taken.append((time.process_time() - start) / (len(loader) * data.batch_size) * 1e3)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64, help="training images of a pack")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, without workers")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(describe(given.threads))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        nyuv2.write(root / "nyuv2", train=given.images, val=2, size=(288, 384))
        cityscapes.write(root / "cityscapes", train=given.images, val=2, size=(128, 256))
        for kind in (NYUv2, Cityscapes):
            data = kind(str(root / kind.what.lower()), val_fraction=0)
            start = time.perf_counter()
            data.setup()
            looked = (time.perf_counter() - start) / (given.images + 2) * 1e3
            print(f"\n{kind.what}, batches of {data.batch_size}; setup {looked:.2f} ms per image")
            print(f"  processor time: {processor(data):.1f} ms per image")
            for workers in given.workers:
                print(f"  {workers} workers: {measure(data, workers):7.0f} images/s")


if __name__ == "__main__":
    main()
