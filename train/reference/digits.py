"""Handwritten digits (scikit-learn's 1,797 real scans), split by scan, and 3x3 grids drawn from them.

A scan belongs to exactly one split, decided before any grid is composed: a held-out grid shows digits no
training step has seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")

GRID = 3  # digits per side
CELL = 16  # pixels per digit and side: an 8x8 scan, enlarged twice
IMAGE_SIZE = GRID * CELL
_SPLIT_SEED = 20250925
_HELD_OUT = 300  # scans in each of calibration and test


@dataclass(frozen=True)
class Scans:
    """Digit scans of one split: `pixels` uint8 [n, 8, 8] (0 background, 255 ink) and `labels` int [n]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


@cache
def load_scans(split: Split) -> Scans:
    """The scans of one split, the same on every machine.

    Raises:
        ValueError: `split` is not one of train, calibration, test.
    """
    if split not in SPLITS:
        raise ValueError(f"`split`: got {split!r}, expected one of {', '.join(SPLITS)}.")
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    test, calibration, train = np.split(order, [_HELD_OUT, 2 * _HELD_OUT])
    chosen = {"train": train, "calibration": calibration, "test": test}[split]
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return Scans(pixels, digits.target[chosen].astype(np.int64))


@dataclass(frozen=True)
class Grid:
    """Nine digits in reading order and the index of the scan drawn in each cell."""

    digits: tuple[int, ...]
    scans: tuple[int, ...]


def draw_grid(scans: Scans, rng: np.random.Generator) -> Grid:
    """Compose one grid from a random palette of 2 to 10 digits.

    Small palettes repeat digits, so that counts range from 0 to 9 instead of hardly ever leaving 0 to 2.
    """
    palette = rng.choice(10, size=rng.integers(2, 11), replace=False)
    digits = rng.choice(palette, size=GRID * GRID)
    chosen = [int(rng.choice(np.flatnonzero(scans.labels == digit))) for digit in digits]
    return Grid(tuple(int(d) for d in digits), tuple(chosen))


def render(cells: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Draw nine scans [9, 8, 8] as one RGB image [48, 48, 3], each pixel enlarged to 2x2."""
    enlarged = cells.repeat(2, axis=1).repeat(2, axis=2)
    image = enlarged.reshape(GRID, GRID, CELL, CELL).swapaxes(1, 2).reshape(IMAGE_SIZE, IMAGE_SIZE)
    return np.repeat(image[..., None], 3, axis=2)


def cell_patches(cells: Sequence[int], patches: int) -> NDArray[np.bool_]:
    """Which of an image's patches, in reading order, show one of some cells.

    Args:
        cells: 0 to 8, in reading order.
        patches: number of them: a square of which each cell has as many.

    Raises:
        ValueError: `patches` is no such square, or there is no such cell.

    Example:
        >>> cell_patches([8], 36).nonzero()[0].tolist()
        [28, 29, 34, 35]
    """
    side = math.isqrt(patches)
    if side * side != patches or side % GRID:
        raise ValueError(f"`patches`: got {patches}, expected a square whose side is a multiple of {GRID}, such as 36.")
    if wrong := [cell for cell in cells if not 0 <= cell < GRID * GRID]:
        raise ValueError(f"`cells`: got {wrong}, expected numbers from 0 to {GRID * GRID - 1}.")
    shown = np.zeros((GRID, GRID), dtype=np.bool_)
    shown.flat[list(cells)] = True
    return shown.repeat(side // GRID, axis=0).repeat(side // GRID, axis=1).ravel()
