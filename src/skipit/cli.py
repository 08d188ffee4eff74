"""The `skipit` command: one verb per arrow of the data flow, each thin over one public function.

Heavy imports happen inside the verbs, so `skipit --help` answers at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

Verb = Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    """Shows the help of the verb beside an error, and takes defaults from `--config`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nTry `{self.prog} --help`.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 1 refused with a reason, 2 wrong arguments, 130 interrupted."""
    parser = build_parser()
    arguments = _parse(parser, list(sys.argv[1:] if argv is None else argv))
    from skipit.router.errors import SkipItError

    try:
        arguments.run(arguments)
    except SkipItError as error:
        print(f"skipit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("skipit: interrupted; a training run continues with --resume.", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(prog="skipit", description="Learn which decoder layers a vision-language model may skip.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    profile = _verb(
        verbs, "profile", _profile, "measure a model on data", "skipit profile reference reference --out runs/profile"
    )
    _model_and_data(profile)
    profile.add_argument("--samples", type=_positive, default=256, help="rows to measure (default %(default)s)")
    profile.add_argument("--draws", type=_positive, default=2, help="sampled answers per row (default %(default)s)")

    plan = _verb(verbs, "plan", _plan, "turn a profile into gates", "skipit plan runs/profile --budget 0.5 --out runs/plan")
    plan.add_argument("profile", type=Path, help="folder made by `skipit profile`")
    plan.add_argument("--budget", type=_budget, default=0.5, help="share of the decoder's FLOPs to spend (default %(default)s)")
    plan.add_argument("--kv", choices=("retain", "evict"), default="retain", help="keys and values of skipped tokens")
    plan.add_argument(
        "--init", choices=("theory", "theory-bias", "zero", "run"), default="theory", help="how gates are made"
    )

    train = _verb(
        verbs,
        "train",
        _train,
        "fine-tune gates and LoRA to the plan's budget",
        "skipit train reference reference --plan runs/plan --out runs/run",
    )
    _model_and_data(train)
    train.add_argument("--plan", type=Path, required=True, help="folder made by `skipit plan`")
    train.add_argument("--samples", type=_positive, default=None, help="rows to train on (default: all)")
    train.add_argument("--calibration-split", default="calibration", help="held-out rows (default %(default)s)")
    train.add_argument("--calibration-samples", type=_positive, default=192, help="how many (default %(default)s)")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    train.add_argument("--report-to", default="none", help="as in transformers' Trainer, such as tensorboard")
    _training_settings(train)

    export = _verb(
        verbs, "export", _export, "write a gated checkpoint", "skipit export runs/run --out runs/checkpoint"
    )
    export.add_argument("run_folder", metavar="run", type=Path, help="folder made by `skipit train`")

    generate = _verb(
        verbs,
        "generate",
        _generate,
        "answer a question about an image",
        'skipit generate runs/checkpoint --image grid.png --prompt "read the top row ."',
        out=False,
    )
    generate.add_argument("checkpoint", type=Path, help="folder made by `skipit export`")
    generate.add_argument("--image", type=Path, action="append", required=True, help="image file; repeat for several")
    generate.add_argument("--prompt", required=True, help="the question")
    generate.add_argument("--budget", type=_budget, default=None, help="a calibrated operating point (default: the trained)")
    generate.add_argument("--max-new-tokens", type=_positive, default=64, help="longest answer (default %(default)s)")
    generate.add_argument("--depth-map", type=Path, default=None, help="picture of the layers run per patch and word")
    generate.add_argument("--dense", action=argparse.BooleanOptionalAction, default=False, help="run every layer")

    evaluate = _verb(
        verbs,
        "eval",
        _eval,
        "accuracy, executed FLOPs and milliseconds of a gated checkpoint",
        "skipit eval runs/checkpoint reference --profile runs/profile --out runs/eval",
    )
    evaluate.add_argument("checkpoint", type=Path, help="folder made by `skipit export`")
    evaluate.add_argument("data", help="`reference`, a folder, a .jsonl or .parquet file, or a Hub id")
    evaluate.add_argument("--split", default="test", help="of the data (default %(default)s)")
    evaluate.add_argument("--samples", type=_positive, default=300, help="rows (default %(default)s)")
    evaluate.add_argument("--seed", type=int, default=0, help="of the data (default %(default)s)")
    evaluate.add_argument("--base", default=None, help="untouched dense model to compare with (default: the checkpoint's own)")
    evaluate.add_argument("--profile", type=Path, default=None, help="profile to compare the skips with")

    demo = _verb(verbs, "demo", _demo, "the whole data flow on the reference model", "skipit demo --out demo")
    demo.set_defaults(out=Path("skipit-demo"))
    demo.add_argument("--budget", type=_budget, default=0.5, help="share of the decoder's FLOPs (default %(default)s)")
    demo.add_argument("--kv", choices=("retain", "evict"), default="retain", help="keys and values of skipped tokens")
    demo.add_argument("--steps", type=_positive, default=250, help="training steps (default %(default)s)")
    demo.add_argument("--samples", type=_positive, default=300, help="held-out rows to answer (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    return parser


def _verb(verbs: Any, name: str, run: Verb, does: str, example: str, out: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=does,
        description=does[0].upper() + does[1:] + ".",
        epilog=f"Example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--config", type=Path, default=None, help="YAML file with defaults; the command line wins")
    if out:
        parser.add_argument("--out", type=Path, required=name != "demo", help="folder to make")
        parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="replace --out")
    return parser


def _model_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="`reference`, a folder, or a Hub id")
    parser.add_argument("data", help="`reference`, a folder, a .jsonl or .parquet file, or a Hub id")
    parser.add_argument("--split", default="train", help="of the data (default %(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=16, help="rows per batch (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")


def _training_settings(parser: argparse.ArgumentParser) -> None:
    """Flags for the settings of `TrainConfig` that the plan and the data flags do not fix; None keeps its default."""
    for name, kind in (
        ("steps", _positive),
        ("accumulation", _positive),
        ("learning-rate", float),
        ("gate-learning-rate", float),
        ("lora-rank", int),
        ("lora-alpha", int),
        ("distillation", float),
        ("multiplier-rate", float),
        ("damping", float),
        ("save-steps", _positive),
    ):
        parser.add_argument(f"--{name}", type=kind, default=None, help="see `skipit.TrainConfig`")


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse twice when there is a `--config`: its values become defaults, so that the command line wins."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    config = first.parse_known_args(argv)[0].config
    if config is not None and argv:
        verbs: Any = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        verb = verbs.choices.get(argv[0])
        if verb is not None:
            _set_defaults(verb, config)
    return parser.parse_args(argv)


def _set_defaults(verb: argparse.ArgumentParser, config: Path) -> None:
    import yaml

    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        verb.error(f"--config {config} cannot be read: {error}")
    if not isinstance(values, dict):
        verb.error(f"--config {config}: got a {type(values).__name__}, expected a mapping of option names to values")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    actions = {a.dest: a for a in verb._actions if a.option_strings and a.dest not in ("help", "config")}
    if unknown := sorted(set(values) - set(actions)):
        verb.error(f"--config {config}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(actions))}")
    for name, value in values.items():
        action = actions[name]
        # argparse checks a string default as if it had been typed, so every value goes through the same checks.
        plain = isinstance(value, bool) or value is None or isinstance(value, list)
        if isinstance(value, bool) != isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction):
            verb.error(f"--config {config}: `{name}`: got {value!r}")
        action.default = value if plain else str(value)
        action.required = False
        if action.choices is not None and value not in action.choices:
            verb.error(f"--config {config}: `{name}`: got {value!r}, expected one of {', '.join(map(str, action.choices))}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


def _budget(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"got {value:g}, expected a number in (0, 1]: the share of the dense decoder's FLOPs to spend"
        )
    return value


def _refuse_existing(arguments: argparse.Namespace) -> None:
    """Before hours of work, not after them."""
    from skipit.router.errors import CheckpointError

    if arguments.out.exists() and not arguments.overwrite:
        raise CheckpointError(f"{arguments.out} exists. Choose another --out, or pass --overwrite to replace it.")


def _profile(arguments: argparse.Namespace) -> None:
    from skipit.theory.artefact import save_profile

    from .display import loading, progress
    from .pipeline import profile_model
    from .sources import load_data, load_model

    _refuse_existing(arguments)
    with loading("loading"):
        model, processor = load_model(arguments.model)
        rows = load_data(arguments.data, arguments.split, arguments.samples, arguments.seed)
    with progress("profile", len(rows)) as advance:
        result = profile_model(
            model,
            processor,
            advance.over(rows),
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            draws=arguments.draws,
        )
    save_profile(result, arguments.out, arguments.overwrite)
    print(f"{arguments.out}: {result.about['rows']} rows measured, {result.about['skipped_rows']} not finite.")


def _plan(arguments: argparse.Namespace) -> None:
    from skipit.theory.artefact import load_profile, save_plan
    from skipit.theory.plan import make_plan

    plan = make_plan(load_profile(arguments.profile), arguments.budget, arguments.kv, arguments.init)
    save_plan(plan, arguments.out, arguments.overwrite)
    text, vision = plan.run_rate.mean(0).tolist()
    print(f"{arguments.out}: {arguments.init} gates for {arguments.budget:.0%} of the FLOPs; "
          f"expected to run {text:.0%} of text and {vision:.0%} of vision token-layers.")


def _train(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from skipit.theory.artefact import load_plan
    from skipit.train.config import TrainConfig
    from skipit.train.run import train

    from .display import training_progress
    from .sources import load_data, load_model, resolve_model

    plan = load_plan(arguments.plan)
    names = {f.name for f in fields(TrainConfig)}
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    config = TrainConfig.from_dict({**given, "budget": plan.budget, "kv": plan.kv})
    model, processor = load_model(arguments.model)
    samples = arguments.samples or config.steps * config.batch_size * config.accumulation
    rows = load_data(arguments.data, arguments.split, samples, arguments.seed)
    held_out = load_data(arguments.data, arguments.calibration_split, arguments.calibration_samples, arguments.seed)
    with training_progress(config) as callback:
        train(
            model,
            processor,
            rows,
            plan,
            config,
            arguments.out,
            calibration=held_out,
            base=resolve_model(arguments.model) if arguments.model != "reference" else "reference",
            resume=arguments.resume,
            callbacks=[callback],
            report_to=arguments.report_to,
        )
    print(f"{arguments.out}: trained. Next: skipit export {arguments.out} --out DIR")


def _export(arguments: argparse.Namespace) -> None:
    from .pipeline import export

    export(arguments.run_folder, arguments.out, overwrite=arguments.overwrite)
    print(f"{arguments.out}: gated checkpoint. Next: skipit generate {arguments.out} --image FILE --prompt TEXT")


def _generate(arguments: argparse.Namespace) -> None:
    from skipit.router.checkpoint import load

    from .answer import answer, open_images

    images = open_images(arguments.image)
    model, processor = load(arguments.checkpoint)
    reply = answer(
        model,
        processor,
        images,
        arguments.prompt,
        budget=arguments.budget,
        dense=arguments.dense,
        max_new_tokens=arguments.max_new_tokens,
    )
    print(reply.text)
    if reply.compute is not None:
        print(f"({reply.compute:.1%} of the dense decoder's FLOPs)", file=sys.stderr)
    if arguments.depth_map is not None:
        reply.draw(arguments.depth_map)
        print(f"depth map: {arguments.depth_map}", file=sys.stderr)


def _eval(arguments: argparse.Namespace) -> None:
    from skipit.router.checkpoint import load, load_dense
    from skipit.theory.artefact import load_profile

    from .compare import compare
    from .display import progress
    from .pipeline import save_evaluation
    from .sources import load_data, resolve_model

    _refuse_existing(arguments)
    model, processor = load(arguments.checkpoint)
    dense, _ = load_dense(resolve_model(arguments.base) if arguments.base else arguments.checkpoint)
    rows = load_data(arguments.data, arguments.split, arguments.samples, arguments.seed)
    measured = load_profile(arguments.profile) if arguments.profile else None
    with progress("eval", 2 * len(rows)) as advance:
        result = compare(dense, {"gated": model}, processor, rows, measured, progress=advance)
    print(result.table())
    save_evaluation(arguments.out, result.to_json(), arguments.overwrite)


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import demo

    _refuse_existing(arguments)
    demo(
        arguments.out,
        budget=arguments.budget,
        kv=arguments.kv,
        steps=arguments.steps,
        samples=arguments.samples,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )


if __name__ == "__main__":
    sys.exit(main())
