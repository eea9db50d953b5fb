"""What all benchmarks say and set about the machine."""

import os
import platform
import sys

import torch

__all__ = ["describe", "keep_large_blocks"]


def keep_large_blocks() -> None:
    """Start again with the C library's allocator told to keep large blocks.

    Else the page faults of fresh ones, a tenth of the time and very uneven, drown what is measured.
    glibc reads the settings when a process begins; those that it starts inherit them.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    if not settings.items() <= os.environ.items():
        os.environ.update(settings)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def describe(threads: int) -> str:
    """Version of torch, kind of processor, threads."""
    return f"torch {torch.__version__}, {platform.machine()}, {threads} thread(s)"
