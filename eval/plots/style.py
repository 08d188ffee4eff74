"""What all figures share: colours that colour-blind readers can tell apart, plain axes, and how they are written."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

# Okabe and Ito 2008 without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>h"
VALUES = colormaps["viridis"]

P = ParamSpec("P")


def save(figure: Figure, path: str | Path) -> None:
    """Save a figure as the kind of file that its name ends in."""
    kind = Path(path).suffix.lower()
    if kind not in (".png", ".svg"):
        raise ValueError(f"`path` is {str(path)!r}, expected a name that ends in .png or .svg. Rename it.")
    # A date or random ids in the file would make equal figures differ.
    with rc_context({"svg.hashsalt": "skipit"}):
        figure.savefig(path, dpi=200, metadata={"Date": None} if kind == ".svg" else None)


def saved(draw: Callable[P, Figure]) -> Callable[Concatenate[str | Path, P], None]:
    """The function that saves what `draw` draws: a path that ends in .png or .svg, then the same arguments."""

    def plot(path: str | Path, /, *args: P.args, **kwargs: P.kwargs) -> None:
        save(draw(*args, **kwargs), path)

    plot.__doc__ = f"Save the figure of `{draw.__name__}` as `path`, PNG or SVG."
    return plot


def as_svg(figure: Figure) -> bytes:
    """A figure as SVG, to be put into a page; letters are outlines, so no font is needed."""
    written = io.BytesIO()
    with rc_context({"svg.hashsalt": "skipit"}):
        figure.savefig(written, format="svg", dpi=200, metadata={"Date": None})
    return written.getvalue()


def hatch(axes: Axes, left: float, top: float, wide: float, high: float) -> None:
    """Mark a place without a value."""
    axes.add_patch(
        Rectangle((left, top), wide, high, facecolor="#E6E6E6", edgecolor="#9A9A9A", hatch="////", linewidth=0)
    )


def line_style(index: int) -> dict[str, Any]:
    """Colour and marker of a line or group, by its place among them."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def in_percent(*axes: Axis) -> None:
    """Label shares as percent."""
    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def ink(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue, _ = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def plain(axes: Axes) -> None:
    """Nothing that carries no information: two spines, a faint grid behind, small numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
