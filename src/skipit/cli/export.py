"""`skipit export`: a run, a plan or a checkpoint written as a gated checkpoint."""

import argparse
from pathlib import Path

from .options import Parser

ABOUT = "write a gated checkpoint"
EXAMPLE = "skipit export runs/run --out runs/checkpoint"


def add_arguments(verb: Parser) -> None:
    """What is exported, and as what."""
    verb.add_argument(
        "source",
        type=Path,
        help="folder made by `skipit train` or `skipit plan`, or a checkpoint to copy in today's format",
    )
    verb.add_argument("--model", default=None, help="of a plan that nothing was trained for: the dense model")
    verb.add_flag("--adapter", "gates and LoRA alone, in PEFT's format, to be loaded on top of the base")
    verb.add_argument(
        "--eval", type=Path, default=None, help="of a checkpoint: folder made by `skipit eval`, for its model card"
    )
    verb.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it, too; a new repository is private")
    verb.add_out()


def run(arguments: argparse.Namespace) -> None:
    """Write a checkpoint, upload it if that is asked for, and say what it is."""
    from skipit.train.display import loading
    from skipit.train.export import is_checkpoint
    from skipit.train.hub import check_repository, push

    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)
    source, out = arguments.source, arguments.out
    copy = is_checkpoint(source)
    _check_source(arguments, copy)
    with loading("exporting"):
        made = _copy(arguments) if copy else _export(arguments)
    print(f"{out}: {made}.")
    if arguments.push_to_hub is not None:
        print(f"Uploaded to {push(out, arguments.push_to_hub)}")
    elif not arguments.adapter and not copy:
        print(f"Next: skipit generate {out} --image FILE --prompt TEXT")


def _check_source(arguments: argparse.Namespace, copy: bool) -> None:
    from skipit.router.errors import InputError

    source, has_model = arguments.source, arguments.model is not None
    if copy and (arguments.adapter or has_model):
        raise InputError(f"{source} is a checkpoint already: leave out --adapter and --model, which make one.")
    if arguments.eval is not None and not copy:
        raise InputError("--eval is of a checkpoint: skipit export CHECKPOINT --eval DIR --out COPY.")
    if arguments.adapter and has_model:
        raise InputError("--adapter is of a run: a plan has no LoRA. Leave out --model or --adapter.")
    if not has_model and (source / "plan.json").is_file():
        raise InputError(f"{source} is a plan, which has no weights: name its model, --model MODEL.")


def _copy(arguments: argparse.Namespace) -> str:
    from skipit.train.export import export_again

    export_again(arguments.source, arguments.out, arguments.eval, overwrite=arguments.overwrite)
    return "a copy" if arguments.eval is None else f"a copy, with the figures of {arguments.eval} in its model card"


def _export(arguments: argparse.Namespace) -> str:
    from skipit.train.adapter import export_adapter
    from skipit.train.export import export, export_plan

    source, out, overwrite = arguments.source, arguments.out, arguments.overwrite
    if arguments.adapter:
        size = export_adapter(source, out, overwrite=overwrite)
        return f"adapter checkpoint, {size / 1e6:.2f} MB. It needs its base: skipit.load(DIR, base=...)"
    if arguments.model is not None:
        told: list[str] = []
        export_plan(source, arguments.model, out, overwrite=overwrite, note=told.append)
        return "; ".join(["gated checkpoint", *told]).rstrip(".")
    export(source, out, overwrite=overwrite)
    return "gated checkpoint"
