"""The processes that share a step: one, data-parallel ones, sharded ones."""
