"""Figures over (layer, modality) units: heat maps of tables, and a prediction against its measurement."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from skipit.eval.statistics import Floats, spearman
from skipit.router import MODALITIES

from .style import VALUES, hatch, ink, line_style, plain, saved

MOST_LAYERS_WITH_NUMBERS = 32


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


plot_layer_modality_heatmaps = saved(draw_layer_modality_heatmaps)


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
    plain(axes)
    return figure


plot_scatter = saved(draw_scatter)


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
            hatch(axes, column - 0.5, layer - 0.5, 1, 1)
        elif layers <= MOST_LAYERS_WITH_NUMBERS:
            colour = ink(VALUES(norm(value)))
            axes.text(column, layer, _short(value, norm), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(MODALITIES)), MODALITIES, fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, steps=[1, 2, 4, 5, 10]))
    axes.tick_params(labelsize=8, length=2)


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


def _unit_points(axes: Axes, x: Floats, y: Floats, edges: tuple[float, float], modality: str) -> None:
    """The points of one modality, numbered by layer; hollow at the edge where a logarithm has no place for them."""
    there = np.isfinite(x) & np.isfinite(y)
    if not there.any():
        return
    style = line_style(MODALITIES.index(modality))
    colour = style["color"]
    inside = there & (x > 0) & (y > 0)
    shown_x, shown_y = np.where(x > 0, x, edges[0]), np.where(y > 0, y, edges[1])
    label = f"{modality} (\N{GREEK SMALL LETTER RHO} = {_rank_correlation(x[there], y[there])})"
    axes.scatter(shown_x[inside], shown_y[inside], s=22, label=label, zorder=3, **style)
    at_edge = there & ~inside
    if at_edge.any():
        axes.scatter(
            shown_x[at_edge],
            shown_y[at_edge],
            s=22,
            facecolors="none",
            edgecolors=colour,
            marker=style["marker"],
            label=f"{modality}, zero or below",
            zorder=3,
        )
    for layer in np.flatnonzero(there):
        spot = (shown_x[layer], shown_y[layer])
        axes.annotate(str(layer), spot, (3, 3), textcoords="offset points", fontsize=6, color=colour)


def _rank_correlation(x: Floats, y: Floats) -> str:
    value = spearman(x, y)
    return "undefined" if math.isnan(value) else f"{value:.2f}"
