"""Women's E-Commerce Clothing Reviews: stars, recommendation, department, punctuation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._in_memory import InMemory
from lightning_flatmtl.data._review_groups import deal_out, grouped
from lightning_flatmtl.data._reviews_files import (
    DEPARTMENTS,
    Review,
    find_reviews,
    read_reviews,
    words_of,
)
from lightning_flatmtl.data._splits import SPLITS, Split, SplitModule

__all__ = ["ClothingReviews", "ReviewTexts"]

Batch = tuple[dict[str, Tensor], dict[str, Tensor]]

PADDING, UNKNOWN, TITLE_ENDS = range(3)
_SPECIAL = 3
_NO_TAG = -100
_TAG_OF = {",": 1, ".": 2, ";": 2, ":": 2, "?": 2, "…": 2, "!": 3}


class ReviewTexts(InMemory[Batch]):
    """Reviews as ids of words, with their labels.

    Item ``i`` is ``({"tokens": ..., "lengths": ...}, {task: ...})``, not padded.

    Attributes:
        tokens: The ids of all reviews one behind the other, int64.
        lengths: Their numbers of tokens, int64 ``[reviews]``.
        targets: Labels by task, ``[reviews]``.
        tags: The punctuation behind each token, as ``tokens``; ``None`` if it is no task.
    """

    def __init__(
        self,
        tokens: Tensor,
        lengths: Tensor,
        targets: dict[str, Tensor],
        tags: Tensor | None = None,
    ) -> None:
        self.tokens, self.lengths, self.targets, self.tags = tokens, lengths, targets, tags
        self._starts = lengths.cumsum(0) - lengths

    @override
    def batch(self, rows: Tensor) -> Batch:
        lengths = self.lengths[rows]
        places = torch.arange(int(lengths.max()))
        there = places < lengths[:, None]
        at = (self._starts[rows, None] + places).where(there, 0)
        inputs = {"tokens": self.tokens[at].where(there, PADDING), "lengths": lengths}
        targets = {task: labels[rows] for task, labels in self.targets.items()}
        if self.tags is not None:
            targets["punctuation"] = self.tags[at].where(there, _NO_TAG)
        return inputs, targets

    @override
    def __len__(self) -> int:
        return len(self.lengths)


class ClothingReviews(SplitModule[ReviewTexts]):
    r"""How many stars, is it recommended, and what is it about: reviews of clothes.

    `Women's E-Commerce Clothing Reviews
    <https://www.kaggle.com/datasets/nicapotato/womens-ecommerce-clothing-reviews>`_: 23,486 reviews
    of 1,206 products, in English. Tasks:

    - ``rating``: the stars, int64, 0 for one to 4 for five;
    - ``recommended``: whether the customer recommends the product, float32, 0 or 1;
    - ``department``: of the product, int64, the place in :attr:`DEPARTMENTS`, -1 where it is
      missing (13 reviews; the task needs ``missing: -1``);
    - ``punctuation``, with ``tags=True``: a tag for every word, int64 ``[batch, longest]``, what
      stands behind it in the review: the place in :attr:`TAGS`, -100 for padding. **The marks are
      taken out of the input then**, for all tasks. The tags are what the customers typed, errors
      included; nobody has checked them.

    A review is its title, a mark that ends it, and its text, as words in small letters, numbers
    and, without ``tags``, marks; what is behind the ``longest`` token is cut. Reviews with
    neither title nor text are left out, 844 of the published file. Ids: 0 is padding, 1 an unknown
    word, 2 the end of the title; then the words of the training reviews that come at least
    ``min_count`` times, the frequent ones first, as long as there are ids. What a review consists
    of is known when data is read, so the size of the table, which the model needs before, is an
    argument: ``vocabulary``.

    **No product and no text is in two splits**: reviews of one product stay together, and so do
    reviews with the same words, so that nothing can be known by heart. Products are dealt out
    department by department, whose shares are about the same in all splits; as some products have
    hundreds of reviews, they are not quite.

    A batch is ``({"tokens": int64 [batch, longest], "lengths": int64 [batch]}, targets)``, padded
    to its longest review. The prediction loader yields inputs alone. The last, incomplete training
    batch is left out. The order of the training batches comes from torch's global generator.

    Args:
        root: Folder that has ``reviews`` with the file in it, or the file itself: ``reviews.csv``
            or ``Womens Clothing E-Commerce Reviews.csv``.
        batch_size: Reviews in a batch (per process), at least 1.
        vocabulary: Number of ids, the three special ones included, at least 4.
        longest: Tokens of a review, at least 1.
        min_count: How often a word must come in the training reviews to have an id, at least 1.
        tags: Whether ``punctuation`` is a task.
        val_fraction: Share of the reviews for validation, in (0, 1).
        test_fraction: Share of the reviews for testing, in (0, 1).
        seed: Seed of the splits, at least 0; not of shuffling.
        num_workers: Worker processes of every loader, at least 0. The data lies in memory, so 0
            is usually the fastest.
        pin_memory: Whether loaders copy batches to page-locked memory, which speeds up the way to
            a GPU.

    Attributes:
        words: After ``setup``, the words that have an id of their own, in the order of the ids from
            3.
        counts: After ``setup``, how many ``reviews`` the file has, and how many of them are
            ``without_text``, ``without_department`` (of those with a text) and ``twins``, whose
            words another review has as well.
        source_rows: After ``setup``, the rows of the file that each split consists of, sorted
            int64, 0 for the first below the header.

    Raises:
        FileNotFoundError: In ``setup``, if the file is not there; it says where to get it.
        ValueError: If an argument is out of its bounds or, in ``setup``, the file is something
            else.
    """

    DEPARTMENTS: ClassVar[tuple[str, ...]] = DEPARTMENTS
    """Names of the departments, in the order of the labels."""

    TAGS: ClassVar[tuple[str, ...]] = ("nothing", "comma", "stop", "exclamation mark")
    """What may stand behind a word; a stop is one of ``. ; : ?`` and the ellipsis."""

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 64,
        vocabulary: int = 5000,
        longest: int = 128,
        min_count: int = 2,
        tags: bool = False,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory)
        check(vocabulary > _SPECIAL, "vocabulary", f"at least {_SPECIAL + 1}", vocabulary)
        check(longest >= 1, "longest", "at least 1", longest)
        check(min_count >= 1, "min_count", "at least 1", min_count)
        check(0 < val_fraction < 1, "val_fraction", "in (0, 1)", val_fraction)
        bound = f"in (0, {1 - val_fraction:g}), so that training has a share"
        check(0 < test_fraction < 1 - val_fraction, "test_fraction", bound, test_fraction)
        check(seed >= 0, "seed", "at least 0", seed)
        self.root, self.vocabulary, self.longest = Path(root), vocabulary, longest
        self.min_count, self.tags, self.seed = min_count, tags, seed
        self.shares = (1 - val_fraction - test_fraction, val_fraction, test_fraction)
        self.words: tuple[str, ...] = ()
        self.counts: dict[str, int] = {}
        self.source_rows: dict[Split, Tensor] = {}

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read, split and encode; a second call, whatever its stage, changes nothing."""
        if self._datasets:
            return
        everything = read_reviews(find_reviews(self.root))
        reviews = [review for review in everything if review.title or review.text]
        texts = [_text(review) for review in reviews]
        keys = [_key(review) for review in reviews]
        often = Counter(key for key in keys if key is not None)
        self.counts = {
            "reviews": len(everything),
            "without_text": len(everything) - len(reviews),
            "without_department": sum(review.department is None for review in reviews),
            "twins": sum(count for count in often.values() if count > 1),
        }
        products = [review.product for review in reviews]
        groups = grouped(products, keys)
        kinds = [reviews[group[0]].department for group in groups]
        parts = deal_out(groups, kinds, self.shares, self.seed)
        rows = dict(zip(SPLITS, parts, strict=True))
        for split in SPLITS:
            if not rows[split]:
                raise ValueError(
                    "`val_fraction` and `test_fraction` must leave every split a review, got none "
                    f"for '{split}' of {len(reviews)} reviews of {len(set(products))} products."
                )
        self._fit([texts[row] for row in rows["train"]])
        for split in SPLITS:
            chosen = [reviews[row] for row in rows[split]]
            self._datasets[split] = self._encoded(chosen, [texts[row] for row in rows[split]])
            self.source_rows[split] = torch.tensor([review.row for review in chosen])

    def _fit(self, texts: Sequence[list[str]]) -> None:
        """Learn the words of the training reviews."""
        count = Counter(
            word for text in texts for word in text if word and (word[0].isalnum() or not self.tags)
        )
        often = [word for word in count if count[word] >= self.min_count]
        often.sort(key=lambda word: (-count[word], word))
        self.words = tuple(often[: self.vocabulary - _SPECIAL])

    def _encoded(self, reviews: Sequence[Review], texts: Sequence[list[str]]) -> ReviewTexts:
        number = {word: k for k, word in enumerate(self.words, _SPECIAL)}
        number[""] = TITLE_ENDS
        tokens: list[int] = []
        tags: list[int] = []
        lengths = []
        for text in texts:
            words, of_words = _tagged(text) if self.tags else (text, [0] * len(text))
            words, of_words = words[: self.longest], of_words[: self.longest]
            tokens += [number.get(word, UNKNOWN) for word in words]
            tags += of_words
            lengths.append(len(words))
        place = {name: k for k, name in enumerate(DEPARTMENTS)}
        departments = [-1 if r.department is None else place[r.department] for r in reviews]
        targets = {
            "rating": torch.tensor([review.stars - 1 for review in reviews]),
            "recommended": torch.tensor([float(review.recommended) for review in reviews]),
            "department": torch.tensor(departments),
        }
        kept = torch.tensor(tags) if self.tags else None
        return ReviewTexts(torch.tensor(tokens), torch.tensor(lengths), targets, kept)


def _text(review: Review) -> list[str]:
    """Title, its end (the empty word) and text."""
    title = words_of(review.title)
    return [*title, "", *words_of(review.text)] if title else words_of(review.text)


def _key(review: Review) -> tuple[str, ...] | None:
    """What makes two reviews the same: the words of the text, or of the title without one."""
    words = words_of(review.text) or words_of(review.title)
    return tuple(word for word in words if word[0].isalnum()) or None


def _tagged(text: Sequence[str]) -> tuple[list[str], list[int]]:
    """The words without any marks, and for each what stands behind it.

    Of several marks the first that is a tag counts. The end of the title has no tag.
    """
    words: list[str] = []
    tags: list[int] = []
    for word in text:
        if not word:
            words.append(word)
            tags.append(_NO_TAG)
        elif word[0].isalnum():
            words.append(word)
            tags.append(0)
        elif word in _TAG_OF and tags and tags[-1] == 0:
            tags[-1] = _TAG_OF[word]
    return words, tags
