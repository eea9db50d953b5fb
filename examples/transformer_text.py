"""Two tasks on short English sentences with one small transformer encoder.

    python examples/transformer_text.py   # CAGrad with TaskSAM, then the plain sum

`text/sentences.tsv` holds 199 sentences written for this example. The tasks are

- tags: does a word name a place, a time, a number or a person, or none of these?
- kind: is the sentence a question, a statement or a request?

Sentences differ in length. A batch is padded, the encoder is told by a mask what is padding, and
the loss and the scores of the tags leave it out by `ignore_index`. `encode` is overridden: it
returns the states of the words for the tags, and that of a mark before them for the kind.

A quarter of the sentences is kept for validation; with fifty of them ten points of difference in
the kind are within the noise. About ten seconds on a CPU.
"""

import argparse
import logging
import warnings
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_flatmtl import ClassificationTask, MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import CAGrad

SENTENCES = Path(__file__).parent / "text" / "sentences.tsv"
KINDS = ["question", "statement", "request"]
TAGS = ["O", "PLACE", "TIME", "NUMBER", "PERSON"]
PAD, UNKNOWN, START = 0, 1, 2  # padding, a word that training has not seen, the mark before all
NO_TAG = -100  # the tag of padding
WIDTH = 32

Sample = tuple[list[str], list[int], int]


def read_sentences() -> list[Sample]:
    """Words, their tags and the kind of every sentence."""
    samples = []
    for line in SENTENCES.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            kind, sentence = line.split("\t")
            pairs = [token.partition("/") for token in sentence.split()]
            tags = [TAGS.index(tag or "O") for _, _, tag in pairs]
            samples.append(([word for word, _, _ in pairs], tags, KINDS.index(kind)))
    return samples


def shape(word: str) -> int:
    """How a word is written: 1 small letters, 2 with a capital, 3 digits; 0 is padding."""
    return 3 if word[0].isdigit() else 2 if word[0].isupper() else 1


class Collate:
    """Turns sentences into a padded batch; its vocabulary is that of the training sentences."""

    def __init__(self, train: list[Sample]) -> None:
        known = sorted({word.lower() for words, _, _ in train for word in words})
        self.number = {word: number for number, word in enumerate(known, start=START + 1)}

    def __len__(self) -> int:
        """Return the number of words, the three special ones included."""
        return len(self.number) + 3

    def __call__(self, samples: list[Sample]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return `(inputs, {task: target})`."""
        words, tags, kinds = zip(*samples, strict=True)
        numbers = [[START, *(self.number.get(w.lower(), UNKNOWN) for w in row)] for row in words]
        shapes = [[1, *map(shape, row)] for row in words]
        inputs = {"words": padded(numbers, PAD), "shapes": padded(shapes, 0)}
        return inputs, {"tags": padded(tags, NO_TAG), "kind": torch.tensor(kinds)}


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Rows of different length as one tensor [rows, longest]."""
    return pad_sequence([torch.tensor(row) for row in rows], True, value)


class Encoder(nn.Module):
    """States [sentences, 1 + words, WIDTH] of the mark and all words.

    In training one word in five is replaced by the unknown one, so that it means something. The
    second pass of TaskSAM replaces the same words and drops the same units.
    """

    def __init__(self, vocabulary: int, longest: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH, padding_idx=PAD)
        self.shapes = nn.Embedding(4, WIDTH, padding_idx=0)
        self.places = nn.Parameter(0.1 * torch.randn(longest, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, nhead=4, dim_feedforward=64, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, num_layers=2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )

    def forward(self, words: Tensor, shapes: Tensor) -> Tensor:
        """Look up, add up, let the words look at each other; padding is not looked at."""
        padding = words == PAD
        if self.training:
            dropped = (torch.rand(words.shape, device=words.device) < 0.2) & (words > START)
            words = words.masked_fill(dropped, UNKNOWN)
        states = self.words(words) + self.shapes(shapes) + self.places[: words.shape[1]]
        return self.layers(states, src_key_padding_mask=padding)


class TagHead(nn.Linear):
    """Logits [sentences, tags, words], the order that torch's losses and metrics want."""

    def forward(self, states: Tensor) -> Tensor:
        """Map the states of all words."""
        return super().forward(states).transpose(1, 2)


class Sentences(MultiTaskModule):
    """The states of the words for the tags, that of the mark before them for the kind."""

    def encode(self, batch: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Features by task: every head gets its own."""
        inputs, _ = batch
        states = self.encoder(**inputs)
        return {"tags": states[:, 1:], "kind": states[:, 0]}


def make_tasks() -> list[Task]:
    """One decision a word, one a sentence."""
    tags = Task(
        "tags",
        head=TagHead(WIDTH, len(TAGS)),
        loss=nn.CrossEntropyLoss(ignore_index=NO_TAG),
        metrics={
            "accuracy": MulticlassAccuracy(len(TAGS), average="micro", ignore_index=NO_TAG),
            "f1": MulticlassF1Score(len(TAGS), average="macro", ignore_index=NO_TAG),
        },
    )
    return [tags, ClassificationTask("kind", in_features=WIDTH, num_classes=len(KINDS))]


def train_and_validate(
    callbacks: list[pl.Callback], samples: list[Sample], epochs: int, seed: int
) -> dict[str, float]:
    """Return the validation metrics after the last epoch."""
    pl.seed_everything(seed, verbose=False)
    train, val = split(samples, seed)
    collate = Collate(train)
    module = Sentences(
        encoder=Encoder(len(collate)),
        tasks=make_tasks(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3),
        gradient_clip_val=1.0,
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, 16, shuffle=True, collate_fn=collate))
    loader = DataLoader(val, 64, collate_fn=collate)
    (metrics,) = trainer.validate(module, loader, verbose=False)
    return metrics


def split(samples: list[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Three quarters for training, one for validation."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [samples[i] for i in order]
    first = 3 * len(samples) // 4
    return shuffled[:first], shuffled[first:]


def most_frequent(samples: list[Sample], seed: int) -> tuple[float, float]:
    """Validation accuracies of always saying the most frequent tag and kind."""
    train, val = split(samples, seed)
    kind = Counter(kind for _, _, kind in train).most_common(1)[0][0]
    tags = [tag for _, tags, _ in val for tag in tags]
    return tags.count(TAGS.index("O")) / len(tags), sum(k == kind for _, _, k in val) / len(val)


def main() -> None:
    """Train with and without the callbacks, print the validation table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that it runs")
    arguments = parser.parse_args()
    epochs = 1 if arguments.fast else arguments.epochs
    samples = read_sentences()
    train, val = split(samples, arguments.seed)
    print(f"{len(train)} sentences for training, {len(val)} for validation")
    print(f"\n{'validation':<18}{'tags accuracy':>15}{'tags F1':>12}{'kind accuracy':>16}")
    tags, kind = most_frequent(samples, arguments.seed)
    print(f"{'most frequent':<18}{100 * tags:>13.2f} %{'-':>10}{100 * kind:>16.2f} %")
    for name, callbacks in (
        ("CAGrad + TaskSAM", [CAGrad(c=0.4), TaskSAM(rho=0.05)]),
        ("plain sum", []),
    ):
        got = train_and_validate(callbacks, samples, epochs, arguments.seed)
        values = [got[f"val/{name}"] for name in ("tags/accuracy", "tags/f1", "kind/accuracy")]
        accuracy, f1, kind = (100 * value for value in values)
        print(f"{name:<18}{accuracy:>13.2f} %{f1:>10.2f} %{kind:>14.2f} %", flush=True)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for advice in ("does not have many workers", "have no `val_dataloader`"):
        warnings.filterwarnings("ignore", f".*{advice}.*")
    main()
