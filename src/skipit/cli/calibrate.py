"""`skipit calibrate`: one more operating point of a checkpoint, by a budget or by a certified risk."""

import argparse
from pathlib import Path

from .options import BUDGET, DATA, LATENCY, Parser, budget, chosen, load_rows, probability, readable_rows

ABOUT = "add an operating point to a checkpoint: a budget in FLOPs or time, or a certified risk"
EXAMPLE = "skipit calibrate runs/checkpoint reference --risk 0.02 --confidence 0.95"


def add_arguments(verb: Parser) -> None:
    """A checkpoint, held-out rows, and what the point promises."""
    verb.add_argument("checkpoint", type=Path, help="folder made by `skipit export`, which gets an operating point")
    verb.add_argument("data", help=DATA)
    verb.add_argument("--budget", type=budget, default=None, help=f"{BUDGET}; its number becomes the name")
    verb.add_argument("--latency", type=budget, default=None, help=f"{LATENCY}; the name becomes latency-NUMBER")
    verb.add_argument(
        "--risk", type=probability, default=None, help="share of new rows answered otherwise than by the dense model"
    )
    verb.add_argument(
        "--confidence", type=probability, default=0.95, help="that the risk is no larger (default %(default)s)"
    )
    verb.add_argument("--name", default="certified", help="of the point with this risk (default %(default)s)")
    verb.add_split("calibration")
    verb.add_samples(1000)
    verb.add_columns()
    verb.add_batch_size()
    verb.add_max_new_tokens()
    verb.add_seed("of the order of rows")
    verb.add_broken()
    verb.add_flag("--overwrite", "replace a point of the same name")


def run(arguments: argparse.Namespace) -> None:
    """Store the point in the checkpoint and say what it executes or promises."""
    from skipit.eval.operating_points import claimed_point
    from skipit.router.config import point_name
    from skipit.router.errors import InputError
    from skipit.theory.time_model import point_of

    if [arguments.budget, arguments.latency, arguments.risk].count(None) != 2:
        raise InputError(
            "give one of --budget, --latency and --risk: a point spends FLOPs, spends time, or has a certified risk."
        )
    folder, name = arguments.checkpoint, arguments.name
    if arguments.budget is not None:
        name = point_name(arguments.budget)
    elif arguments.latency is not None:
        name = point_of(arguments.latency)
    with claimed_point(folder, name, arguments.overwrite):
        _calibrate(arguments, name)


def _calibrate(arguments: argparse.Namespace, name: str) -> None:
    from skipit.eval.operating_points import budget_checkpoint, certify_checkpoint
    from skipit.router.checkpoint import load_processor
    from skipit.theory.risk import SKIPPED_SHARES
    from skipit.train.card import checkpoint_record
    from skipit.train.data.collate import Collator
    from skipit.train.data.rows import Rows
    from skipit.train.data.used import held_out
    from skipit.train.display import loading, note, progress

    folder = arguments.checkpoint
    collate = Collator(load_processor(folder), with_completion=arguments.risk is None)
    rows = readable_rows(arguments, load_rows(arguments, arguments.samples), collate)
    known = held_out(checkpoint_record(folder), Rows(rows))[0].sentence().capitalize()
    common = chosen(arguments, "batch_size", "overwrite")
    if arguments.risk is None:
        wrong: list[str] = []
        in_time = arguments.latency is not None
        share = arguments.latency if in_time else arguments.budget
        with loading("calibrating"):
            met = budget_checkpoint(folder, rows, share, in_time=in_time, note=wrong.append, **common)
        took = f"takes {met.took.sentence()}, and " if met.took else ""
        print(f"{folder}: --budget {name} {took}executes {met.flops:.1%} of the dense decoder's FLOPs. {known}.")
        for problem in wrong:
            note(f"warning: {problem}")
        return
    # At most: testing stops after the first threshold that fails.
    with progress("certify", (1 + len(SKIPPED_SHARES)) * len(rows)) as advance:
        certificate = certify_checkpoint(
            folder,
            rows,
            arguments.risk,
            arguments.confidence,
            progress=advance,
            **common,
            name=name,
            **chosen(arguments, "seed", "max_new_tokens"),
        )
    print(f"{folder}: {certificate.summary()}")
    print(f"{known}.")
    print(f"Next: skipit generate {folder} --budget {arguments.name} --image FILE --prompt TEXT")
