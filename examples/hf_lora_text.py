"""A HuggingFace encoder with LoRA adapters under CAGrad and TaskSAM: two tasks on sentences.

    python examples/hf_lora_text.py   # CAGrad with TaskSAM, then the plain sum

Needs `pip install transformers peft` (or `pip install "lightning-flatmtl[text]"`); nothing is
downloaded. The encoder is a small BERT, built from its config, so its weights are random; with
`BertModel.from_pretrained(...)` and the tokenizer of that model the rest stays as it is.

`peft` freezes the encoder and puts a low-rank adapter beside the projections of every layer. Only
adapters and heads are trained: the task gradients, the perturbations of TaskSAM and the optimizer's
state have the size of the adapters. The example counts which weights have moved.

The data, 199 sentences of `text/sentences.tsv`, and the tasks are those of `transformer_text.py`:

- tags: does a word name a place, a time, a number or a person, or none of these?
- kind: is the sentence a question, a statement or a request?

What it does not show is how good LoRA is: an encoder that has never been trained on texts has
little to adapt, and fifty sentences for validation are few. Half a minute on a CPU.
"""

import argparse
import logging
import sys
import warnings
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_flatmtl import ClassificationTask, MultiTaskModule, TaggingTask, TaskSAM
from lightning_flatmtl.aggregators import CAGrad

try:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertModel
except ImportError as error:
    sys.exit(f"This example needs {error.name}: pip install transformers peft")

SENTENCES = Path(__file__).parent / "text" / "sentences.tsv"
KINDS = ["question", "statement", "request"]
TAGS = ["O", "PLACE", "TIME", "NUMBER", "PERSON"]
PAD, UNKNOWN, START = 0, 1, 2  # padding, a word that training has not seen, the mark before all
NO_TAG = -100  # the tag of padding, which TaggingTask leaves out
WIDTH = 64

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


class Collate:
    """Turns sentences into what BERT takes; its vocabulary is that of the training sentences."""

    def __init__(self, train: list[Sample]) -> None:
        known = sorted({word.lower() for words, _, _ in train for word in words})
        self.number = {word: number for number, word in enumerate(known, start=START + 1)}

    def __len__(self) -> int:
        """Return the number of words, the three special ones included."""
        return len(self.number) + 3

    def __call__(self, samples: list[Sample]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return `(inputs, {task: target})`."""
        words, tags, kinds = zip(*samples, strict=True)
        rows = [[START, *(self.number.get(w.lower(), UNKNOWN) for w in row)] for row in words]
        # How a word is written, as a type of token: 0 in small letters, 1 with a capital or digits.
        types = [[0, *(int(not word.islower()) for word in row)] for row in words]
        ids = padded(rows, PAD)
        inputs = {
            "input_ids": ids,
            "token_type_ids": padded(types, 0),
            "attention_mask": (ids != PAD).long(),
        }
        return inputs, {"tags": padded(tags, NO_TAG), "kind": torch.tensor(kinds)}


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Rows of different length as one tensor [rows, longest]."""
    return pad_sequence([torch.tensor(row) for row in rows], True, value)


def bert_with_lora(vocabulary: int) -> torch.nn.Module:
    """A small BERT from its config, frozen, with adapters beside its projections."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=32,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
        # Larger than BERT's 0.02: a frozen random layer must let differences between words through.
        initializer_range=0.15,
    )
    bert = BertModel(config, add_pooling_layer=False)
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
    return get_peft_model(bert, adapters)


class Sentences(MultiTaskModule):
    """The states of the words for the tags, that of the mark before them for the kind."""

    def encode(self, batch: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Features by task: every head gets its own."""
        inputs, _ = batch
        states = self.encoder(**inputs).last_hidden_state
        return {"tags": states[:, 1:], "kind": states[:, 0]}


def train_and_validate(
    callbacks: list[pl.Callback], samples: list[Sample], epochs: int, seed: int
) -> tuple[MultiTaskModule, dict[str, Tensor], dict[str, float]]:
    """Return the module, its parameters before the training and the validation metrics after it."""
    pl.seed_everything(seed, verbose=False)
    train, val = split(samples, seed)
    collate = Collate(train)
    module = Sentences(
        encoder=bert_with_lora(len(collate)),
        tasks=[
            TaggingTask("tags", in_features=WIDTH, num_classes=len(TAGS), ignore_index=NO_TAG),
            ClassificationTask("kind", in_features=WIDTH, num_classes=len(KINDS)),
        ],
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3),
        gradient_clip_val=1.0,
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
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
    (metrics,) = trainer.validate(module, DataLoader(val, 64, collate_fn=collate), verbose=False)
    return module, before, metrics


def split(samples: list[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Three quarters for training, one for validation."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [samples[i] for i in order]
    first = 3 * len(samples) // 4
    return shuffled[:first], shuffled[first:]


def show_what_moved(module: MultiTaskModule, before: dict[str, Tensor]) -> None:
    """How many weights each part has, and how many of them the training has changed."""
    count: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        part = "adapters" if "lora_" in name else "heads" if name.startswith("heads") else "frozen"
        count[part] += parameter.numel()
        moved[part] += int((parameter != before[name]).sum())
    print(f"\n{'weights':<18}{'number':>12}{'changed':>12}")
    for part in ("frozen", "adapters", "heads"):
        print(f"{part:<18}{count[part]:>12}{moved[part]:>12}")


def main() -> None:
    """Train with and without the callbacks, print the validation table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that it runs")
    arguments = parser.parse_args()
    epochs = 1 if arguments.fast else arguments.epochs
    samples = read_sentences()
    train, val = split(samples, arguments.seed)
    print(f"{len(train)} sentences for training, {len(val)} for validation")
    print(f"\n{'validation':<18}{'tags accuracy':>15}{'tags F1':>12}{'kind accuracy':>16}")
    tags = [tag for _, tags, _ in val for tag in tags]
    kinds = Counter(kind for _, _, kind in train).most_common(1)[0][0]
    kind = sum(kind == kinds for _, _, kind in val) / len(val)
    none = tags.count(TAGS.index("O")) / len(tags)
    print(f"{'most frequent':<18}{100 * none:>13.2f} %{'-':>10}{100 * kind:>16.2f} %")
    for name, callbacks in (
        ("CAGrad + TaskSAM", [CAGrad(c=0.4), TaskSAM(rho=0.05)]),
        ("plain sum", []),
    ):
        found = train_and_validate(callbacks, samples, epochs, arguments.seed)
        module, before, got = found
        values = [got[f"val/{key}"] for key in ("tags/accuracy", "tags/f1", "kind/accuracy")]
        accuracy, f1, kind = (100 * value for value in values)
        print(f"{name:<18}{accuracy:>13.2f} %{f1:>10.2f} %{kind:>14.2f} %", flush=True)
    show_what_moved(module, before)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    advices = (
        "does not have many workers",
        "have no `val_dataloader`",
        "is_gradient_checkpointing",
    )
    for advice in advices:
        warnings.filterwarnings("ignore", f".*{advice}.*")
    main()
