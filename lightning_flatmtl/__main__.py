"""``python -m lightning_flatmtl`` is the ``flatmtl`` command."""

from lightning_flatmtl.cli import main

if __name__ == "__main__":
    main()
