"""The columns of the task Jacobian: shared block, heads, features, shards."""
