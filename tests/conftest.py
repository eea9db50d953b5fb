"""Settings of all tests."""

import torch

# Nets of a few hundred parameters gain nothing from threads and lose much to busy neighbours.
torch.set_num_threads(1)
