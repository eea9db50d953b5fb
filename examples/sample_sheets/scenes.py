"""Rooms and streets with right labels, depths and normals, drawn by casting rays.

For sample sheets where the real data are not at hand. The camera stands at the origin; x goes to
the right, y up, z towards whoever looks, so that what is seen has z < 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Point = tuple[float, float, float]
LIGHT = np.array([0.3, 0.8, 0.5])


@dataclass(frozen=True)
class Box:
    """A box between two corners: its class, its colour, and whether depth can be measured on it."""

    low: Point
    high: Point
    label: int
    colour: Point
    seen: bool = True
    tiles: bool = False

    def hit(self, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far along each ray, infinite where it misses, and the normal there."""
        near, far = np.sort([np.divide(self.low, rays), np.divide(self.high, rays)], axis=0)
        enter, leave = near.max(-1), far.min(-1)
        hits = (leave > enter) & (enter > 0)
        axis = np.eye(3)[near.argmax(-1)]
        return np.where(hits, enter, np.inf), -np.sign(rays) * axis


@dataclass(frozen=True)
class Ball:
    """A ball."""

    centre: Point
    radius: float
    label: int
    colour: Point
    seen: bool = True
    tiles: bool = False

    def hit(self, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far along each ray, infinite where it misses, and the normal there."""
        square, along = (rays**2).sum(-1), rays @ np.array(self.centre)
        root = along**2 - square * (np.sum(np.square(self.centre)) - self.radius**2)
        far = np.where(root > 0, (along - np.sqrt(np.maximum(root, 0))) / square, np.inf)
        at = rays * np.where(np.isfinite(far), far, 0)[..., None]
        return far, (at - np.array(self.centre)) / self.radius


def render(things: Sequence[Box | Ball], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Image, labels (-1: nothing there), depth (0: none), normals (zero: none) of what is seen."""
    height, width = size
    across = (np.arange(width) + 0.5 - width / 2) / (0.45 * width)
    up = (height / 2 - np.arange(height) - 0.5) / (0.45 * width)
    rays = np.stack(np.broadcast_arrays(across, up[:, None], -1.0), axis=-1)
    far = np.full(size, np.inf)
    scene = {
        "image": np.zeros((*size, 3)),
        "labels": np.full(size, -1.0),
        "depth": np.zeros((*size, 1)),
        "normals": np.zeros((*size, 3)),
    }
    for thing in things:
        distance, normals = thing.hit(rays)
        nearer = distance < far
        far[nearer] = distance[nearer]
        at = rays[nearer] * far[nearer, None]
        shade = 0.45 + 0.5 * np.clip(normals[nearer] @ LIGHT, 0, 1)
        if thing.tiles:
            shade *= np.where(np.floor(at[:, [0, 2]]).sum(-1) % 2, 1.0, 0.85)
        scene["image"][nearer] = np.array(thing.colour) * shade[:, None]
        scene["labels"][nearer] = thing.label
        scene["depth"][nearer] = -at[:, 2:] * thing.seen
        scene["normals"][nearer] = normals[nearer] * thing.seen
    return scene


def write(root: Path, scene: dict[str, np.ndarray], names: dict[str, str]) -> Path:
    """Write the scene twice, for training and for testing, as the packs of MTAN are laid out."""
    for split in ("train", "val"):
        for name, folder in names.items():
            (root / split / folder).mkdir(parents=True)
            np.save(root / split / folder / "0.npy", scene[name])
    return root
