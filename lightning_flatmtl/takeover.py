"""What an existing module may ask while it is taken over."""

from lightning_flatmtl.hosting.automatic import TakeOver, host_of, second_pass

__all__ = ["TakeOver", "host_of", "second_pass"]
