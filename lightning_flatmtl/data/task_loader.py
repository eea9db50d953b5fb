"""Loaders of several data sets, of which every step has one or some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, get_args

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DistributedSampler, RandomSampler
from typing_extensions import override

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._task_order import Measures, Order, TaskOrder

__all__ = ["TaskLoader"]

_ORDER = "lightning_flatmtl.order"
_ROUND = 1_000_003
"""Epochs of a DistributedSampler between the beginnings of a loader within one epoch."""


class TaskLoader(CombinedLoader):
    r"""Brings one task at a time, or some: for data sets of very different sizes.

    A batch is ``{task: batch of its loader}``, with the tasks of the step only. A loader that has
    ended begins again. ``order`` says which task comes when, :math:`n_t` being its samples and
    :math:`b_t` its batches:

    - ``"round_robin"``: one after the other, in the order of ``loaders``;
    - ``"proportional"``: in shuffled order, each as often as it has batches, so that an epoch is
      one of every loader;
    - ``"temperature"``: with probability :math:`p_t = n_t^{1/T} / \sum_s n_s^{1/T}`
      (`Arivazhagan et al., 2019 <https://arxiv.org/abs/1907.05019>`_): ``temperature=1`` by size,
      larger favours small data sets, infinity draws all alike.

    Draws are stratified: an epoch of :math:`N` steps has each task :math:`N p_t` times, rounded
    down or up; which of both is drawn anew every epoch so that the mean is right. A task may thus
    be in some epochs only. A step's draw itself has the probabilities above.

    It is a ``CombinedLoader``, so Lightning does with it what it does with that. With several
    processes each loader gets a ``DistributedSampler`` of its own, while all processes draw the
    same tasks. A step's tasks depend on ``seed`` and the epoch; so does the order of the samples of
    a shuffling ``DataLoader`` without a generator of its own, which is given one. A checkpoint in
    the middle of an epoch holds how far it is: from there the same batches come. Loaders with a
    ``state_dict`` of their own resume by it; the others draw the batches that are over once more
    and drop them. (Of a plain ``DataLoader`` Lightning warns nevertheless that it is not
    resumable.)
    Each epoch begins all loaders anew, so they are to shuffle.

    Args:
        loaders: A loader for each task, or data set; each is a ``DataLoader`` or another iterable
            of batches.
        order: ``"round_robin"``, ``"proportional"`` or ``"temperature"``.
        temperature: :math:`T` in (0, inf], for ``"temperature"`` only.
        steps: Steps of an epoch, at least 1. By default as many as all loaders have batches; for
            ``"round_robin"`` until the longest is through. Divided by ``tasks_per_step``, rounded
            up.
        tasks_per_step: Different tasks in a batch, in [1, tasks]. Their probabilities are as above,
            up to 1.
        sizes: Samples by task, over those of the data sets; also any other weights above 0.
        seed: Seed of the order, at least 0.

    Attributes:
        order: The order of the tasks; ``order.expected()`` has the mean steps of each in an epoch.

    Raises:
        ValueError: If an argument is out of its bounds, a loader is empty, or a length or size that
            is needed is not known.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from lightning_flatmtl.data import TaskLoader
        >>> loaders = {
        ...     "small": DataLoader(range(100), batch_size=10, shuffle=True),
        ...     "large": DataLoader(range(900), batch_size=10, shuffle=True),
        ... }
        >>> loader = TaskLoader(loaders, "temperature", temperature=2.0, steps=8)
        >>> [task for batch, _, _ in loader for task in batch].count("small")
        2
    """

    def __init__(
        self,
        loaders: Mapping[str, Any],
        order: Order = "round_robin",
        temperature: float = 1.0,
        steps: int | None = None,
        tasks_per_step: int = 1,
        sizes: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(loaders, Mapping) or not loaders:
            raise ValueError(f"`loaders` must be a mapping with a loader by task, got {loaders!r}.")
        check(order in get_args(Order), "order", f"among {list(get_args(Order))}", repr(order))
        check(temperature > 0, "temperature", "in (0, inf]", temperature)
        only = 'for `order="temperature"` only'
        check(temperature == 1 or order == "temperature", "temperature", only, temperature)
        check(steps is None or steps >= 1, "steps", "at least 1", steps)
        most = f"in [1, {len(loaders)}], the number of tasks"
        check(1 <= tasks_per_step <= len(loaders), "tasks_per_step", most, tasks_per_step)
        check(seed >= 0, "seed", "at least 0", seed)
        self._sizes = dict(sizes or {})
        unknown = [task for task in self._sizes if task not in loaders]
        check(not unknown, "sizes", f"by names among {list(loaders)}", unknown)
        bad = {task: size for task, size in self._sizes.items() if not 0 < size < float("inf")}
        check(not bad, "sizes", "numbers in (0, inf)", bad)
        self.order = TaskOrder(
            list(loaders), order, temperature, steps, tasks_per_step, seed, self._measures
        )
        super().__init__({**loaders, _ORDER: self.order}, "max_size_cycle")
        self._refuse_empty()
        self._generators: dict[str, torch.Generator] = {}

    @property
    def loaders(self) -> dict[str, Any]:
        """The loaders by task, as they are now: Lightning replaces samplers."""
        return {task: loader for task, loader in self.iterables.items() if task != _ORDER}

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, where no Trainer does.

        Args:
            epoch: Its number, at least 0.
        """
        self.order.set_epoch(epoch)

    @override
    def __iter__(self) -> Self:
        self._iterator = _Draws(self)  # type: ignore[assignment] # what CombinedLoader asks of it
        return self

    @override
    def __next__(self) -> tuple[dict[str, Any], int, int]:
        assert self._iterator is not None
        return next(self._iterator)

    @override
    def __len__(self) -> int:
        steps = len(self.order)
        if self.limits is None:
            return steps
        pairs = zip(self.flattened, self.limits, strict=True)
        return int(min(steps, next(limit for loader, limit in pairs if loader is self.order)))

    @contextmanager
    def begun(self, task: str, round_: int) -> Iterator[Any]:
        """An iterator of a task's loader, and a random stream that is put back afterwards.

        Args:
            task: The task.
            round_: How often the loader has ended in this epoch.
        """
        loader = self.loaders[task]
        number = self.order.tasks.index(task)
        words = [self.order.seed, self.order.epoch, round_, number]
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(self.order.epoch + _ROUND * round_)
        elif isinstance(sampler, RandomSampler) and sampler.generator in (
            None,
            self._generators.get(task),
        ):
            sampler.generator = self._generators[task] = torch.Generator().manual_seed(seed)
        state = torch.get_rng_state()
        try:
            # An iterator draws the seed of its workers from the global stream.
            torch.default_generator.manual_seed(seed)
            yield iter(loader)
        finally:
            torch.set_rng_state(state)

    def _measures(self) -> Measures:
        loaders = self.loaders
        lengths = [sized_len(loader) for loader in loaders.values()]
        data = [sized_len(getattr(loader, "dataset", None)) for loader in loaders.values()]
        sizes = [self._sizes.get(t, size) for t, size in zip(loaders, data, strict=True)]
        return Measures(lengths, sizes)

    def _refuse_empty(self) -> None:
        for task, loader in self.loaders.items():
            if sized_len(loader) == 0:
                raise ValueError(
                    f"The loader of '{task}' must have at least one batch, got none. Leave the "
                    "task out, or look at its data set, batch size and `drop_last`."
                )


class _Draws:
    """One epoch of a :class:`TaskLoader`."""

    def __init__(self, loader: TaskLoader) -> None:
        self._loader = loader
        self._plan: Any = None
        self._iterators: dict[str, Any] = {}
        self._rounds = dict.fromkeys(loader.order.tasks, 0)

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> tuple[dict[str, Any], int, int]:
        order = self._loader.order
        if self._plan is None:  # Lightning tells the epoch after `iter`
            self._begin()
        step = order.taken
        if step >= len(self):
            raise StopIteration
        batch = {order.tasks[t]: self._next(order.tasks[t]) for t in self._plan[step]}
        order.taken += 1
        return batch, step, 0

    def reset(self) -> None:
        """Let go of the iterators, and of their workers."""
        self._iterators = {}

    def _begin(self) -> None:
        order = self._loader.order
        over = order.begin()
        self._plan = order.plan()
        for number, task in enumerate(order.tasks):
            count = int((self._plan[:over] == number).sum())
            self._skip(task, count)

    def _skip(self, task: str, count: int) -> None:
        """Be where ``count`` batches of the task have been handed out."""
        loader = self._loader.loaders[task]
        length = sized_len(loader)
        self._rounds[task], left = (0, count) if length is None else divmod(count, length)
        if hasattr(loader, "load_state_dict"):  # it knows by itself
            return
        state = torch.get_rng_state()
        for _ in range(left):
            self._next(task)
        torch.set_rng_state(state)

    def _open(self, task: str) -> None:
        with self._loader.begun(task, self._rounds[task]) as iterator:
            self._iterators[task] = iterator

    def _next(self, task: str) -> Any:
        if task not in self._iterators:
            self._open(task)
        try:
            return next(self._iterators[task])
        except StopIteration:
            self._rounds[task] += 1
        self._open(task)
        try:
            return next(self._iterators[task])
        except StopIteration:
            raise RuntimeError(
                f"The loader of '{task}' must have at least one batch, got none."
            ) from None
