"""Faces from which the tower learns letters: those of the training split, and any others that a folder holds."""

from pathlib import Path

from PIL import ImageFont

from skipit.train.reference.documents.words import FONTS, Face, font

PRINTABLE = "".join(map(chr, range(33, 127)))
OWN = tuple(face for family in FONTS["train"] for face in family)


def faces(folder: Path | None = None) -> tuple[Face, ...]:
    """Font files, as in `FONTS`: those of the training split, and every TrueType or OpenType file in a folder.

    Left out are families of the splits that are held out, and files without a printable ASCII character or without
    small letters of their own.

    Args:
        folder: searched with all that is below it.

    Raises:
        ValueError: nothing in the folder can be used.
    """
    if folder is None:
        return OWN
    held_out = {_design(face) for split in ("calibration", "test") for family in FONTS[split] for face in family}
    files = (str(path.resolve()) for path in sorted(folder.rglob("*.[ot]tf")))
    found = [face for face in files if _design(face) not in held_out and _readable(face)]
    if not found:
        raise ValueError(f"{folder}: no font that can be used, expected .ttf or .otf files with all of ASCII.")
    return (*OWN, *found)


def _design(face: Face) -> str:
    """The first word of a family's name, which its weights and widths share: STIXGeneral, Aileron, Lato."""
    return str(font(face, 20).getname()[0]).split()[0]


def _readable(face: str) -> bool:
    from fontTools.ttLib import TTFont

    with TTFont(face, lazy=True) as file:
        known = file.getBestCmap() or {}
    if any(ord(character) not in known for character in PRINTABLE):
        return False
    large = ImageFont.truetype(face, 100)
    return any(large.getmask(small).getbbox() != large.getmask(small.upper()).getbbox() for small in "aeg")
