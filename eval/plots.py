"""Figures of a report: what is redundant and skipped where, what it costs, how deep each patch and word is computed.

Each `draw_*` returns a `matplotlib.figure.Figure`, each `plot_*` saves one as PNG or SVG. Nothing touches pyplot's
global state. Colours are safe for colour-blind readers: viridis for values, Okabe and Ito's for lines and points.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from PIL.Image import Image
from scipy.stats import spearmanr

from .metrics import MODALITIES

# Okabe and Ito 2008 without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>h"
MODALITY_COLOURS = {"text": "#0072B2", "vision": "#D55E00"}
VALUES = colormaps["viridis"]
MOST_LAYERS_WITH_NUMBERS = 32
MOST_PATCHES_WITH_LINES = 16
CHARACTERS_PER_LINE = 92

Point = tuple[str, float, float, float]
Floats = NDArray[np.float64]


def plot_layer_modality_heatmaps(
    path: str | Path, tables: Mapping[str, ArrayLike], ranges: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Save the figure of `draw_layer_modality_heatmaps` as `path`, PNG or SVG."""
    _save(draw_layer_modality_heatmaps(tables, ranges), path)


def draw_layer_modality_heatmaps(
    tables: Mapping[str, ArrayLike], ranges: Mapping[str, tuple[float, float]] | None = None
) -> Figure:
    """Draw tables over (layer, modality) as heat maps side by side, each with its own colour bar.

    A table without negative values that spans a factor of thirty or more is coloured on a log scale, unless `ranges`
    has its ends: give a rate the range (0, 1). Units without a value are hatched.

    Args:
        tables: Arrays of shape [layers, 2], columns text and vision, by title; the title says the unit.
        ranges: Ends of a linear colour bar by title; by default those of the values.

    Returns:
        The figure: one panel per table, layer 0 on top.

    Raises:
        ValueError: If there is no table, a table has another shape, or a range has no table or no width.

    Example:
        >>> figure = draw_layer_modality_heatmaps({"skip rate": [[0.0, 0.9], [0.1, 0.5]]}, {"skip rate": (0, 1)})
        >>> figure.axes[0].get_title()
        'skip rate'
    """
    arrays = {title: np.asarray(table, dtype=np.float64) for title, table in tables.items()}
    shapes = {title: array.shape for title, array in arrays.items()}
    if len(set(shapes.values())) != 1 or any(shape[1:] != (2,) or not shape[0] for shape in shapes.values()):
        raise ValueError(
            f"`tables` has shapes {shapes}, expected one or more tables of the same shape [layers, 2] (columns text "
            "and vision). Put NaN where a unit has no value."
        )
    ranges = ranges or {}
    if wrong := {title: ends for title, ends in ranges.items() if title not in tables or not ends[0] < ends[1]}:
        raise ValueError(f"`ranges` has {wrong}, expected (low, high) by titles among {list(tables)}. Correct these.")
    layers = len(next(iter(arrays.values())))
    height = 0.9 + max(1.6, min(0.24 * layers, 7.7))
    figure = Figure(figsize=(0.4 + 1.75 * len(arrays), height), layout="constrained")
    panels = figure.subplots(1, len(arrays), sharey=True, squeeze=False)[0]
    for axes, (title, array) in zip(panels, arrays.items(), strict=True):
        norm = _norm(array, ranges.get(title))
        _heatmap(axes, array, norm)
        axes.set_title(title, fontsize=9)
        bar = figure.colorbar(ScalarMappable(norm, VALUES), ax=axes, fraction=0.1, pad=0.04, aspect=11 * (height - 0.8))
        bar.ax.tick_params(labelsize=7)
        bar.ax.yaxis.set_minor_formatter(NullFormatter())  # on short log scales these would be long and large
    panels[0].set_ylabel("decoder layer", fontsize=9)
    return figure


def plot_depth_map(
    path: str | Path,
    image: Image,
    vision_depth: ArrayLike,
    tokens: Sequence[str],
    token_depth: Sequence[float],
    layers: int,
    title: str,
) -> None:
    """Save the figure of `draw_depth_map` as `path`, PNG or SVG."""
    _save(draw_depth_map(image, vision_depth, tokens, token_depth, layers, title), path)


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


def plot_pareto(path: str | Path, points: Sequence[Point], error: str = "standard error") -> None:
    """Save the figure of `draw_pareto` as `path`, PNG or SVG."""
    _save(draw_pareto(points, error), path)


def draw_pareto(points: Sequence[Point], error: str = "standard error") -> Figure:
    """Draw accuracy against compute, one line per method, with the frontier that no point is above and left of.

    Args:
        points: (name, compute share, accuracy, error), all three as shares in [0, 1]; points of one name are one line.
            NaN as error draws no bar.
        error: What the error is, for the legend.

    Returns:
        The figure, in percent.

    Raises:
        ValueError: If there is no point or a share is not finite.

    Example:
        >>> figure = draw_pareto([("dense", 1.0, 0.94, 0.01), ("router", 0.5, 0.93, 0.01), ("router", 0.25, 0.9, 0.02)])
        >>> figure.axes[0].get_xlabel()
        'decoder FLOPs executed (% of dense)'
    """
    bad = [point for point in points if not (math.isfinite(point[1]) and math.isfinite(point[2]))]
    if bad or not points:
        raise ValueError(
            f"`points` has {len(points)} points, not finite: {bad[:3]}, expected (name, compute share, accuracy, "
            "error). Leave out what was not measured."
        )
    methods: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point[1]):
        methods.setdefault(point[0], []).append(point)
    figure = Figure(figsize=(6.6, 3.8), layout="constrained")
    axes = figure.subplots()
    frontier = _frontier(points)
    axes.plot(
        *frontier,
        drawstyle="steps-post",
        color="#D8D8D8",
        linewidth=4,
        solid_capstyle="butt",
        label="frontier",
        zorder=1,
    )
    names = sorted(methods, key=[point[0] for point in points].index)
    for index, name in enumerate(names):
        _, shares, accuracies, errors = zip(*methods[name], strict=True)
        axes.errorbar(
            shares,
            accuracies,
            yerr=np.array(errors, dtype=np.float64),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="-" if index < len(COLOURS) else "--",
            markersize=5,
            linewidth=1.2,
            elinewidth=1,
            capsize=2.5,
            label=name,
            zorder=3,
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.set_xlim(left=0)
    axes.set_xlabel("decoder FLOPs executed (% of dense)", fontsize=9)
    axes.set_ylabel("held-out accuracy (%)", fontsize=9)
    axes.set_title(f"accuracy against compute (bars: {error})", fontsize=10)
    _plain(axes)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def plot_scatter(
    path: str | Path, predicted: ArrayLike, measured: ArrayLike, labels: tuple[str, str], diagonal: bool = False
) -> None:
    """Save the figure of `draw_scatter` as `path`, PNG or SVG."""
    _save(draw_scatter(predicted, measured, labels, diagonal), path)


def draw_scatter(predicted: ArrayLike, measured: ArrayLike, labels: tuple[str, str], diagonal: bool = False) -> Figure:
    """Draw a prediction against its measurement per unit on log axes, with rank correlations.

    Values that are zero or negative are drawn hollow at the edge of the axes: they count in the rank correlation.

    Args:
        predicted: What the theory predicts, shape [layers, 2]; NaN where a unit has no tokens.
        measured: What controlled skipping measures, shape [layers, 2].
        labels: Labels of the horizontal and the vertical axis, with units.
        diagonal: Whether both are in the same unit, so that a line of equality means something.

    Returns:
        The figure: one point per unit, numbered by layer.

    Raises:
        ValueError: If the shapes are not [layers, 2] or nothing positive is left to draw.

    Example:
        >>> figure = draw_scatter([[1e-3, 1e-1], [1e-2, 1.0]], [[2e-3, 1e-1], [1e-2, 3.0]], ("predicted", "measured"))
        >>> figure.axes[0].get_title()
        'Spearman 1.00 over 4 units'
    """
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if x.shape != y.shape or x.shape[1:] != (2,):
        raise ValueError(
            f"`predicted` has shape {x.shape} and `measured` {y.shape}, expected [layers, 2] for both (columns text "
            "and vision). Put NaN where a unit has no value."
        )
    there = np.isfinite(x) & np.isfinite(y)
    if not ((x > 0) & there).any() or not ((y > 0) & there).any():
        raise ValueError(
            "`predicted` and `measured` have no unit with finite values of which one is positive, expected some "
            "for log axes. Check what was measured."
        )
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    x_edge, y_edge = (0.5 * values[there & (values > 0)].min() for values in (x, y))
    for column, modality in enumerate(MODALITIES):
        _unit_points(axes, x[:, column], y[:, column], (x_edge, y_edge), modality)
    if diagonal:
        limits = axes.axis()
        axes.axline((1, 1), (10, 10), color="#999999", linewidth=1, linestyle="--", zorder=1, label="equal")
        axes.axis(limits)
    axes.set_xlabel(labels[0], fontsize=9)
    axes.set_ylabel(labels[1], fontsize=9)
    axes.set_title(f"Spearman {_rank_correlation(x[there], y[there])} over {there.sum()} units", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    return figure


def _save(figure: Figure, path: str | Path) -> None:
    """Save a figure as the kind of file that its name ends in."""
    kind = Path(path).suffix.lower()
    if kind not in (".png", ".svg"):
        raise ValueError(f"`path` is {str(path)!r}, expected a name that ends in .png or .svg. Rename it.")
    # A date or random ids in the file would make equal figures differ.
    with rc_context({"svg.hashsalt": "skipit"}):
        figure.savefig(path, dpi=200, metadata={"Date": None} if kind == ".svg" else None)


def _norm(array: Floats, ends: tuple[float, float] | None) -> Normalize:
    """The colour scale of a table: logarithmic where positive values span a factor of thirty, none negative."""
    if ends is not None:
        return Normalize(*ends, clip=True)
    values = array[np.isfinite(array)]
    if not values.size:
        return Normalize(0, 1)
    positive = values[values > 0]
    if positive.size and values.min() >= 0 and positive.max() >= 30 * positive.min():
        return LogNorm(positive.min(), positive.max(), clip=True)
    low, high = values.min(), values.max()
    return Normalize(low, high if high > low else low + 1, clip=True)


def _heatmap(axes: Axes, array: Floats, norm: Normalize) -> None:
    layers = len(array)
    axes.imshow(np.ma.masked_where(np.isnan(array), array), VALUES, norm, aspect="auto", interpolation="nearest")
    for layer, column in np.ndindex(array.shape):
        value = float(array[layer, column])
        if math.isnan(value):
            _hatch(axes, column - 0.5, layer - 0.5, 1, 1)
        elif layers <= MOST_LAYERS_WITH_NUMBERS:
            ink = _ink(VALUES(norm(value)))
            axes.text(column, layer, _short(value, norm), ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(len(MODALITIES)), MODALITIES, fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, steps=[1, 2, 4, 5, 10]))
    axes.tick_params(labelsize=8, length=2)


def _hatch(axes: Axes, left: float, top: float, wide: float, high: float) -> None:
    """Mark a place without a value."""
    axes.add_patch(
        Rectangle((left, top), wide, high, facecolor="#E6E6E6", edgecolor="#9A9A9A", hatch="////", linewidth=0)
    )


def _short(value: float, norm: Normalize) -> str:
    """A number in a few characters: as many decimals for a whole table where they suffice, else as 0.043 or 3e-5."""
    low, high = float(norm.vmin or 0), float(norm.vmax or 0)
    decimals = 2 - math.floor(math.log10(high - low))
    if not isinstance(norm, LogNorm) and 0 <= decimals <= 4 and math.isfinite(value):
        return f"{value:.{decimals}f}"
    if value and (abs(value) < 0.01 or abs(value) >= 1000):
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def _ink(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue, _ = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


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
        _hatch(axes, column * wide - 0.5, row * high - 0.5, wide, high)
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
                color=_ink(colour),
                parse_math=False,
            )
            start += _width(token)


def _frontier(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Shares and accuracies of the points that no cheaper point reaches, in order of compute."""
    shares: list[float] = []
    accuracies: list[float] = []
    for _, share, accuracy, _ in sorted(points, key=lambda point: (point[1], -point[2])):
        if not accuracies or accuracy > accuracies[-1]:
            shares.append(share)
            accuracies.append(accuracy)
    return shares, accuracies


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _unit_points(axes: Axes, x: Floats, y: Floats, edges: tuple[float, float], modality: str) -> None:
    """The points of one modality, numbered by layer; hollow at the edge where a logarithm has no place for them."""
    there = np.isfinite(x) & np.isfinite(y)
    if not there.any():
        return
    marker, colour = MARKERS[MODALITIES.index(modality)], MODALITY_COLOURS[modality]
    inside = there & (x > 0) & (y > 0)
    shown_x, shown_y = np.where(x > 0, x, edges[0]), np.where(y > 0, y, edges[1])
    label = f"{modality} (\N{GREEK SMALL LETTER RHO} = {_rank_correlation(x[there], y[there])})"
    axes.scatter(shown_x[inside], shown_y[inside], s=22, color=colour, marker=marker, label=label, zorder=3)
    at_edge = there & ~inside
    if at_edge.any():
        axes.scatter(
            shown_x[at_edge],
            shown_y[at_edge],
            s=22,
            facecolors="none",
            edgecolors=colour,
            marker=marker,
            label=f"{modality}, zero or below",
            zorder=3,
        )
    for layer in np.flatnonzero(there):
        spot = (shown_x[layer], shown_y[layer])
        axes.annotate(str(layer), spot, (3, 3), textcoords="offset points", fontsize=6, color=colour)


def _rank_correlation(x: Floats, y: Floats) -> str:
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return "undefined"
    return f"{spearmanr(x, y).statistic:.2f}"
