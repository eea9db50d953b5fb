"""How fast CelebA's images come: decoded anew, and out of the cache.

    python -m tests.benchmarks.celeba_loading [--images 4096] [--batch 256] [--workers 0 1]

JPEGs of the true format and of about the true sizes (noise over a smooth picture) are written into
a temporary folder. Printed are images a second of the training loader, the batches collated and in
float32, after a first round that warms the file system's cache; without workers of a second of
processor time.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lightning_flatmtl.data import CelebA
from tests.benchmarks.machine import describe
from tests.data.writers.celeba import face, write_celeba


def grainy(row: int, seed: int) -> torch.Tensor:
    """A picture whose JPEG is as large as that of a face, uint8 ``[3, 218, 178]``."""
    generator = torch.Generator().manual_seed(row)
    noise = torch.randint(-3, 4, (218, 178), generator=generator)
    return (face(row, seed).int() + noise).clamp(0, 255).to(torch.uint8)


def rate(data: CelebA) -> float:
    """Images a second of one round through the training data, the second one.

    Without workers it is a second of the processor, which other processes do not lengthen.
    """
    clock = time.perf_counter if data.num_workers else time.process_time
    loader = data.train_dataloader()
    for _ in range(2):
        begin = clock()
        images = sum(len(x) for x, _ in loader)
        seconds = clock() - begin
    return images / seconds


def main() -> None:
    """Print a line for each way to read them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        root = write_celeba(Path(folder), (arguments.images, 1, 1), picture=grainy)
        sizes = [path.stat().st_size for path in (root / "celeba/img_align_celeba").iterdir()]
        print(describe(1), f"{sum(sizes) / len(sizes) / 1000:.1f} kB an image")
        for workers in arguments.workers:
            for cache in (None, str(root / "cache")):
                data = CelebA(
                    str(root), cache=cache, batch_size=arguments.batch, num_workers=workers
                )
                data.prepare_data()
                data.setup()
                way = "cached" if cache else "decoded"
                print(f"{workers} workers, {way}: {rate(data):,.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
