"""Curves of a report: accuracy against compute, what skipping more and more does, skip rates by layer, intervals."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from skipit.router import MODALITIES

from .style import COLOURS, in_percent, line_style, plain, saved

Point = tuple[str, float, float, float]
Interval = tuple[str, str, float, float, float]
Curve = Sequence[tuple[float, float, float]]


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
            **line_style(index),
            linestyle="-" if index < len(COLOURS) else "--",
            markersize=5,
            linewidth=1.2,
            elinewidth=1,
            capsize=2.5,
            label=name,
            zorder=3,
        )
    in_percent(axes.xaxis, axes.yaxis)
    axes.set_xlim(left=0)
    axes.set_xlabel("decoder FLOPs executed (% of dense)", fontsize=9)
    axes.set_ylabel("held-out accuracy (%)", fontsize=9)
    axes.set_title(f"accuracy against compute (bars: {error})", fontsize=10)
    plain(axes)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


plot_pareto = saved(draw_pareto)


def _frontier(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Shares and accuracies of the points that no cheaper point reaches, in order of compute."""
    shares: list[float] = []
    accuracies: list[float] = []
    for _, share, accuracy, _ in sorted(points, key=lambda point: (point[1], -point[2])):
        if not accuracies or accuracy > accuracies[-1]:
            shares.append(share)
            accuracies.append(accuracy)
    return shares, accuracies


def draw_intervals(rows: Sequence[Interval], title: str, label: str, reference: float | None = None) -> Figure:
    """Draw estimates with their intervals below each other, groups in colours and markers of their own.

    Args:
        rows: (name, group, value, low, high); rows of one name share a line, NaN draws nothing.
        title: of the figure.
        label: of the horizontal axis, with its unit.
        reference: a value to compare with, drawn as a line.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no row.

    Example:
        >>> figure = draw_intervals([("damage", "gated", -0.8, -0.9, -0.6)], "tracking", "Spearman correlation", 0.0)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['damage']
    """
    if not rows:
        raise ValueError("`rows` is empty, expected at least one estimate. Leave the figure out instead.")
    names, groups = (list(dict.fromkeys(row[index] for row in rows)) for index in (0, 1))
    step = 0.7 / len(groups)
    figure = Figure(figsize=(5.4, 1.1 + len(names) * max(0.24, 0.14 * len(groups) + 0.1)), layout="constrained")
    axes = figure.subplots()
    for index, group in enumerate(groups):
        style = line_style(index)
        for name, _, value, low, high in (row for row in rows if row[1] == group):
            place = names.index(name) + (index - (len(groups) - 1) / 2) * step
            axes.plot([low, high], [place, place], color=style["color"], linewidth=1.4)
            axes.plot([value], [place], linestyle="", markersize=5, **style)
        axes.plot([], [], label=group, **style)
    if reference is not None:
        axes.axvline(reference, color="#777777", linewidth=1, linestyle="--", zorder=1)
    axes.set_yticks(range(len(names)), [str(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(title, fontsize=10)
    plain(axes)
    if len(groups) > 1:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def draw_skip_rates(rates: Mapping[str, ArrayLike]) -> Figure:
    """Draw the share of tokens that skip each layer, one panel per modality, one line per model.

    Args:
        rates: Arrays of shape [layers, 2] in [0, 1], columns text and vision, by model; NaN where no tokens.

    Returns:
        The figure: vision above, text below.

    Example:
        >>> figure = draw_skip_rates({"gated": [[0.0, 0.9], [0.1, 0.5]]})
        >>> [axes.get_title() for axes in figure.axes]
        ['vision tokens', 'text tokens']
    """
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, modality in zip(panels, ("vision", "text"), strict=True):
        for index, (name, table) in enumerate(rates.items()):
            column = np.asarray(table, dtype=np.float64)[:, MODALITIES.index(modality)]
            axes.plot(np.arange(len(column)), column, markersize=4, linewidth=1.2, label=name, **line_style(index))
        axes.axhline(0.5, color="#777777", linewidth=1, linestyle="--", zorder=1)
        axes.set_title(f"{modality} tokens", fontsize=9)
        axes.set_ylabel("that skip (%)", fontsize=9)
        axes.set_ylim(-0.04, 1.04)
        in_percent(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axes)
    panels[-1].set_xlabel("decoder layer", fontsize=9)
    if len(rates) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False)
    return figure


def draw_growing_sets(curves: Mapping[str, Curve], point: tuple[str, float, float] | None = None) -> Figure:
    """Draw what skipping more and more units does: accuracy above, divergence below, against the FLOPs that are left.

    Args:
        curves: by order of skipping, (share of FLOPs, accuracy, KL in nats) per set.
        point: a model to compare with: its name, share of FLOPs and accuracy.

    Returns:
        The figure.

    Example:
        >>> figure = draw_growing_sets({"least damage first": [(1.0, 0.9, 0.0), (0.5, 0.8, 0.2)]})
        >>> figure.axes[1].get_xlabel()
        'decoder FLOPs executed (% of dense)'
    """
    figure = Figure(figsize=(5.4, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for index, (name, curve) in enumerate(curves.items()):
        shares, accuracies, divergences = zip(*sorted(curve), strict=True)
        above.plot(shares, accuracies, markersize=4, linewidth=1.2, label=name, **line_style(index))
        below.plot(shares, divergences, markersize=4, linewidth=1.2, **line_style(index))
    if point is not None:
        above.plot([point[1]], [point[2]], "*", color="black", markersize=11, label=point[0], zorder=4)
    in_percent(above.yaxis, below.xaxis)
    above.set_ylabel("accuracy (%)", fontsize=9)
    below.set_ylabel("KL from all layers\n(nats per answer token)", fontsize=9)
    below.set_xlabel("decoder FLOPs executed (% of dense)", fontsize=9)
    for axes in (above, below):
        plain(axes)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure
