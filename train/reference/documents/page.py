"""A page: lines of cells set in one font, drawn, and then turned, dirtied and compressed like a photograph or scan."""

import io
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .words import Face, font

SIDE = 512  # pixels of a page as it is drawn; the processor makes 448 x 256 of it, of which a token sees 16 x 16
LINES = 15  # that fit at the smallest pitch
_PITCH = 32  # pixels from line to line, at least: 16 as the model sees it
_LEFT, _RIGHT = 18, 60  # margins; the right one leaves room for tokens narrower than 16 pixels
Align = Literal["left", "center", "right"]


@dataclass(frozen=True)
class Cell:
    """A text at a place across the line: `x` from 0, the left margin, to 1, the right one."""

    text: str
    x: float = 0.0
    align: Align = "left"


@dataclass(frozen=True)
class Line:
    """Cells beside each other; `rule` draws a line above them, `scale` makes larger letters (and takes more room)."""

    cells: tuple[Cell, ...]
    rule: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Word:
    """A word as it was drawn: the centre of each character across, [letters], and of its line, in pixels."""

    text: str
    xs: NDArray[np.float64]
    y: float


@dataclass
class Page:
    """A drawn page, `SIDE` pixels wide and high, and its words in reading order."""

    image: Any
    words: list[Word] = field(default_factory=list)


def set_page(lines: list[Line], face: Face, rng: np.random.Generator, box: bool = False) -> Page:
    """Draw lines of cells on a page.

    Args:
        lines: from the top; at most `LINES`, larger ones counted by their scale.
        face: the font, as in `FONTS`.
        rng: draws size, place and colours.
        box: draw a frame around it all.
    """
    from PIL import Image, ImageDraw

    paper = tuple(int(v) for v in rng.integers(225, 256, 3))
    ink = tuple(int(v) for v in rng.integers(0, 70, 3))
    page = Page(Image.new("RGB", (SIDE, SIDE), paper))
    draw = ImageDraw.Draw(page.image)
    units = sum(line.scale for line in lines)
    pitch = float(rng.uniform(_PITCH, max(_PITCH, min(44.0, (SIDE - 24) / units))))
    top = float(rng.uniform(6, max(7.0, SIDE - 18 - pitch * units)))
    size = _size(face, min(float(rng.uniform(13, 15.5)), _widest(lines, face)), pitch)
    y = top
    for line in lines:
        y += pitch * line.scale
        letters = font(face, round(size * line.scale))
        baseline = y - 0.24 * pitch * line.scale
        if line.rule:
            above = y - pitch * line.scale + 1
            draw.line([(_LEFT, above), (SIDE - _RIGHT + 30, above)], fill=ink, width=int(rng.integers(1, 3)))
        for cell in line.cells:
            _write(page, draw, cell, letters, baseline, ink)
    if box:
        draw.rectangle([8, top - 2, SIDE - 12, y + 8], outline=ink, width=2)
    return page


def _unit(face: Face) -> float:
    """The mean width of a character, over the font's size."""
    return float(font(face, 100).getlength("0123456789abcdeghinorstu")) / 2400


def _size(face: Face, width: float, pitch: float) -> float:
    return max(16.0, min(width / _unit(face), 0.92 * pitch))


def _widest(lines: list[Line], face: Face) -> float:
    """The width of a character at which the fullest line fits between the margins, in pixels."""
    room = SIDE - _LEFT - _RIGHT
    full = max(line.scale * (sum(len(c.text) for c in line.cells) + 2 * (len(line.cells) - 1)) for line in lines)
    return room / max(full, 1)


def _write(page: Page, draw: Any, cell: Cell, letters: Any, baseline: float, ink: Any) -> None:
    room = SIDE - _LEFT - _RIGHT
    width = letters.getlength(cell.text)
    x = _LEFT + cell.x * room - {"left": 0.0, "center": 0.5, "right": 1.0}[cell.align] * width
    x = max(4.0, min(x, SIDE - 30 - width))
    draw.text((x, baseline), cell.text, font=letters, fill=ink, anchor="ls")
    at = 0
    for text in cell.text.split():
        at = cell.text.index(text, at)
        edges = [x + letters.getlength(cell.text[:n]) for n in range(at, at + len(text) + 1)]
        page.words.append(Word(text, (np.array(edges[1:]) + edges[:-1]) / 2, baseline - 0.3 * letters.size))
        at += len(text)


def photographed(page: Page, rng: np.random.Generator) -> Page:
    """The page and its words turned, mostly by less than a degree, with noise, sometimes blurred, and as JPEG."""
    from PIL import Image, ImageFilter

    angle = float(np.clip(rng.normal(0, 0.6), -2, 2))
    corner = page.image.getpixel((1, 1))
    turned = page.image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=corner)
    if rng.random() < 0.3:
        turned = turned.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.8))))
    noise = rng.normal(0, rng.uniform(0, 9), (SIDE, SIDE, 1))
    pixels = np.clip(np.asarray(turned, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=int(rng.integers(45, 95)))
    cos, sin, half = np.cos(np.radians(angle)), np.sin(np.radians(angle)), SIDE / 2
    words = []
    for word in page.words:
        x, y = word.xs - half, word.y - half
        words.append(Word(word.text, half + cos * x + sin * y, float(half - sin * x.mean() + cos * y)))
    return Page(Image.open(file).convert("RGB"), words)
