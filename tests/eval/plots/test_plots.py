import doctest
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.collections import PathCollection
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from skipit.eval.plots import (
    as_svg,
    draw_depth_map,
    draw_growing_sets,
    draw_intervals,
    draw_layer_modality_heatmaps,
    draw_pareto,
    draw_scatter,
    draw_skip_rates,
    plot_depth_map,
    plot_layer_modality_heatmaps,
    plot_pareto,
    plot_scatter,
)
from skipit.eval.plots import curves as plots_curves
from skipit.eval.plots import depth as plots_depth
from skipit.eval.plots import units as plots_units

RNG = np.random.default_rng(0)
LAYERS = 12
RATES = RNG.random((LAYERS, 2))
DAMAGE = 10 ** RNG.uniform(-5, 0, (LAYERS, 2))
PHOTO = Image.fromarray(RNG.integers(0, 255, (30, 40, 3), dtype=np.uint8))
TOKENS = ["USER", ":", " $x_1$", "\n", "seven"]
POINTS = [("dense", 1.0, 0.94, float("nan")), ("router", 0.5, 0.93, 0.01), ("router", 0.25, 0.9, 0.02)]


def holed(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """The table without its text column and one vision unit."""
    table = table.copy()
    table[:, 0] = np.nan
    table[3, 1] = np.nan
    return table


def depth_map(**changes: Any) -> Figure:
    arguments: dict[str, Any] = {
        "image": PHOTO,
        "vision_depth": RNG.integers(0, LAYERS + 1, (6, 8)),
        "tokens": TOKENS,
        "token_depth": [3, 12, 0, float("nan"), 7.5],
        "layers": LAYERS,
        "title": "costs $5 or $6",
    }
    return draw_depth_map(**arguments | changes)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("module", [plots_curves, plots_depth, plots_units])
def test_the_examples_in_docstrings(module: ModuleType) -> None:
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 1


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize(
    ("plot", "inches"),
    [
        (lambda path: plot_layer_modality_heatmaps(path, {"rate": RATES, "damage": holed(DAMAGE)}), (3.9, 3.78)),
        (lambda path: plot_depth_map(path, PHOTO, np.ones((3, 4)), TOKENS, [1, 2, 3, 4, 5], LAYERS, "t"), (7.2, 3.395)),
        (lambda path: plot_pareto(path, POINTS), (6.6, 3.8)),
        (lambda path: plot_scatter(path, DAMAGE, holed(DAMAGE), ("predicted", "measured")), (4.6, 4.2)),
    ],
)
def test_files_of_the_right_kind_and_size(
    plot: Callable[[Path], None], inches: tuple[float, float], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"figure.{kind}"
    plot(path)
    if kind == "png":
        with Image.open(path) as image:
            assert image.size == pytest.approx([200 * length for length in inches], abs=1)
            assert len(image.convert("RGB").getcolors(10**6) or []) > 50
    else:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_equal_figures_are_equal_files(kind: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        plot_pareto(tmp_path / f"{name}.{kind}", POINTS)
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


# --- heat maps


def test_heat_maps_have_titles_axes_and_a_bar_each() -> None:
    figure = draw_layer_modality_heatmaps({"damage (nat)": DAMAGE, "skip rate": RATES}, {"skip rate": (0, 1)})
    damage, rate = figure.axes[:2]
    assert [axes.get_title() for axes in (damage, rate)] == ["damage (nat)", "skip rate"]
    assert damage.get_ylabel() == "decoder layer"
    assert [label.get_text() for label in rate.get_xticklabels()] == ["text", "vision"]
    assert len(figure.axes) == 4
    assert rate.images[0].get_clim() == (0, 1)


def test_decades_are_coloured_on_a_log_scale_and_shares_are_not() -> None:
    with_zero = DAMAGE.copy()
    with_zero[0] = 0
    tables = {"damage": DAMAGE, "zero": with_zero, "signed": DAMAGE - 0.1, "rate": RATES, "narrow": 0.1 + RATES}
    figure = draw_layer_modality_heatmaps(tables, {"rate": (0, 1)})
    scales = [isinstance(axes.images[0].norm, LogNorm) for axes in figure.axes[:5]]
    assert scales == [True, True, False, False, False]


def test_every_unit_without_a_value_is_hatched() -> None:
    figure = draw_layer_modality_heatmaps({"damage": holed(DAMAGE), "nothing": np.full((LAYERS, 2), np.nan)})
    hatched = [sum(bool(patch.get_hatch()) for patch in axes.patches) for axes in figure.axes[:2]]
    assert hatched == [LAYERS + 1, 2 * LAYERS]


@pytest.mark.parametrize("value", [0.0, 1.0, 5e-7, -3.0, 1e6, np.inf])
def test_a_constant_table_is_drawn(value: float) -> None:
    figure = draw_layer_modality_heatmaps({"constant": np.full((2, 2), value)})
    figure.canvas.draw()
    assert len(texts(figure)) == 4


def test_numbers_in_cells_are_short_and_left_out_of_deep_models() -> None:
    wide = np.array([[1e-6, 0.034], [1234.0, 0.5]])
    assert texts(draw_layer_modality_heatmaps({"a": wide})) == ["1e-6", "0.034", "1e3", "0.5"]
    assert texts(draw_layer_modality_heatmaps({"a": np.array([[0.0, 0.4], [0.123, 1.0]])})) == [
        "0.00",
        "0.40",
        "0.12",
        "1.00",
    ]
    assert texts(draw_layer_modality_heatmaps({"a": RNG.random((80, 2))})) == []


# --- depth map


def test_depth_map_names_what_it_shows() -> None:
    figure = depth_map(vision_depth=np.full((6, 8), 3.0))
    image, patches, text = figure.axes[:3]
    assert figure.get_suptitle() == "costs $5 or $6"
    assert image.get_title() == "image"
    assert patches.get_title() == "layers executed per patch (mean 3.0 of 12)"
    assert text.get_title() == "layers executed per text token (mean 5.6 of 12)"
    assert figure.axes[3].get_ylabel() == "layers executed"
    figure.canvas.draw()


def test_patches_cover_the_image_and_share_the_scale_with_text() -> None:
    figure = depth_map(vision_depth=np.full((6, 8), 12.0), token_depth=[12] * 5)
    overlay = figure.axes[1].images[1]
    assert overlay.get_extent() == [-0.5, 39.5, 29.5, -0.5]
    assert overlay.get_clim() == (0, LAYERS)
    boxes = [patch for patch in figure.axes[2].patches if isinstance(patch, Rectangle)]
    assert {to_hex(box.get_facecolor()) for box in boxes} == {to_hex(overlay.cmap(1.0))}


def test_tokens_are_shown_literally_in_order() -> None:
    figure = depth_map()
    assert texts(figure) == ["USER", ":", " $x_1$", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "seven"]
    assert not any(text.get_parse_math() for text in figure.axes[2].texts)


def test_long_text_wraps_inside_the_figure() -> None:
    tokens = ["word"] * 200
    figure = depth_map(tokens=tokens, token_depth=np.full(200, 6.0))
    boxes = figure.axes[2].patches
    assert len(boxes) == 200
    assert max(box.get_x() + box.get_width() for box in boxes) <= figure.axes[2].get_xlim()[1]
    assert figure.get_figheight() > depth_map().get_figheight()


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA", "P"])
@pytest.mark.parametrize("depth", [np.full((2, 2), np.nan), np.arange(24 * 24).reshape(24, 24) % 13])
def test_any_image_and_missing_depths(mode: str, depth: NDArray[np.float64]) -> None:
    figure = depth_map(image=PHOTO.convert(mode), vision_depth=depth, tokens=[], token_depth=[])
    figure.canvas.draw()
    assert figure.axes[2].get_title() == "layers executed per text token (none)"


# --- accuracy against compute


def test_pareto_has_units_and_one_line_per_method() -> None:
    figure = draw_pareto(POINTS, error="standard error of 3 seeds")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "decoder FLOPs executed (% of dense)"
    assert axes.get_ylabel() == "held-out accuracy (%)"
    assert "standard error of 3 seeds" in axes.get_title()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["frontier", "dense", "router"]
    assert axes.containers[1].lines[0].get_xdata().tolist() == [0.25, 0.5]
    figure.canvas.draw()
    assert "80" in [label.get_text() for label in axes.get_xticklabels()]


def test_the_frontier_is_what_nothing_cheaper_reaches() -> None:
    points = [
        ("a", 0.5, 0.9, 0.0),
        ("b", 0.6, 0.8, 0.0),
        ("c", 0.2, 0.5, 0.0),
        ("d", 0.2, 0.6, 0.0),
        ("e", 1.0, 0.95, 0.0),
    ]
    frontier = draw_pareto(points).axes[0].lines[0]
    assert frontier.get_xdata().tolist() == [0.2, 0.5, 1.0]
    assert frontier.get_ydata().tolist() == [0.6, 0.9, 0.95]


def test_twenty_methods_are_told_apart() -> None:
    figure = draw_pareto([(f"method {index}", 0.5, index / 20, 0.01) for index in range(20)])
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


# --- scatter


def drawn(figure: Figure) -> list[PathCollection]:
    return [collection for collection in figure.axes[0].collections if isinstance(collection, PathCollection)]


def test_scatter_has_labels_and_the_rank_correlation() -> None:
    figure = draw_scatter(DAMAGE, 2 * DAMAGE, ("predicted (nat)", "measured (nat)"), diagonal=True)
    axes = figure.axes[0]
    assert axes.get_title() == "Spearman 1.00 over 24 units"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted (nat)", "measured (nat)")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text()[:4] for text in legend.get_texts()] == ["text", "visi", "equa"]
    assert len(axes.texts) == 24


def test_what_a_logarithm_cannot_show_is_hollow_at_the_edge() -> None:
    measured = DAMAGE.copy()
    measured[2, 1], measured[5, 1] = 0, -1e-3
    measured[7, 0] = np.nan
    figure = draw_scatter(DAMAGE, measured, ("predicted", "measured"))
    assert figure.axes[0].get_title().endswith("over 23 units")
    text, vision, hollow = drawn(figure)
    assert [len(points.get_offsets()) for points in (text, vision, hollow)] == [11, 10, 2]
    assert len(hollow.get_facecolor()) == 0
    assert (np.asarray(hollow.get_offsets())[:, 1] > 0).all()
    figure.canvas.draw()


def test_one_modality_only() -> None:
    figure = draw_scatter(holed(DAMAGE), DAMAGE, ("predicted", "measured"))
    assert len(drawn(figure)) == 1
    constant = draw_scatter(np.ones((3, 2)), DAMAGE[:3], ("predicted", "measured"))
    assert constant.axes[0].get_title() == "Spearman undefined over 6 units"


# --- curves of a report


def test_intervals_share_a_line_per_name_and_have_a_colour_per_group() -> None:
    rows = [("damage", "ours", -0.9, -1.0, -0.7), ("damage", "neutral", -0.5, -0.8, 0.1), ("VAR", "ours", 0.1, 0, 0.3)]
    axes = draw_intervals(rows, "tracking", "Spearman", 0.0).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["damage", "VAR"]
    spans = {tuple(line.get_xdata()): line.get_color() for line in axes.lines if len(line.get_xdata()) == 2}
    assert list(spans)[:3] == [(-1.0, -0.7), (0, 0.3), (-0.8, 0.1)]
    assert spans[(-1.0, -0.7)] == spans[(0, 0.3)] != spans[(-0.8, 0.1)]
    with pytest.raises(ValueError, match="`rows` is empty, expected at least one estimate"):
        draw_intervals([], "t", "x")


def test_skip_rates_are_shares_per_layer() -> None:
    figure = draw_skip_rates({"ours": RATES, "neutral": holed(RATES)})
    vision, text = figure.axes
    assert vision.lines[0].get_ydata().tolist() == RATES[:, 1].tolist()
    assert np.isnan(text.lines[1].get_ydata()).all()
    assert text.get_xlabel() == "decoder layer"
    figure.canvas.draw()


def test_growing_sets_are_drawn_against_what_is_left_of_the_flops() -> None:
    curve = [(0.9, 0.95, 0.01), (0.4, 0.5, 1.0), (0.6, 0.9, 0.1)]
    figure = draw_growing_sets({"best": curve, "worst": curve}, ("learned", 0.5, 0.97))
    above, below = figure.axes
    assert above.lines[0].get_xdata() == pytest.approx([0.4, 0.6, 0.9])
    assert below.lines[1].get_ydata() == pytest.approx([1.0, 0.1, 0.01])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["best", "worst", "learned"]


def test_equal_figures_are_equal_svg() -> None:
    first, second = (as_svg(draw_skip_rates({"ours": RATES})) for _ in range(2))
    assert first == second
    assert ElementTree.fromstring(first).tag.endswith("svg")


# --- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_layer_modality_heatmaps({}), r"`tables` has shapes {}, expected one or more tables of the same"),
        (
            lambda: draw_layer_modality_heatmaps({"a": RATES.T}),
            r"`tables` has shapes {'a': \(2, 12\)}, expected one or",
        ),
        (
            lambda: draw_layer_modality_heatmaps({"a": RATES, "b": RATES[1:]}),
            r"{'a': \(12, 2\), 'b': \(11, 2\)}, expected",
        ),
        (
            lambda: draw_layer_modality_heatmaps({"a": RATES}, {"b": (0, 1)}),
            r"`ranges` has {'b': \(0, 1\)}, expected \(low",
        ),
        (
            lambda: draw_layer_modality_heatmaps({"a": RATES}, {"a": (1, 1)}),
            r"`ranges` has {'a': \(1, 1\)}, expected \(low",
        ),
        (
            lambda: depth_map(vision_depth=np.ones(6)),
            r"`vision_depth` has shape \(6,\) and `token_depth` \(5,\) for 5 tok",
        ),
        (
            lambda: depth_map(token_depth=[1.0]),
            r"`token_depth` \(1,\) for 5 tokens, expected \[rows, columns\] and one",
        ),
        (
            lambda: depth_map(layers=6),
            r"`.*_depth` goes from 0 to 12, expected layers executed in \[0, 6\]. Sum the run",
        ),
        (lambda: draw_pareto([]), r"`points` has 0 points, not finite: \[\], expected \(name, compute share, accuracy"),
        (
            lambda: draw_pareto([("a", 0.5, float("nan"), 0.0)]),
            r"not finite: \[\('a', 0.5, nan, 0.0\)\], expected \(name",
        ),
        (
            lambda: draw_scatter(RATES, RATES[1:], ("x", "y")),
            r"`predicted` has shape \(12, 2\) and `measured` \(11, 2\)",
        ),
        (
            lambda: draw_scatter(-RATES, RATES, ("x", "y")),
            r"`predicted` and `measured` have no unit with finite values of",
        ),
        (
            lambda: plot_pareto("figure.pdf", POINTS),
            r"`path` is 'figure.pdf', expected a name that ends in .png or .svg",
        ),
    ],
)
def test_errors_say_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
