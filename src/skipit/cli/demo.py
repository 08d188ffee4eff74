"""`skipit demo`: the whole data flow on a built-in model."""

import argparse
from pathlib import Path

from .options import BUDGET, Parser, budget, chosen, positive_int

ABOUT = "the whole data flow on a built-in model"
EXAMPLE = "skipit demo --out demo"
REFERENCE, DOCUMENTS = "reference", "documents"


def add_arguments(verb: Parser) -> None:
    """Of which model; how much to train, and for what."""
    verb.add_out(Path("skipit-demo"))
    verb.add_argument(
        "--model",
        choices=(REFERENCE, DOCUMENTS),
        default=REFERENCE,
        help="the small one, or the one with a pretrained decoder, which takes about five minutes and loads gates that "
        "were trained before (default %(default)s)",
    )
    verb.add_argument("--budget", type=budget, default=0.5, help=f"{BUDGET} (default %(default)s)")
    verb.add_argument(
        "--latency",
        type=budget,
        default=None,
        help="of the reference: share of its layers' time for a prompt to spend, in the other router (default 0.7)",
    )
    verb.add_argument(
        "--kv",
        choices=("retain", "evict"),
        default=None,
        help="keys and values of skipped tokens (default retain, of documents evict)",
    )
    verb.add_argument(
        "--steps", type=positive_int, default=None, help="of each training of the reference (default 150)"
    )
    verb.add_argument(
        "--samples", type=positive_int, default=None, help="held-out rows to answer (default 300, of documents 40)"
    )
    verb.add_seed()


def run(arguments: argparse.Namespace) -> None:
    """Make every artefact and print a table."""
    from skipit.router import InputError

    given = chosen(arguments, "budget", "latency", "kv", "steps", "samples", "seed", "overwrite")
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.model == DOCUMENTS:
        from skipit.documents_demo import documents_demo

        for name in ("latency", "steps"):
            if name in given:
                raise InputError(
                    f"--{name}: got {given[name]}, but the demo of documents trains nothing. Leave it out."
                )
        documents_demo(arguments.out, **given)
    else:
        from skipit.demo import demo

        demo(arguments.out, **given)
        print("A pretrained decoder that reads documents: skipit demo --model documents --out DIR")
