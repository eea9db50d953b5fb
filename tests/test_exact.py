"""Three optimizer steps through Trainer.fit equal a naive re-implementation, in float64."""

import copy

import pytest
from torch import Tensor, nn
from torch.func import functional_call

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import IMTLG, MGDA, CAGrad, LinearScalarization, PCGrad
from tests import naive
from tests.helpers import assert_close, assert_identical, data, fit, module

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


NEED_TASKS = ("MGDA-loss", "MGDA-loss+")
CASES = [
    (name, rho, adaptive, point, arm)
    for name in AGGREGATORS
    for rho, adaptive in ((0.05, False), (0.5, True))
    for point in ("separate", "joint")
    for arm in naive.ARMS
    if arm in ("split", "direct") or name not in NEED_TASKS
]


@pytest.mark.parametrize("arm", ["second", "each"])
def test_without_flat_parts_all_arms_are_one(arm: str) -> None:
    found, expected = module(), module()
    for model, aggregate in ((found, arm), (expected, "split")):
        sam = TaskSAM(rho_shared=0.0, rho_heads=0.5, aggregate=aggregate)
        assert fit(model, [MGDA(), sam]).global_step == 3
    assert_identical(found, expected)


@pytest.mark.parametrize(
    ("name", "rho", "adaptive", "point", "arm"),
    [*((name, 0.0, False, "separate", "split") for name in AGGREGATORS), *CASES],
)
def test_three_steps(name: str, rho: float, adaptive: bool, point: str, arm: str) -> None:
    make, aggregate = AGGREGATORS[name]
    ours = module()
    reference = copy.deepcopy(ours)
    sam = [TaskSAM(rho, adaptive=adaptive, point=point, aggregate=arm)] if rho else []
    trainer = fit(ours, [*([make()] if make else []), *sam])
    assert trainer.global_step == 3
    naive_fit(reference, aggregate, rho=rho, adaptive=adaptive, point=point, arm=arm)
    assert_close(ours, reference, 1e-10)
