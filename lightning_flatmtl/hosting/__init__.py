"""How a step enters Lightning: what is behind both hosts, manual and automatic."""
