"""The cheaper second passes equal a naive re-implementation, in float64, over many steps."""

import copy
from typing import Any

import pytest
from torch import Tensor, nn
from torch.func import functional_call

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import MGDA, CAGrad
from tests import naive
from tests.helpers import (
    assert_close,
    data,
    fit,
    module,
)
from tests.naive_flatness import Flatness, kinds

VARIANTS: dict[str, dict[str, Any]] = {
    "refresh": {"refresh": 1},
    "refresh adaptive": {"refresh": 1, "adaptive": True, "rho": 0.5},
    "refresh joint": {"refresh": 1, "point": "joint"},
    "refresh second": {"refresh": 1, "arm": "second"},
    "refresh each": {"refresh": 1, "arm": "each"},
    "refresh all": {"refresh": 2},
    "refresh more": {"refresh": 7},
    "common": {"perturbation": "common"},
    "common adaptive": {"perturbation": "common", "adaptive": True, "rho": 0.5},
    "common joint": {"perturbation": "common", "point": "joint"},
    "common direct": {"perturbation": "common", "arm": "direct"},
    "common refresh": {"perturbation": "common", "refresh": 1},
    "samo": {"perturbation": "samo"},
    "samo published": {"perturbation": "samo", "arm": "direct", "point": "joint", "beta": 0.1},
    "samo adaptive": {"perturbation": "samo", "adaptive": True, "rho": 0.5, "step": 0.001},
    "samo refresh": {"perturbation": "samo", "refresh": 1},
}
STEPS = 6


def naive_fit(model: MultiTaskModule, aggregate: Any, loader: Any, **settings: Any) -> Flatness:
    """Train a copy by hand; BatchNorm in training mode uses batch statistics in every pass."""
    names = dict(model.named_parameters())
    shared = [n for n in names if n.startswith("encoder.")]
    heads = {t: [n for n in names if n.startswith(f"heads.{t}.")] for t in ("a", "b")}
    flatness = Flatness(shared, heads, aggregate, **settings)
    optimizer = model.configure_optimizers()
    model.train()
    for _ in range(STEPS // len(loader)):
        for batch in loader:

            def loss_of(task: str, inputs=batch[0], targets=batch[1]):
                def loss(params: dict[str, Tensor]) -> Tensor:
                    state = {**params, **{k: v.clone() for k, v in model.named_buffers()}}
                    output = functional_call(model, state, (inputs,))[task]
                    criterion = nn.CrossEntropyLoss() if task == "a" else nn.MSELoss()
                    return criterion(output, targets[task])

                return loss

            values = {n: p.detach().clone() for n, p in names.items()}
            grads = flatness.directions({t: loss_of(t) for t in ("a", "b")}, values)
            for n, p in names.items():
                p.grad = grads[n]
            optimizer.step()
    return flatness


@pytest.mark.parametrize("make", ["CAGrad", "MGDA"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_the_naive_ones(variant: str, make: str) -> None:
    settings = {"rho": 0.05, **VARIANTS[variant]}
    aggregate = {"CAGrad": naive.cagrad(0.4), "MGDA": naive.mgda}[make]
    method = {"CAGrad": CAGrad, "MGDA": MGDA}[make]()
    ours = module()
    reference = copy.deepcopy(ours)
    trained = fit(ours, [method, TaskSAM(**kinds(**settings))], max_epochs=2)
    assert trained.global_step == STEPS
    flatness = naive_fit(reference, lambda rows: aggregate(rows, rows.sum(1)), data(), **settings)
    if settings.get("refresh") == 1:
        assert flatness.renewed == [["a", "b"], ["a"], ["b"], ["a"], ["b"], ["a"]]
    assert_close(ours, reference, 1e-10)
