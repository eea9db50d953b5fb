"""Three optimizer steps through Trainer.fit equal a naive re-implementation, in float64."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import IMTLG, MGDA, CAGrad, LinearScalarization, PCGrad
from tests import naive

AGGREGATORS = {
    "none": (None, naive.ls),
    "LS": (LinearScalarization, naive.ls),
    "MGDA": (MGDA, naive.mgda),
    "MGDA-l2": (lambda: MGDA("l2"), naive.mgda_l2),
    "MGDA-loss": (lambda: MGDA("loss"), naive.mgda_loss),
    "MGDA-loss+": (lambda: MGDA("loss+"), naive.mgda_loss_plus),
    "PCGrad": (PCGrad, naive.pcgrad),
    "PCGrad-mean": (lambda: PCGrad("mean"), lambda g, v: naive.pcgrad(g, v) / 2),
    "CAGrad": (lambda: CAGrad(0.4), naive.cagrad(0.4)),
    "CAGrad-raw": (lambda: CAGrad(0.7, rescale=False), naive.cagrad(0.7, rescale=False)),
    "IMTLG": (IMTLG, naive.imtl_g),
}


class Pairs(torch.utils.data.Dataset):
    def __init__(self, inputs: Tensor, targets: dict[str, Tensor]) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int):
        return self.inputs[i], {k: v[i] for k, v in self.targets.items()}


def data(n: int = 24, seed: int = 0) -> DataLoader:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, dtype=torch.float64, generator=g)
    classes = torch.randint(0, 3, (n,), generator=g)
    values = torch.randn(n, 2, dtype=torch.float64, generator=g)
    return DataLoader(Pairs(x, {"a": classes, "b": values}), batch_size=8)


def module(optimizer=None, **kwargs) -> MultiTaskModule:
    torch.manual_seed(3)
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh()
    )
    tasks = [
        Task(
            "a",
            head=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
            loss=nn.CrossEntropyLoss(),
        ),
        Task("b", head=nn.Linear(5, 2), loss=nn.MSELoss()),
    ]
    optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    return MultiTaskModule(encoder, tasks, optimizer=optimizer, **kwargs).double()


def fit(
    model: pl.LightningModule, callbacks: list, loader: DataLoader | None = None, **kwargs
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **kwargs,
    )
    trainer.fit(model, loader or data())
    return trainer


def naive_fit(model: MultiTaskModule, aggregate, **settings) -> None:
    """Train a copy by hand; BatchNorm in training mode uses batch statistics in every pass."""
    names = dict(model.named_parameters())
    shared = [n for n in names if n.startswith("encoder.")]
    heads = {t: [n for n in names if n.startswith(f"heads.{t}.")] for t in ("a", "b")}
    optimizer = model.configure_optimizers()
    model.train()
    for batch in data():

        def loss_of(task: str, inputs=batch[0], targets=batch[1]):
            def loss(params: dict[str, Tensor]) -> Tensor:
                state = {**params, **{k: v.clone() for k, v in model.named_buffers()}}
                output = functional_call(model, state, (inputs,))[task]
                criterion = nn.CrossEntropyLoss() if task == "a" else nn.MSELoss()
                return criterion(output, targets[task])

            return loss

        values = {n: p.detach().clone() for n, p in names.items()}
        grads = naive.f_mtl_gradients(
            {t: loss_of(t) for t in ("a", "b")}, values, shared, heads, aggregate, **settings
        )
        for n, p in names.items():
            p.grad = grads[n]
        optimizer.step()


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 1e-10) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        difference = (p - q).norm() / q.norm()
        assert difference < tolerance, (name, difference.item())


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize(
    ("rho", "adaptive", "point", "arm"),
    [(0.0, False, "separate", "split")]
    + [
        (rho, adaptive, point, arm)
        for rho, adaptive in ((0.05, False), (0.5, True))
        for point in ("separate", "joint")
        for arm in ("split", "direct")
    ],
)
def test_three_steps(name: str, rho: float, adaptive: bool, point: str, arm: str) -> None:
    make, aggregate = AGGREGATORS[name]
    ours = module()
    reference = copy.deepcopy(ours)
    sam = [TaskSAM(rho, adaptive=adaptive, point=point, aggregate=arm)] if rho else []
    trainer = fit(ours, [*([make()] if make else []), *sam])
    assert trainer.global_step == 3
    naive_fit(reference, aggregate, rho=rho, adaptive=adaptive, point=point, arm=arm)
    assert_same(ours, reference)
