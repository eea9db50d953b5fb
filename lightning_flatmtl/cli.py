"""The ``flatmtl`` command: a LightningCLI in which the package's class names are short."""

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

# Short class names resolve for what is imported.
import lightning_flatmtl.aggregators
import lightning_flatmtl.data
import lightning_flatmtl.metrics
import lightning_flatmtl.models  # noqa: F401
from lightning_flatmtl.module import MultiTaskModule

__all__ = ["FlatMTLCLI", "main"]


class FlatMTLCLI(LightningCLI):
    """LightningCLI for a :class:`~lightning_flatmtl.MultiTaskModule` and any data module."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": "lightning_flatmtl.MultiTaskModule"}})


def main(args: ArgsType = None) -> FlatMTLCLI:
    """Run ``flatmtl fit|validate|test|predict``.

    Args:
        args: The arguments; those of the command line by default.
    """
    return FlatMTLCLI(
        MultiTaskModule,
        LightningDataModule,
        trainer_class=Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        args=args,
    )
