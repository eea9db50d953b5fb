"""Solver times against TorchJD, one thread, the Gram given.

    pip install "torchjd[full]"
    python -m tests.benchmarks.aggregators [--repeats 9]

For m = 3, 9 and 40 tasks a method is called on the Gram of random gradients (some conflicting), in
turn with TorchJD's weighting on the same Gram; the ratio is taken pair by pair and its median
printed. TorchJD's NashMTL and ConFIG have no form that takes a Gram; they get a square root of it,
an m x m matrix, as Jacobian. MGDA prints both objectives. Methods that TorchJD has not are timed
alone.
"""

import os

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # read when NumPy is imported

# ruff: noqa: E402
import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from lightning_flatmtl import functional

SIZES = (3, 9, 40)


def order(m: int) -> Tensor:
    return torch.rand(m, m, generator=torch.Generator().manual_seed(0)).argsort(dim=1)


OURS: dict[str, Callable[[Tensor], Tensor]] = {
    "MGDA": functional.min_norm_weights,
    "PCGrad": lambda k: functional.pcgrad_weights(k, order(len(k))),
    "CAGrad": lambda k: functional.cagrad_weights(k, 0.4),
    "IMTLG": functional.imtl_g_weights,
    "NashMTL": functional.nash_weights,
    "UPGrad": functional.upgrad_weights,
    "GradVac": lambda k: (
        functional.gradvac_weights(k, order(len(k)), torch.zeros(len(k), len(k))).weights
    ),
    "AlignedMTL": functional.aligned_mtl_weights,
    "FairGrad": functional.fairgrad_weights,
    "ConFIG": functional.config_weights,
}


def theirs(m: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """TorchJD's weightings; empty if it is not installed."""
    try:
        from torchjd import aggregation as t
    except ImportError:
        return {}

    def on_root(aggregator: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda k: aggregator(torch.linalg.cholesky(k))

    return {
        "MGDA": t.MGDAWeighting(),
        "PCGrad": t.PCGradWeighting(),
        "CAGrad": t.CAGradWeighting(c=0.4),
        "IMTLG": t.IMTLGWeighting(),
        "NashMTL": on_root(t.NashMTL(n_tasks=m, optim_niter=20)),
        "UPGrad": t.UPGradWeighting(),
        "GradVac": t.GradVacWeighting(),
        "AlignedMTL": t.AlignedMTLWeighting(),
        "FairGrad": t.FairGradWeighting(alpha=2.0),
        "ConFIG": on_root(t.ConFIG()),
    }


def gram(m: int, seed: int) -> Tensor:
    """Gram of m gradients around a common direction, with norms within a factor of ten."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, 4 * m, dtype=torch.float64, generator=g) + 0.3
    rows *= 10 ** torch.rand(m, 1, dtype=torch.float64, generator=g)
    return rows @ rows.T


def microseconds(function: Callable[[Tensor], Tensor], grams: list[Tensor]) -> float:
    start = time.perf_counter()
    for k in grams:
        function(k)
    return 1e6 * (time.perf_counter() - start) / len(grams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        peer = version("torchjd")
    except PackageNotFoundError:
        peer = "not installed"
    print(f"torch {torch.__version__}, TorchJD {peer}, {platform.machine()}, one thread")
    print("median microseconds of a call: ours / TorchJD's (median of the paired ratios)")
    print(f"{'method':12}" + "".join(f"{f'm = {m}':>32}" for m in SIZES))
    grams = {m: [gram(m, seed) for seed in range(5)] for m in SIZES}
    for name, ours in OURS.items():
        cells = []
        for m in SIZES:
            other = theirs(m).get(name)
            microseconds(ours, grams[m])
            a, b = [], []
            for _ in range(repeats):
                a.append(microseconds(ours, grams[m]))
                if other is not None:
                    b.append(microseconds(other, grams[m]))
            cell = f"{statistics.median(a):.0f}"
            if b:
                ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
                cell += f" / {statistics.median(b):.0f} ({ratio:.1f}x)"
            cells.append(f"{cell:>32}")
        print(f"{name:12}" + "".join(cells), flush=True)
    if theirs(3):
        print("MGDA's objective, TorchJD's over ours, largest of five matrices:")
        for m in SIZES:
            worst = 1.0
            for k in grams[m]:
                w, v = functional.min_norm_weights(k), theirs(m)["MGDA"](k)
                worst = max(worst, ((v @ k @ v) / (w @ k @ w)).item() ** 0.5)
            print(f"  m = {m}: {worst:.4f} in norm")


if __name__ == "__main__":
    main()
