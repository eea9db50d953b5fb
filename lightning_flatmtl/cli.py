"""The ``flatmtl`` command: a LightningCLI in which the package's class names are short."""

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType, LightningCLI

# Short class names resolve for what is imported.
import lightning_flatmtl.aggregators
import lightning_flatmtl.data
import lightning_flatmtl.metrics
import lightning_flatmtl.models  # noqa: F401
from lightning_flatmtl.module import MultiTaskModule

__all__ = ["FlatMTLCLI", "main"]


class FlatMTLCLI(LightningCLI):
    """LightningCLI for a :class:`~lightning_flatmtl.MultiTaskModule` and any data module.

    Args:
        args: The arguments, as a list or a mapping; those of the command line by default.
        run: Whether to run the subcommand. If not, there is none among the arguments, and
            ``trainer``, ``model`` and ``datamodule`` are there to be used.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            MultiTaskModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            # Without a logger's folder for every run, a test would stumble over the fit's file.
            save_config_kwargs={"overwrite": True},
            args=args,
            run=run,
        )


def main(args: ArgsType = None) -> None:
    """Run ``flatmtl fit|validate|test|predict``.

    Args:
        args: The arguments; those of the command line by default.
    """
    FlatMTLCLI(args)
