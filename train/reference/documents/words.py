"""What pages are written with: fonts and word lists, each in one split only."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..digits import SPLITS, Split

Face = str | None  # a font file, by name or path; None is the font inside Pillow
# Font files by family, so that no two splits share a design: those of matplotlib, and the one inside Pillow (None).
FONTS: dict[Split, tuple[tuple[Face, ...], ...]] = {
    "train": (
        ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf"),
        ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf"),
        ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
        ("cmr10.ttf", "cmb10.ttf"),
        ("cmtt10.ttf",),
    ),
    "calibration": (("cmss10.ttf",),),
    "test": (("STIXGeneral.ttf", "STIXGeneralBol.ttf"), (None,)),
}


@dataclass(frozen=True)
class Words:
    """Word lists of one split; a list has no word of another split's."""

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    goods: tuple[str, ...]
    cities: tuple[str, ...]
    streets: tuple[str, ...]
    trades: tuple[str, ...]  # what a shop, a company or a person does
    topics: tuple[str, ...]  # what a table or a chart counts
    fields: tuple[str, ...]  # labels before a name, a city, a date or a number


def _words(**lists: str) -> Words:
    return Words(**{name: tuple(text.split()) for name, text in lists.items()})


WORDS: dict[Split, Words] = {
    "train": _words(
        first_names="John Mary Paul David Sarah Robert Thomas James Michael Anna Peter Daniel Emma George Alice Henry "
        "Laura Frank Julia Martin Helen Edward Lucy Simon Karen Oscar Rachel Philip Diana Victor",
        last_names="Smith Johnson Brown Williams Jones Miller Davis Wilson Anderson Taylor Moore Jackson Martin Lee "
        "Thompson White Harris Clark Lewis Robinson Walker Young Allen King Wright Scott Hill Green Adams Baker",
        goods="Coffee Tea Bread Milk Rice Fish Apple Orange Salad Soup Water Wine Meat Sugar Salt Honey Paper Book "
        "Chair Table Lamp Clock Phone Radio Camera Glass Knife Shirt Shoes Coat",
        cities="London Paris Berlin Rome Boston Chicago Dublin Vienna Moscow Sydney Tokyo Delhi Cairo Athens Oslo "
        "Houston Dallas Madrid Warsaw Toronto",
        streets="Park Church Market School River Lake Forest Station Bridge Castle Garden Mill Hill Queen Victoria",
        trades="Bakery Hotel Farm Bank Hospital Studio Library Museum Factory Garage Office Gallery Clinic Store",
        topics="Students Visitors Members Patients Workers Books Cars Trees Trains Houses Schools Letters",
        fields="Name City Date Phone Order Age Room Account Doctor Teacher Manager Country Number Customer",
    ),
    "calibration": _words(
        first_names="Jane Eric Nancy Kevin Susan Brian Maria Alan Ruth Walter",
        last_names="Campbell Mitchell Roberts Phillips Evans Turner Parker Collins Stewart Morris",
        goods="Butter Cheese Potato Lemon Onion Pencil Mirror Blanket Guitar Basket",
        cities="Munich Geneva Seattle Denver Milan Lisbon Prague Montreal",
        streets="Ocean Summer Union Temple Harbor Valley",
        trades="Theatre Pharmacy Restaurant Academy Laboratory Gym",
        topics="Tickets Animals Children Teachers Ships Machines",
        fields="Client Town Birthday Ticket Floor Driver Captain Code",
    ),
    "test": _words(
        first_names="Adam Grace Samuel Olivia Charles Sophie Leon Clara Hugo Irene Albert Monica",
        last_names="Cooper Bailey Murphy Richardson Howard Ward Peterson Gray Ramirez Watson Brooks Kelly",
        goods="Chicken Pasta Banana Juice Pepper Garlic Tomato Candle Hammer Bottle Carpet Mouse Pillow Brush",
        cities="Hamburg Amsterdam Brussels Zurich Helsinki Phoenix Stockholm Miami Portland Naples",
        streets="Spring Maple Liberty Central Harvest Windsor Abbey Orchard",
        trades="Nursery Kitchen College Airport Stadium Chapel Cinema Mission",
        topics="Guests Orders Flights Games Birds Bikes Meals Doctors",
        fields="Patient Location Birth Invoice Seat Nurse Editor Guest Member",
    ),
}


@cache
def font(name: Face, size: int) -> Any:
    """A font of a size in pixels; None is the one inside Pillow."""
    from PIL import ImageFont

    if name is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(font_file(name)), size)


def font_file(name: str) -> Path:
    """Where a font of `FONTS` is; a path of another one is kept."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


__all__ = ["FONTS", "SPLITS", "WORDS", "Face", "Split", "Words", "font", "font_file"]
