"""`skipit demo`: the whole data flow on the reference model."""

import argparse
from pathlib import Path

from .options import BUDGET, KV, Parser, budget, chosen, positive_int

ABOUT = "the whole data flow on the reference model"
EXAMPLE = "skipit demo --out demo"


def add_arguments(verb: Parser) -> None:
    """How much to train, and for what."""
    verb.add_out(Path("skipit-demo"))
    verb.add_argument("--budget", type=budget, default=0.5, help=f"{BUDGET} (default %(default)s)")
    verb.add_argument(
        "--latency",
        type=budget,
        default=0.7,
        help="share of its layers' time for a prompt to spend, in the other router (default %(default)s)",
    )
    verb.add_argument("--kv", choices=("retain", "evict"), default="retain", help=KV)
    verb.add_argument("--steps", type=positive_int, default=150, help="steps of each training (default %(default)s)")
    verb.add_samples(300, "held-out rows to answer")
    verb.add_seed()


def run(arguments: argparse.Namespace) -> None:
    """Make every artefact and print a table."""
    from skipit.demo import demo

    demo(arguments.out, **chosen(arguments, "budget", "latency", "kv", "steps", "samples", "seed", "overwrite"))
