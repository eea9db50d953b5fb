"""The architectures of shared and own parts, tiny, with who owns what, and plain re-tellings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatmtl import MultiTaskModule, Task
from lightning_flatmtl.models import (
    CGC,
    PLE,
    CrossStitch,
    MMoE,
    SoftSharing,
    TaskAttention,
)
from tests.helpers import sgd

TASKS = ("a", "b")
INPUTS, FEATURES = 6, 4
Params = Mapping[str, Tensor]


def mlp(inputs: int = INPUTS, outputs: int = FEATURES) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())


# The formulas once more, sample by sample, on a dictionary of parameters.


def dense(p: Params, name: str, x: Tensor) -> Tensor:
    """A linear layer and tanh, one sample."""
    return torch.tanh(p[f"{name}.0.weight"] @ x + p[f"{name}.0.bias"])


def softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.max())
    return e / e.sum()


def weighted(weights: Tensor, outputs: list[Tensor]) -> Tensor:
    total = torch.zeros_like(outputs[0])
    for weight, output in zip(weights, outputs, strict=True):
        total = total + weight * output
    return total


def gate(p: Params, name: str, x: Tensor) -> Tensor:
    return softmax(p[f"{name}.logits.weight"] @ x)


def soft(p: Params, task: str, x: Tensor) -> Tensor:
    return dense(p, f"trunks.{task}", x)


def cross(p: Params, task: str, x: Tensor) -> Tensor:
    first = {t: dense(p, f"columns.{t}.0", x) for t in TASKS}

    def stitched(unit: int, t: str, of: dict[str, Tensor]) -> Tensor:
        row = p[f"units.{unit}.{t}"]
        return torch.stack(
            [sum(row[j, c] * of[o][c] for j, o in enumerate(TASKS)) for c in range(len(of[t]))]
        )

    second = {t: dense(p, f"columns.{t}.1", stitched(0, t, first)) for t in TASKS}
    row = p[f"units.1.{task}"]  # of one weight for all channels
    mix = sum(row[j, 0] * second[o] for j, o in enumerate(TASKS))
    return dense(p, f"columns.{task}.2", mix)


def mmoe(p: Params, task: str, x: Tensor) -> Tensor:
    z = dense(p, "stem", x)
    return weighted(gate(p, f"gates.{task}", z), [dense(p, f"experts.{e}", z) for e in range(3)])


def cgc(p: Params, task: str, x: Tensor) -> Tensor:
    own = [dense(p, f"levels.0.experts.{task}.{e}", x) for e in range(2)]
    common = [dense(p, f"levels.0.shared_experts.{e}", x) for e in range(1)]
    return weighted(gate(p, f"levels.0.gates.{task}", x), own + common)


def ple(p: Params, task: str, x: Tensor) -> Tensor:
    read: dict[str, Tensor] = dict.fromkeys(TASKS, x)
    common = x
    for level in range(3):
        name = f"levels.{level}"
        own = {t: [dense(p, f"{name}.experts.{t}.0", read[t])] for t in TASKS}
        shared = [dense(p, f"{name}.shared_experts.{e}", common) for e in range(2)]
        if level < 2:
            every = [*own["a"], *own["b"], *shared]
            common = weighted(gate(p, f"{name}.shared_gate", common), every)
        read = {t: weighted(gate(p, f"{name}.gates.{t}", read[t]), own[t] + shared) for t in TASKS}
    return read[task]


def attention(p: Params, task: str, x: Tensor) -> Tensor:
    z = {t: dense(p, f"extractors.{t}", dense(p, "trunk", x)) for t in TASKS}
    query = p[f"queries.{task}.weight"] @ z[task]
    looked_at = []
    for head in range(2):
        part = slice(2 * head, 2 * head + 2)
        scores = [query[part] @ (p["key.weight"] @ z[t])[part] / 2**0.5 for t in TASKS]
        values = [(p["value.weight"] @ z[t])[part] for t in TASKS]
        looked_at.append(weighted(softmax(torch.stack(scores)), values))
    y = z[task] + p[f"outputs.{task}.weight"] @ torch.cat(looked_at) + p[f"outputs.{task}.bias"]
    y = y - y.sum() / FEATURES
    y = y / torch.sqrt((y**2).sum() / FEATURES + 1e-5)
    return y * p[f"norms.{task}.weight"] + p[f"norms.{task}.bias"]


@dataclass(frozen=True)
class Sharing:
    """An architecture.

    Args:
        make: What makes it.
        naive: Features of a task from one sample.
        own: What the names of a task's own parameters begin with; all others are shared.
    """

    make: Callable[[], nn.Module]
    naive: Callable[[Params, str, Tensor], Tensor]
    own: tuple[str, ...]

    def owner(self, name: str) -> str | None:
        """Whose a parameter of the encoder is; ``None`` if it is shared."""
        of = [t for t in TASKS for own in self.own if name.startswith(own.format(task=t))]
        return of[0] if of else None


SHARING = {
    "soft l2": Sharing(lambda: SoftSharing(TASKS, mlp(), weight=0.1), soft, ("trunks.{task}.",)),
    "soft trace": Sharing(
        lambda: SoftSharing(TASKS, mlp(), weight=0.1, distance="trace"), soft, ("trunks.{task}.",)
    ),
    "cross-stitch": Sharing(
        lambda: CrossStitch(TASKS, [mlp(outputs=5), mlp(5, 3), mlp(3)], channels=[5, 1], own=0.8),
        cross,
        ("columns.{task}.2.", "units.1.{task}"),
    ),
    "MMoE": Sharing(
        lambda: MMoE(TASKS, mlp(5), 3, gate_features=5, stem=mlp(outputs=5)()),
        mmoe,
        ("gates.{task}.",),
    ),
    "CGC": Sharing(
        lambda: CGC(TASKS, mlp(), task_experts=2, gate_features=INPUTS),
        cgc,
        ("levels.0.experts.{task}.", "levels.0.gates.{task}."),
    ),
    "PLE": Sharing(
        lambda: PLE(TASKS, [mlp(outputs=5), mlp(5, 3), mlp(3)], 2, gate_features=[INPUTS, 5, 3]),
        ple,
        ("levels.2.experts.{task}.", "levels.2.gates.{task}.", "levels.1.gates.{task}."),
    ),
    "attention": Sharing(
        lambda: TaskAttention(TASKS, mlp(outputs=5)(), mlp(5), FEATURES, attention_heads=2),
        attention,
        ("queries.{task}.", "outputs.{task}.", "norms.{task}."),
    ),
}


def module(name: str, optimizer: Any = sgd, **settings: Any) -> MultiTaskModule:
    """A module in float64; the same weights every time."""
    torch.manual_seed(0)
    tasks = [
        Task("a", head=nn.Linear(FEATURES, 3), loss=nn.CrossEntropyLoss()),
        Task("b", head=nn.Linear(FEATURES, 2), loss=nn.MSELoss()),
    ]
    return MultiTaskModule(SHARING[name].make(), tasks, optimizer, **settings).double()


def inputs(n: int = 5) -> Tensor:
    return torch.randn(n, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def items(batches: int = 3, size: int = 5) -> list[tuple[Tensor, dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(size, INPUTS, dtype=torch.float64, generator=g),
            {
                "a": torch.randint(0, 3, (size,), generator=g),
                "b": torch.randn(size, 2, dtype=torch.float64, generator=g),
            },
        )
        for _ in range(batches)
    ]


def loader(batches: int = 3) -> DataLoader:
    return DataLoader(items(batches), batch_size=None)
