"""A model of encoder and heads: the heads' second pass runs on the clean features."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_flatmtl.engine.errors import FlatMTLError
from lightning_flatmtl.engine.partition import reached_parameters
from lightning_flatmtl.engine.passes.base import Passes, plain
from lightning_flatmtl.engine.passes.inputs import Inputs
from lightning_flatmtl.engine.passes.state_guards import ModuleSnapshot

__all__ = ["ComposedPasses"]


class ComposedPasses(Passes):
    """For a model of encoder and heads: the clean features are kept for the heads' second pass.

    Args:
        encode: Maps a batch to features.
        task_loss: Maps task, features and batch to the task's loss, or ``None`` when the batch has
            nothing for the task.
        batches: The batch of each task; tasks with the same object share one encoder pass.
        module: See :class:`Passes`.
        around: See :class:`Passes`.
        at_features: Whether the task Jacobian is to be taken at the encoder's output.
        several: Whether the model has several tasks, of which this batch may lack some.
    """

    def __init__(
        self,
        encode: Callable[[Any], Any],
        task_loss: Callable[[str, Any, Any], Tensor | None],
        batches: Mapping[str, Any],
        module: nn.Module,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        at_features: bool = False,
        several: bool = False,
        count: Callable[[str], float] | None = None,
    ) -> None:
        super().__init__(module, around, count)
        self.at_features = at_features
        self._several = several
        self._encode = encode
        self._task_loss = task_loss
        self._batches = batches
        self._inputs: dict[int, Inputs] = {}
        self._altered: set[int] = set()
        self._features: dict[int, Any] = {}
        self._versions: dict[int, list[int]] = {}
        self._trunk: set[Tensor] = set()
        self._before_head: dict[str, ModuleSnapshot] = {}

    @override
    def planned(self) -> tuple[int, list[str]]:
        return len({id(batch) for batch in self._batches.values()}), sorted(self._batches)

    def clean(self) -> dict[str, Tensor]:
        """One encoder pass for each distinct batch, one head pass for each task."""
        losses: dict[str, Tensor] = {}
        graphed: dict[int, Any] = {}
        layers = None
        if self._start is not None:
            layers = list(self._module.named_modules())
            self._inputs = {id(batch): Inputs(batch) for batch in self._batches.values()}
            for inputs in self._inputs.values():
                inputs.take()  # the clean pass gets the batches themselves
        for task, batch in self._batches.items():
            key = id(batch)
            if key not in graphed:
                features = self._record(key, partial(self._encode, batch))
                if self.at_features:
                    features = pytree.tree_map_only(Tensor, _apart, features)
                graphed[key] = features
                self._versions[key] = _versions(graphed[key])
                if key in self._inputs and self._inputs[key].altered():
                    self._altered.add(key)
            if self._start is not None:  # heads are going to be run by themselves
                self._before_head[task] = ModuleSnapshot(self._module, layers)
            loss = self._record(task, partial(self._task_loss, task, graphed[key], batch))
            if loss is not None:
                losses[task] = plain(loss)
        self._keep(graphed)
        return losses

    def _keep(self, graphed: dict[int, Any]) -> None:
        for key, features in graphed.items():
            tensors = _tensors(features)
            leaves = reached_parameters(tensors)
            self._trunk |= leaves
            # Features by task may come from branches; what all tasks read is shared by all.
            if self._several and not isinstance(features, Mapping):
                self.common |= leaves
            self._features[key] = pytree.tree_map_only(Tensor, _kept, features)
        if not self.at_features or not graphed:
            return
        if len(graphed) > 1:
            raise ValueError(
                "With `gradients='features'` all tasks must share their inputs, got "
                f"{len(graphed)} different inputs in a batch. Use `gradients='parameters'`."
            )
        self.features = [t for t in tensors if t.requires_grad]

    def again(self, task: str) -> Tensor:
        """Encoder and the head of ``task``."""
        batch = self._batch(task)
        features = self._replay(id(self._batches[task]), lambda: self._encode(batch))
        return self._head(task, features, batch)  # with the buffers as the encoder has left them

    def again_all(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """One encoder pass for each distinct batch, one head pass for each task."""
        encoded: dict[int, tuple[Any, Any]] = {}
        losses = {}
        for task in tasks:
            key = id(self._batches[task])
            if key not in encoded:
                batch = self._batch(task)
                encoded[key] = batch, self._replay(key, partial(self._encode, batch))
            batch, features = encoded[key]
            losses[task] = self._head(task, features, batch)
        return losses

    def head_again(self, task: str, head: list[Tensor]) -> Tensor:
        """The head alone on the clean features, as long as they are the clean features.

        They are not if they depend on ``head`` themselves, or if a head has changed them in place,
        or if the encoder leaves something in the batch.
        """
        key = id(self._batches[task])
        features = self._features[key]
        changed = self._versions[key] != _versions(features)
        if changed or key in self._altered or not self._trunk.isdisjoint(head):
            return self.again(task)
        if task in self._before_head:
            self._before_head[task].put_back()
        return self._head(task, features, self._batch(task))

    def _batch(self, task: str) -> Any:
        """The batch of a task as it was before the clean pass."""
        batch = self._batches[task]
        if id(batch) not in self._inputs:
            return batch
        (as_before,), _ = self._inputs[id(batch)].take()
        return as_before

    def _head(self, task: str, features: Any, batch: Any) -> Tensor:
        loss = self._replay(task, lambda: self._task_loss(task, features, batch), wind_back=False)
        if loss is None:
            raise FlatMTLError(
                f"The loss of task '{task}' was there at first and is None when the same batch is "
                "run at perturbed parameters. A step must give the same losses when it is run "
                "again."
            )
        return plain(loss)


def _kept(tensor: Tensor) -> Tensor:
    """The features without their graph; a loss may differentiate with respect to them."""
    return tensor.detach().requires_grad_(tensor.requires_grad and not tensor.is_inference())


def _apart(tensor: Tensor) -> Tensor:
    """A tensor of its own node, that no other of the features depends on or is."""
    return tensor.view_as(tensor)


def _tensors(features: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(features) if isinstance(leaf, Tensor)]


def _versions(features: Any) -> list[int]:
    """How often each tensor has been changed in place; inference tensors do not count."""
    return [t._version for t in _tensors(features) if not t.is_inference()]
