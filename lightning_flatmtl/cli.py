"""The ``flatmtl`` command: a LightningCLI in which the package's class names are short."""

import sys

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

# Short class names resolve for what is imported.
import lightning_flatmtl.aggregators
import lightning_flatmtl.callbacks
import lightning_flatmtl.comparison
import lightning_flatmtl.data
import lightning_flatmtl.metrics
import lightning_flatmtl.models
import lightning_flatmtl.module
import lightning_flatmtl.sharpness
import lightning_flatmtl.task  # noqa: F401
from lightning_flatmtl import __version__
from lightning_flatmtl.comparison import RunRecord
from lightning_flatmtl.comparison.command import COMMANDS
from lightning_flatmtl.comparison.parent import end_with_parent
from lightning_flatmtl.hosting.cli_errors import (
    BriefParser,
    in_full,
    is_about_settings,
    refuse_briefly,
    root_cause,
)

__all__ = ["FlatMTLCLI", "main"]

_DESCRIPTION = (
    "flatmtl trains one network for several tasks, with PyTorch Lightning. A configuration says "
    "what the model and the data are; callbacks say how it is trained: an aggregator such as "
    "CAGrad combines the gradients of the tasks, TaskSAM makes the minima flat for every task. "
    "`flatmtl compare` trains several methods over several seeds and prints their table, `flatmtl "
    "tune` searches the best arguments of each, `flatmtl "
    "baselines` trains each task alone, `flatmtl methods` lists the methods. "
    "Try: flatmtl fit --config examples/multidigits/f_cagrad.yaml"
)


class FlatMTLCLI(LightningCLI):
    """LightningCLI for a :class:`~lightning_flatmtl.MultiTaskModule`, or any module, and its data.

    What is wrong with the arguments is said in a line or two, as is what a class says of the
    values that it is given; with ``FLATMTL_TRACEBACK=1`` in the environment, in full.

    Args:
        args: The arguments, as a list or a mapping; those of the command line by default.
        run: Whether to run the subcommand. If not, there is none among the arguments, and
            ``trainer``, ``model`` and ``datamodule`` are there to be used.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            # Without a logger's folder for every run, a test would stumble over the fit's file.
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"description": _DESCRIPTION},
            parser_class=BriefParser,
            args=args,
            run=run,
        )

    @override
    def instantiate_classes(self) -> None:
        """Build everything; what a constructor refuses is said as the constructor says it."""
        try:
            super().instantiate_classes()
        except Exception as error:
            cause = root_cause(error)
            if in_full():
                raise
            if self.subcommand is not None and is_about_settings(cause):
                refuse_briefly(str(cause), f"flatmtl {self.subcommand}")
            if cause is error:
                raise
            raise cause from None  # jsonargparse wraps it in what else the value could have been

    def before_fit(self) -> None:
        """Let a run of a comparison go on where it was broken off."""
        record = self._record
        if record is None:
            return
        end_with_parent()
        if not record.may_begin(self.trainer):
            sys.stderr.write(f"{record.folder.path}: it is done, or another process is at it.\n")
            raise SystemExit(RunRecord.ELSEWHERE)
        if record.resume_point is not None:
            self.config_init["fit"]["ckpt_path"] = str(record.resume_point)
            self.config_init["fit"]["weights_only"] = False  # our own file

    def after_fit(self) -> None:
        """Test what a run of a comparison has trained."""
        if self._record is not None:
            self._record.finish(self.trainer, self.model, self.datamodule)

    @property
    def _record(self) -> RunRecord | None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, RunRecord)), None)

    def before_predict(self) -> None:
        """Say it if nothing keeps what is predicted."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
            rank_zero_warn(
                "`flatmtl predict` throws its predictions away: none of the callbacks is a "
                "BasePredictionWriter. Add one, such as `--trainer.callbacks+="
                "predictions.SavePredictions` of examples/multidigits/predictions.py."
            )


def main(args: ArgsType = None) -> None:
    """Run ``flatmtl fit|validate|test|predict|compare|tune|baselines|methods``.

    A setting that is refused ends the command with status 2 and the reason, without a traceback.

    Args:
        args: The arguments; those of the command line by default.
    """
    given = sys.argv[1:] if args is None else args if isinstance(args, list) else []
    first = given[0] if given else None
    if first == "--version":
        sys.stdout.write(f"flatmtl {__version__}\n")
        return
    if first in COMMANDS:
        status = COMMANDS[first](given[1:])
        if status:
            sys.exit(status)
        return
    try:
        FlatMTLCLI(args)
    except MisconfigurationException as error:
        if in_full():
            raise
        refuse_briefly(str(error))
