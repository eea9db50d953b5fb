"""The task gradients: measured, perturbed, aggregated, handed to Lightning."""
