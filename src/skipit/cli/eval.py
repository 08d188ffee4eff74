"""`skipit eval`: a report of what a gated checkpoint costs, saves and follows."""

import argparse
from pathlib import Path

from .options import CHECKPOINT, DATA, Parser, nonnegative_int, positive_int

ABOUT = "report what a gated checkpoint costs, saves and follows: report.html and eval.json"
EXAMPLE = "skipit eval runs/checkpoint reference --profile runs/profile --out runs/eval"


def add_arguments(verb: Parser) -> None:
    """A checkpoint, held-out rows, and what it is compared with."""
    verb.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    verb.add_argument("data", help=DATA)
    verb.add_out()
    verb.add_split("test")
    verb.add_samples(300)
    verb.add_seed("of the data")
    verb.add_broken()
    verb.add_max_new_tokens()
    verb.add_argument(
        "--metric",
        choices=("usual", "anls", "relaxed"),
        default="usual",
        help="how answers are scored: `usual` is exact match, and VQA accuracy where rows have ten answers; `anls` is "
        "that of DocVQA, `relaxed` ChartQA's accuracy within 5 %% (default %(default)s)",
    )
    verb.add_argument(
        "--base",
        default=None,
        help="dense model to compare with (default: the checkpoint's own weights; of an adapter, its base)",
    )
    verb.add_operating_point()
    verb.add_argument("--profile", type=Path, default=None, help="profile to compare the skips with")
    verb.add_argument(
        "--also",
        type=named_checkpoint,
        action="append",
        default=None,
        metavar="NAME=CKPT",
        help="a further router of the same base, such as one that began neutral; may be given more than once",
    )
    verb.add_argument("--baselines", type=Path, default=None, help="folder made by `scripts/study peers`")
    verb.add_argument("--transfer", type=Path, default=None, help="folder made by `scripts/study transfer`")
    verb.add_argument(
        "--controlled-samples",
        type=nonnegative_int,
        default=48,
        metavar="N",
        help="rows of controlled skipping; 0 leaves out all experiments beyond answering rows (default %(default)s)",
    )
    verb.add_columns()
    verb.add_argument("--repeats", type=positive_int, default=15, help="of the timing (default %(default)s)")
    verb.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time the dense model compiled by torch.compile, too, which takes a minute or more (default: on)",
    )
    verb.add_flag("--resume", "go on from OUT.partial of an evaluation that was stopped")


def named_checkpoint(text: str) -> tuple[str, Path]:
    """A name and a folder, with `=` between them."""
    name, _, folder = text.partition("=")
    if not name.strip() or not folder:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a name and a checkpoint, such as neutral=runs/neutral"
        )
    return name.strip(), Path(folder)


def run(arguments: argparse.Namespace) -> None:
    """Write the report and print its table."""
    from skipit.eval.evaluate import REPORT, Request, evaluate
    from skipit.train.card import EVALUATION

    settings = {name: getattr(arguments, name) for name in Request.__dataclass_fields__}
    request = Request(**{**settings, "also": tuple(arguments.also or ())})
    comparison = evaluate(request, arguments.out, arguments.overwrite, arguments.resume)
    print(comparison.table())
    print(f"{arguments.out}: {REPORT}, {EVALUATION}")
