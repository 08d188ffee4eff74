"""Charts drawn by matplotlib: bars, columns and lines, each value written at its mark."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .layouts import Draw, Facts
from .page import SIDE, Page, Word
from .words import FONTS, Face, Split, font_file


@dataclass(frozen=True)
class Look:
    """How a split draws its charts; no two splits share one.

    Args:
        form: of the marks.
        color: of the marks; a name or a tone of grey.
        grid: draw lines behind them.
        frame: keep the frame's upper and right sides.
        width: of a bar, over the distance of two.
    """

    form: Literal["bars", "columns", "line"]
    color: str
    grid: bool
    frame: bool
    width: float = 0.7


LOOKS: dict[Split, tuple[Look, ...]] = {
    "train": (
        Look("bars", "tab:blue", True, True),
        Look("bars", "tab:orange", False, False, 0.5),
        Look("columns", "tab:green", True, False),
        Look("columns", "0.6", False, True, 0.45),
        Look("line", "tab:red", True, True),
    ),
    "calibration": (Look("bars", "tab:olive", True, False, 0.8), Look("columns", "tab:cyan", False, False, 0.8)),
    "test": (
        Look("bars", "tab:purple", False, True, 0.6),
        Look("columns", "tab:pink", True, True, 0.55),
        Look("line", "black", False, False),
    ),
}


def chart(draw: Draw, split: Split, faces: Sequence[Face] = ()) -> tuple[Page, Facts]:
    """A chart of one number for each of three to six things."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    rng, look = draw.rng, LOOKS[split][draw.whole(0, len(LOOKS[split]))]
    count = draw.whole(3, 7) if look.form == "bars" else 3 if look.form == "columns" else draw.whole(3, 5)
    first = draw.whole(1990, 2020)
    years = [str(first + n) for n in range(count)]
    short = [word for word in draw.words.goods if len(word) <= 7]
    items = years if look.form == "line" else [str(word) for word in rng.choice(short, count, replace=False)]
    values, topic = rng.integers(5, 100, count), draw.one("topics")
    title = f"{topic} in {draw.one('cities')}"

    figure = Figure(figsize=(SIDE / 100, SIDE / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes, size = figure.add_axes((0.27, 0.12, 0.6, 0.76)), float(rng.uniform(15, 17))
    letters = _letters(faces or [face for family in FONTS[split] for face in family], rng)
    places, top = np.arange(count), float(values.max()) * 1.25
    if look.form == "bars":
        axes.barh(places[::-1], values, look.width, color=look.color)
        axes.set(xlim=(0, top), xticks=[], yticks=places[::-1], yticklabels=items)
        at = [(value + top * 0.02, y, "left", "center") for value, y in zip(values, places[::-1], strict=True)]
    else:
        if look.form == "columns":
            axes.bar(places, values, look.width, color=look.color)
        else:
            axes.plot(places, values, color=look.color, marker="o")
        axes.set(xlim=(-0.6, count - 0.4), ylim=(0, top), yticks=[], xticks=places, xticklabels=items)
        axes.set_position((0.06, 0.12, 0.82, 0.76))
        at = [(x, value + top * 0.03, "center", "bottom") for x, value in zip(places, values, strict=True)]
    marks = [axes.text(x, y, str(v), ha=ha, va=va) for (x, y, ha, va), v in zip(at, values, strict=True)]
    axes.spines[["top", "right"]].set_visible(look.frame)
    if look.grid:
        axes.grid(axis="x" if look.form == "bars" else "y", alpha=0.5)
    labels = axes.get_yticklabels() if look.form == "bars" else axes.get_xticklabels()
    texts = [axes.set_title(title), *labels, *marks]
    for text in texts:
        text.set_fontproperties(letters)
        text.set_fontsize(size)
    canvas.draw()
    words = [word for text in texts for word in _placed(text, canvas)]
    image = Image.open(io.BytesIO(_png(figure))).convert("RGB")
    asked = f"the number of {topic} in {{}}" if look.form == "line" else f"the number of {topic} for {{}}"
    return Page(image, words), Facts(title, {}, items, {asked: [str(value) for value in values]})


def _letters(faces: Sequence[Face], rng: np.random.Generator) -> Any:
    from matplotlib.font_manager import FontProperties

    files = [face for face in faces if face is not None]  # Pillow's own is in no file
    return FontProperties(fname=str(font_file(files[rng.integers(len(files))])))


def _placed(text: Any, canvas: Any) -> list[Word]:
    """The words of a text, whose characters are taken to be of one width."""
    box, string = text.get_window_extent(canvas.get_renderer()), text.get_text()
    width, words, at = box.width / max(len(string), 1), [], 0
    for word in string.split():
        at = string.index(word, at)
        xs = box.x0 + width * (np.arange(len(word)) + at + 0.5)
        words.append(Word(word, xs, SIDE - (box.y0 + box.y1) / 2))
        at += len(word)
    return words


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, pil_kwargs={"compress_level": 1})
    return file.getvalue()
