"""`skipit profile`: a model measured on data."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Parser, chosen, load_rows, partial_folder, positive_int, readable_rows
from .units import layers_in_words, picture, profile_tables, show

if TYPE_CHECKING:
    from skipit.theory.backbone import Backbone
    from skipit.theory.profile import Profile

ABOUT = "measure a model on data"
EXAMPLE = "skipit profile reference reference --out runs/profile"
# Cosine distances at which proximal redundancy is shown.
DISTANCES = (0.01, 0.1)
HALF = 0.5  # the budget that a finding is about


def add_arguments(verb: Parser) -> None:
    """A model or a part of it, rows, and what is saved on the way."""
    verb.add_model_and_data()
    verb.add_out()
    verb.add_samples(256, "rows to measure")
    verb.add_argument("--draws", type=positive_int, default=2, help="sampled answers per row (default %(default)s)")
    verb.add_argument(
        "--part",
        choices=("decoder", "vision", "text"),
        default="decoder",
        help="of the model: its decoder, or the redundancy alone of a vision tower or text encoder",
    )
    verb.add_argument(
        "--decide-at",
        type=points,
        default=argparse.SUPPRESS,
        metavar="0,1,2",
        help="layers by whose states gates will decide, or `each` for itself (default 0: once, for all layers; "
        "below a quarter of the FLOPs others may be better)",
    )
    verb.add_argument("--layers", default=None, help="dotted path of the part's layers, where they are not found")
    verb.add_streaming()
    verb.add_broken()
    verb.add_argument(
        "--save-every", type=positive_int, default=16, help="batches between saves to OUT.partial (default %(default)s)"
    )
    verb.add_flag("--resume", "go on from OUT.partial of a killed run")


def points(text: str) -> tuple[int, ...] | None:
    """Decision points between commas; None for `each`."""
    from skipit.router.config import check_points
    from skipit.router.errors import RouterConfigError

    try:
        return None if text == "each" else check_points([int(layer) for layer in text.split(",")])
    except (ValueError, RouterConfigError) as error:
        expected = "expected ascending layers that begin with 0, such as 0,1,2, or `each`"
        raise argparse.ArgumentTypeError(f"got {text!r}, {expected}") from error


def run(arguments: argparse.Namespace) -> None:
    """Write a profile of the decoder, or of a part, and say how many rows it holds."""
    if arguments.part == "decoder":
        _profile_decoder(arguments)
    else:
        _profile_part(arguments)


def _profile_decoder(arguments: argparse.Namespace) -> None:
    from skipit.theory.artefact import save_profile
    from skipit.theory.partial import Partial
    from skipit.train.data.collate import Collator
    from skipit.train.data.sources import load_model, name_data, on_gpu
    from skipit.train.display import loading, note, progress
    from skipit.train.export import DATA, HOW_READ
    from skipit.train.profiling import profile_model

    same = chosen(arguments, "split", "samples", "batch_size", "streaming", "shuffle_buffer", "layers")
    partial = Partial(
        partial_folder(arguments),
        every=arguments.save_every,
        of={"data": name_data(arguments.data), **same},
        **chosen(arguments, "resume", "overwrite"),
    )
    with loading("loading"):
        model, processor = load_model(arguments.model)
        model = on_gpu(model)
        rows = readable_rows(arguments, load_rows(arguments, arguments.samples), Collator(processor))
    with progress("profile", _count(rows, arguments)) as advance:
        settings = chosen(arguments, "batch_size", "seed", "draws", "layers", "decide_at")
        profile = profile_model(model, processor, advance.over(rows), partial=partial, **settings)
    profile.about[DATA] = {"source": name_data(arguments.data), **chosen(arguments, *HOW_READ)}
    draw = picture(profile_tables(profile))

    def finish(folder: Path) -> None:
        draw(folder)
        partial.remove()  # before the folder has its name: whoever is killed here measures again, and none finds both

    save_profile(profile, arguments.out, arguments.overwrite, finish)
    skipped = profile.about["skipped_rows"]
    if numbers := profile.about["skipped_row_numbers"]:
        more = f" and {skipped - 10} more" if skipped > 10 else ""
        note(f"left out, their states are not finite: row {', '.join(map(str, numbers[:10]))}{more}")
    print(f"{arguments.out}: {profile.about['rows']} rows measured, {skipped} not finite.")
    print(show(arguments.out, profile_tables(profile)))
    print(_finding(profile))
    print(f"Next: skipit plan {arguments.out} --out DIR")


def _finding(profile: "Profile") -> str:
    """What the theory would skip, as far as a profile alone can say."""
    from skipit.router import MODALITIES
    from skipit.theory.plan import skip_set

    skips = ~skip_set(profile, HALF)
    parts = (
        f"{name} in {layers_in_words(skips[:, at].nonzero()[:, 0].tolist())}" for at, name in enumerate(MODALITIES)
    )
    return f"For {HALF:.0%} of the FLOPs least damage per FLOP is done by skipping {', '.join(parts)} (retain)."


def _profile_part(arguments: argparse.Namespace) -> None:
    from skipit.router.errors import InputError
    from skipit.theory.artefact import save_backbone
    from skipit.train.display import loading, progress
    from skipit.train.profiling import load_part, profile_part

    if arguments.resume:
        raise InputError(f"--part {arguments.part} takes one forward pass and keeps nothing to --resume. Start anew.")
    with loading("loading"):
        model, read = load_part(arguments.model, arguments.part)
        rows = readable_rows(arguments, load_rows(arguments, arguments.samples), read)
    with progress("profile", _count(rows, arguments)) as advance:
        part = profile_part(model, read, advance.over(rows), **chosen(arguments, "batch_size", "layers"))
    save_backbone(part, arguments.out, arguments.overwrite)
    print(part_table(part))
    print(f"{arguments.out}: {part.layers} of {part.rows} {'images' if part.modality == 'vision' else 'texts'}.")


def _count(rows: Any, arguments: argparse.Namespace) -> int:
    """How many rows at most: a stream does not know its length."""
    return arguments.samples if arguments.streaming else len(rows)


def part_table(part: "Backbone") -> str:
    """One line per layer: geometric and proximal redundancy, relative update, tokens."""
    from skipit.theory.redundancy import prox

    near = {f"prox({t:g})": prox(part.table("histogram"), t) for t in DISTANCES}
    columns = {"geometric": part.table("geometric"), **near, "update": part.table("update")}
    lines = [f"{'layer':>5}" + "".join(f"{name:>12}" for name in columns) + f"{'tokens':>10}"]
    for index, count in enumerate(part.table("count").tolist()):
        figures = "".join(f"{float(column[index]):12.4f}" for column in columns.values())
        lines.append(f"{index:5}{figures}{count:10}")
    return "\n".join(lines)
