"""What all figures share: colours that colour-blind readers can tell apart, plain axes, and how they are written."""

import io
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Okabe and Ito 2008 without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>h"
MODALITY_COLOURS = {"text": "#0072B2", "vision": "#D55E00"}
VALUES = colormaps["viridis"]


def save(figure: Figure, path: str | Path) -> None:
    """Save a figure as the kind of file that its name ends in."""
    kind = Path(path).suffix.lower()
    if kind not in (".png", ".svg"):
        raise ValueError(f"`path` is {str(path)!r}, expected a name that ends in .png or .svg. Rename it.")
    # A date or random ids in the file would make equal figures differ.
    with rc_context({"svg.hashsalt": "skipit"}):
        figure.savefig(path, dpi=200, metadata={"Date": None} if kind == ".svg" else None)


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
