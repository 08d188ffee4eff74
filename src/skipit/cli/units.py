"""What is known of every unit (a layer and a modality): a table in the terminal, and a heat map in the folder."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from skipit.theory.profile import Profile

PICTURE = "units.png"


def picture(tables: Mapping[str, "Tensor"], *, shares: bool = False) -> Callable[[Path], None]:
    """What draws tables [layers, modalities] into a folder, for whoever writes it.

    Args:
        tables: by title; what stands after a line break in it is for the picture alone.
        shares: they are shares of tokens.
    """

    def draw(folder: Path) -> None:
        from skipit.eval.plots import plot_layer_modality_heatmaps

        arrays = {title: table.double().numpy() for title, table in tables.items()}
        plot_layer_modality_heatmaps(folder / PICTURE, arrays, dict.fromkeys(tables, (0.0, 1.0)) if shares else None)

    return draw


def show(out: Path, tables: Mapping[str, "Tensor"], *, shares: bool = False) -> str:
    """The same tables as text, and where the picture is."""
    return f"{_text(tables, '.1%' if shares else '.2g')}\n{out / PICTURE}: the same as a heat map."


def _text(tables: Mapping[str, "Tensor"], style: str) -> str:
    from rich.console import Console
    from rich.table import Table

    from skipit.router import MODALITIES

    drawn, columns = Table(), []
    drawn.add_column("layer", justify="right")
    for title, table in tables.items():
        for number, modality in enumerate(MODALITIES):
            if bool((column := table[:, number]).isfinite().any()):
                drawn.add_column(f"{title.partition(chr(10))[0]}\n{modality}", justify="right")
                columns.append(column.tolist())
    for layer, values in enumerate(zip(*columns, strict=True)):
        drawn.add_row(str(layer), *("" if value != value else format(value, style) for value in values))
    text = io.StringIO()
    Console(file=text, width=100).print(drawn)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def layers_in_words(layers: Sequence[int]) -> str:
    """Numbers of layers, those that follow each other as a span.

    Example:
        >>> layers_in_words([0, 2, 3, 4, 7]), layers_in_words([])
        ('layers 0, 2-4, 7', 'no layer')
    """
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    told = ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
    return f"layer{'s' if len(layers) > 1 else ''} {told}" if spans else "no layer"


def profile_tables(profile: "Profile") -> dict[str, "Tensor"]:
    """What a profile says of every unit, by titles of heat maps."""
    attention = profile.attention[:, None].repeat(1, 2)
    attention[:, 0] = float("nan")  # the notion is about vision keys
    damage = {f"damage ({kv})\nKL, nats per answer token": of.unit for kv, of in profile.damage.items()}
    return {"redundancy\n1 - cos, small: redundant": profile.geometric, "attention\nVAR, of text": attention, **damage}
