"""`skipit theory`: how tight the theory's bounds are on a model."""

import argparse
from pathlib import Path

from .options import Parser, readable_rows

ABOUT = "print how tight the theory's bounds are on a model"
EXAMPLE = "skipit theory runs/profile --model reference --data reference"


def add_arguments(verb: Parser) -> None:
    """A profile, and a model with rows to measure more of it."""
    verb.add_argument("profile", type=Path, help="folder made by `skipit profile`")
    verb.add_argument("--model", default=None, help="as for `skipit profile`: measure its tensors too")
    verb.add_argument("--data", default=None, help="rows to measure them on; needed with --model")
    verb.add_split("test")
    verb.add_samples(8)
    verb.add_batch_size(4)
    verb.add_broken()
    verb.add_seed()


def run(arguments: argparse.Namespace) -> None:
    """Print one line per bound, in the order of the statements."""
    from skipit.router.errors import InputError
    from skipit.theory.artefact import check_same_model, load_profile
    from skipit.theory.identity import fingerprint
    from skipit.theory.tightness import from_model, from_profile, show
    from skipit.train.data.collate import Collator, batches
    from skipit.train.data.sources import load_data, load_model
    from skipit.train.display import progress

    profile = load_profile(arguments.profile)
    lines = from_profile(profile)
    if (arguments.model is None) != (arguments.data is None):
        raise InputError("--model and --data go together: the model's tensors are measured on the data's rows.")
    if arguments.model is not None:
        model, processor = load_model(arguments.model)
        check_same_model(profile, fingerprint(model))
        rows = load_data(arguments.data, arguments.split, arguments.samples, arguments.seed)
        rows = readable_rows(arguments, rows, Collator(processor))
        with progress("theory", len(rows)) as advance:
            read = batches(advance.over(rows), Collator(processor), arguments.batch_size)
            lines += from_model(model, read, seed=arguments.seed)
    show(sorted(lines, key=lambda line: line.statement))
    print("1 is exact, above 1 would be false. Statement 12 is about counted errors: `skipit calibrate --risk`.")
