"""The forward passes of a step, and what they borrow of the module."""
