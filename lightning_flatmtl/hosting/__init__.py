"""How a step enters Lightning: what is behind both hosts, by hand and automatically.

Nothing here is public.
"""

__all__: list[str] = []
