"""`skipit generate`: a question about an image answered."""

import argparse
import sys
from pathlib import Path

from .options import CHECKPOINT, Parser, chosen, operating_point, positive_int

ABOUT = "answer a question about an image"
EXAMPLE = 'skipit generate runs/checkpoint --image grid.png --prompt "read the top row ."'


def add_arguments(verb: Parser) -> None:
    """A checkpoint, a question, and at which operating point it is answered."""
    verb.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    verb.add_argument("--base", default=None, help="of an adapter: a copy of its base (default: where it was trained)")
    verb.add_argument("--image", type=Path, action="append", required=True, help="image file; repeat for several")
    verb.add_argument("--prompt", required=True, help="the question")
    verb.add_operating_point()
    verb.add_argument(
        "--budget-per",
        choices=("data", "input"),
        default=None,
        help="input: this prompt spends --budget, any number in (0, 1], exactly (default: what the checkpoint says)",
    )
    verb.add_max_new_tokens()
    verb.add_argument("--depth-map", type=picture, default=None, help="PNG or SVG of the layers run per patch and word")
    verb.add_flag("--dense", "run every layer")
    verb.add_flag("--lossless", "the answer of --dense, of which the gated model drafts several tokens at a time")
    verb.add_argument(
        "--draft-budget",
        type=operating_point,
        default=None,
        help="calibrated budget or named point at which --lossless drafts (default: the trained)",
    )
    verb.add_argument(
        "--draft-tokens",
        type=positive_int,
        default=None,
        help="most tokens that --lossless drafts at once (default: one more than were accepted the last time)",
    )


def picture(text: str) -> Path:
    """A file that a picture can be written to."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, but there is no folder {path.parent}")
    return path


def run(arguments: argparse.Namespace) -> None:
    """Print the answer alone; what it cost goes to standard error."""
    from skipit.eval.measure.answer import answer, open_images
    from skipit.router.errors import InputError
    from skipit.train.adapter import load
    from skipit.train.data.sources import on_gpu
    from skipit.train.display import loading

    if arguments.dense and (arguments.depth_map or arguments.budget or arguments.budget_per):
        raise InputError(
            "a dense run executes every layer for every token: leave out --depth-map, --budget and --budget-per."
        )
    if arguments.lossless and (arguments.dense or arguments.depth_map or arguments.budget or arguments.budget_per):
        raise InputError(
            "a lossless run answers as the dense model: leave out --dense, --depth-map, --budget and --budget-per. "
            "What drafts runs at --draft-budget."
        )
    if not arguments.lossless and (arguments.draft_budget or arguments.draft_tokens):
        raise InputError(
            "nothing is drafted without --lossless: add it, or leave out --draft-budget and --draft-tokens."
        )
    images = open_images(arguments.image)
    with loading("loading"):
        model, processor = load(arguments.checkpoint, arguments.base)
        model = on_gpu(model)
    names = ("budget", "budget_per", "dense", "lossless", "draft_budget", "draft_tokens", "max_new_tokens")
    settings = chosen(arguments, *names)
    reply = answer(model, processor, images, arguments.prompt, **settings)
    print(reply.text)
    if reply.compute is not None:
        print(f"({reply.compute:.1%} of the dense decoder's FLOPs)", file=sys.stderr)
    if reply.drafts is not None:
        print(f"({reply.drafts})", file=sys.stderr)
    if arguments.depth_map is not None:
        reply.draw(arguments.depth_map)
        print(f"depth map: {arguments.depth_map}", file=sys.stderr)
