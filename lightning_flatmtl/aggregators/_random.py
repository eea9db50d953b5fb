"""Private random numbers: drawn on the CPU, so that all ranks agree, and saved with the run."""

import torch

__all__ = ["private_generator"]


def private_generator(seed: int) -> torch.Generator:
    """A generator of its own on the CPU.

    Raises:
        ValueError: If ``seed`` is negative or not an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be an integer >= 0, got {seed!r}.")
    return torch.Generator(device="cpu").manual_seed(seed)
