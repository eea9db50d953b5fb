"""How a step enters Lightning: what is behind both hosts, manual and automatic. Nothing is public."""

__all__: list[str] = []
