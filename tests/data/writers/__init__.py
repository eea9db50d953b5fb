"""Small data in the true on-disk formats of the benchmarks, a file for each."""
