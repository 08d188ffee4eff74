"""The depth map of one answer: how many layers each patch of the image and each word of the text ran."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from PIL.Image import Image

from skipit.eval.statistics import Floats

from .style import VALUES, hatch, ink, saved

MOST_PATCHES_WITH_LINES = 16
CHARACTERS_PER_LINE = 92


def draw_depth_map(
    image: Image,
    vision_depth: ArrayLike,
    tokens: Sequence[str],
    token_depth: Sequence[float],
    layers: int,
    title: str,
) -> Figure:
    """Draw an image beside the number of layers executed on each of its patches, and text coloured by the same number.

    Args:
        image: The image as the model's processor received it.
        vision_depth: Layers executed per patch, shape [rows, columns], in [0, layers]; NaN is hatched.
        tokens: The text tokens, decoded one by one, in reading order.
        token_depth: Layers executed per text token, in [0, layers]; NaN is grey.
        layers: Number of decoder layers.
        title: Title of the figure, such as the question and the answer.

    Returns:
        The figure: two panels above, the text below.

    Raises:
        ValueError: If shapes do not fit or a depth is outside [0, layers].

    Example:
        >>> from PIL import Image
        >>> figure = draw_depth_map(Image.new("L", (8, 8)), [[1, 3], [4, 2]], ["Hi", "there"], [4, 2], 4, "greeting")
        >>> figure.axes[1].get_title()
        'layers executed per patch (mean 2.5 of 4)'
    """
    patches, words = np.asarray(vision_depth, dtype=np.float64), np.asarray(token_depth, dtype=np.float64)
    _check_depths(patches, tokens, words, layers)
    # Monospace glyphs are 0.6 of the font size wide: lines can be broken without asking a renderer.
    lines = _broken_into_lines([_visible(token) for token in tokens])
    shape = max(0.5, min(image.height / image.width, 2.0))
    # In inches; the rest is for titles.
    upper, lower = 3.1 * shape, 0.22 * max(len(lines), 1)
    figure = Figure(figsize=(7.2, upper + lower + 0.85), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[upper, lower])
    left, right, text = (figure.add_subplot(part) for part in (grid[0, 0], grid[0, 1], grid[1, :]))
    norm = Normalize(0, layers)
    left.imshow(image, cmap="gray" if image.mode in ("1", "L", "I", "F") else None)
    left.set_title("image", fontsize=9)
    _overlay(right, image, patches, norm)
    right.set_title(f"layers executed per patch ({_mean_of(patches, layers)})", fontsize=9)
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
    _coloured_text(text, lines, words, norm)
    text.set_title(f"layers executed per text token ({_mean_of(words, layers)})", fontsize=9)
    bar = figure.colorbar(ScalarMappable(norm, VALUES), ax=right, fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    bar.ax.tick_params(labelsize=7)
    bar.set_label("layers executed", fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


plot_depth_map = saved(draw_depth_map)


def _check_depths(patches: Floats, tokens: Sequence[str], words: Floats, layers: int) -> None:
    if patches.ndim != 2 or words.shape != (len(tokens),):
        raise ValueError(
            f"`vision_depth` has shape {patches.shape} and `token_depth` {words.shape} for {len(tokens)} tokens, "
            "expected [rows, columns] and one depth per token. Reshape the patches to their grid."
        )
    for name, depths in (("vision_depth", patches), ("token_depth", words)):
        if np.any((depths < 0) | (depths > layers)):
            raise ValueError(
                f"`{name}` goes from {np.nanmin(depths):g} to {np.nanmax(depths):g}, expected layers executed in "
                f"[0, {layers}]. Sum the run mask over layers."
            )


def _mean_of(depths: Floats, layers: int) -> str:
    there = depths[~np.isnan(depths)]
    return f"mean {there.mean():.1f} of {layers}" if there.size else "none"


def _overlay(axes: Axes, image: Image, patches: Floats, norm: Normalize) -> None:
    """The image in grey under its patches coloured by depth, so that hue means depth only."""
    # Little contrast, since black and white under a colour would shift it away from the colour bar.
    axes.imshow(image.convert("L"), cmap="gray", vmin=-200, vmax=400)
    rows, columns = patches.shape
    extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    masked = np.ma.masked_where(np.isnan(patches), patches)
    axes.imshow(masked, VALUES, norm, extent=extent, alpha=0.7, interpolation="nearest")
    wide, high = image.width / columns, image.height / rows
    for row, column in np.argwhere(np.isnan(patches)):
        hatch(axes, column * wide - 0.5, row * high - 0.5, wide, high)
    if max(rows, columns) <= MOST_PATCHES_WITH_LINES:
        axes.vlines(np.arange(1, columns) * wide - 0.5, -0.5, image.height - 0.5, colors="white", linewidth=0.4)
        axes.hlines(np.arange(1, rows) * high - 0.5, -0.5, image.width - 0.5, colors="white", linewidth=0.4)


def _visible(token: str) -> str:
    """A token on one line: line breaks as a sign, word markers of tokenizers as spaces."""
    for sign, shown in (
        ("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"),
        ("\t", " "),
        ("\u2581", " "),
        ("\u0120", " "),
    ):
        token = token.replace(sign, shown)
    return token


def _broken_into_lines(tokens: Sequence[str]) -> list[list[str]]:
    """Tokens in lines that fit the figure; a longer token has a line of its own."""
    lines: list[list[str]] = []
    used = CHARACTERS_PER_LINE + 1
    for token in tokens:
        if used + _width(token) > CHARACTERS_PER_LINE:
            lines.append([])
            used = 0
        lines[-1].append(token)
        used += _width(token)
    return lines


def _width(token: str) -> int:
    return max(len(token), 1) + 1


def _coloured_text(axes: Axes, lines: list[list[str]], depths: Floats, norm: Normalize) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, CHARACTERS_PER_LINE), ylim=(max(len(lines), 1), 0))
    remaining = iter(depths)
    for row, line in enumerate(lines):
        start = 0
        for token in line:
            depth = next(remaining)
            colour = (0.9, 0.9, 0.9, 1.0) if math.isnan(depth) else VALUES(norm(depth))
            box = Rectangle((start, row + 0.06), _width(token) - 0.15, 0.88, facecolor=colour, linewidth=0)
            axes.add_patch(box)
            middle = start + (_width(token) - 0.15) / 2
            axes.text(
                middle,
                row + 0.52,
                token,
                ha="center",
                va="center",
                fontsize=8,
                family="monospace",
                color=ink(colour),
                parse_math=False,
            )
            start += _width(token)
