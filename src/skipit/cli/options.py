"""The arguments of every verb, and their defaults from a YAML file: what is typed wins over the file."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

Verb = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """An error is one line, and options are written out: a new one never changes what an abbreviation means."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is."""
        self.exit(2, f"{self.prog}: {message}\nTry `{self.prog} --help`.\n")


def parse(argv: list[str], runs: Mapping[str, Verb]) -> argparse.Namespace:
    """Parse a command line; values of a `--config` file become defaults first.

    Args:
        argv: without the program's name.
        runs: what each verb runs.

    Raises:
        SystemExit: 2 for wrong arguments, 0 after help.
    """
    parser = build_parser(runs)
    early = Parser(prog=parser.prog, add_help=False)
    early.add_argument("--config", type=Path)
    config = early.parse_known_args(argv)[0].config
    if config is not None:
        verbs: Any = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        if argv[0] in verbs.choices:
            _set_defaults(verbs.choices[argv[0]], config, argv)
    return parser.parse_args(argv)


def build_parser(runs: Mapping[str, Verb]) -> Parser:
    """The parser of all verbs."""
    from skipit import __version__

    parser = Parser(prog="skipit", description="Learn which decoder layers a vision-language model may skip.")
    parser.add_argument("--version", action="version", version=f"skipit {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, (does, example, add) in VERBS.items():
        verb: Parser = verbs.add_parser(
            name,
            help=does,
            description=does[0].upper() + does[1:] + ".",
            epilog=f"Example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.set_defaults(run=runs[name])
        verb.add_argument("--config", type=Path, default=None, help="YAML file with defaults; the command line wins")
        add(verb)
    return parser


def _profile(verb: Parser) -> None:
    _model_and_data(verb)
    _out(verb)
    verb.add_argument("--samples", type=_positive, default=256, help="rows to measure (default %(default)s)")
    verb.add_argument("--draws", type=_positive, default=2, help="sampled answers per row (default %(default)s)")
    verb.add_argument(
        "--part",
        choices=("decoder", "vision", "text"),
        default="decoder",
        help="of the model: its decoder, or the redundancy alone of a vision tower or text encoder",
    )
    verb.add_argument("--layers", default=None, help="dotted path of the part's layers, where they are not found")
    _streaming(verb)
    verb.add_argument(
        "--save-every", type=_positive, default=16, help="batches between saves to OUT.partial (default %(default)s)"
    )
    verb.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=False, help="go on from OUT.partial of a killed run"
    )


def _streaming(verb: Parser) -> None:
    verb.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read rows as they are needed, never all: the first --samples of the stream",
    )
    verb.add_argument(
        "--shuffle-buffer",
        type=_not_negative,
        default=0,
        help="of a stream, rows among which the next is drawn (default %(default)s: in order)",
    )


def _plan(verb: Parser) -> None:
    verb.add_argument("profile", type=Path, help="folder made by `skipit profile`")
    _out(verb)
    verb.add_argument("--budget", type=_budget, default=0.5, help=f"{BUDGET} (default %(default)s)")
    verb.add_argument("--kv", choices=("retain", "evict"), default="retain", help=KV)
    verb.add_argument(
        "--init", choices=("theory", "theory-bias", "zero", "run"), default="theory", help="how gates are made"
    )
    verb.add_argument(
        "--mode",
        choices=("late-entry", "early-exit", "both"),
        default=None,
        help="constant gates instead: vision tokens skip the first layers, the last, or both; by budget, or by a rule:",
    )
    verb.add_argument("--max-damage", type=_number, default=None, help="skip layers that do at most this, KL in nats")
    verb.add_argument("--eps", type=_number, default=None, help="skip layers that turn vision by 1 - cos at most this")
    verb.add_argument("--nu", type=_number, default=None, help="... where at most this share of attention is on vision")


def _inspect(verb: Parser) -> None:
    verb.add_argument("model", help="`reference`, a folder with a config.json, or a Hub id; weights are not needed")
    verb.add_argument("--layers", default=None, help="dotted path of the decoder layers, where they are not found")
    verb.add_argument("--json", action=argparse.BooleanOptionalAction, default=False, help="print JSON")


def _theory(verb: Parser) -> None:
    verb.add_argument("profile", type=Path, help="folder made by `skipit profile`")
    verb.add_argument("--model", default=None, help="`reference`, a folder, or a Hub id: measure its tensors too")
    verb.add_argument("--data", default=None, help="rows to measure them on; needed with --model")
    verb.add_argument("--split", default="test", help="of the data (default %(default)s)")
    verb.add_argument("--samples", type=_positive, default=8, help="rows (default %(default)s)")
    verb.add_argument("--batch-size", type=_positive, default=4, help="rows per batch (default %(default)s)")
    verb.add_argument("--seed", type=_not_negative, default=0, help="of everything random (default %(default)s)")


def _probe(verb: Parser) -> None:
    _model_and_data(verb)
    _out(verb)
    verb.add_argument("--samples", type=_positive, default=600, help="rows, half to fit on (default %(default)s)")
    verb.add_argument("--penalty", type=_above_zero, default=0.01, help="L2 of every probe (default %(default)s)")
    verb.add_argument("--splits", type=_positive, default=4, help="in random halves, averaged (default %(default)s)")


def _train(verb: Parser) -> None:
    _model_and_data(verb)
    _out(verb)
    verb.add_argument("--plan", type=Path, default=None, help="folder made by `skipit plan`; default: made first")
    verb.add_argument("--profile", type=Path, default=None, help="folder made by `skipit profile`, to make a plan of")
    verb.add_argument(
        "--profile-samples", type=_positive, default=256, help="rows to measure without either (default %(default)s)"
    )
    verb.add_argument("--budget", type=_budget, default=None, help=f"{BUDGET} (default: the plan's, else 0.5)")
    verb.add_argument(
        "--more-budgets", type=_budgets, default=None, help="further ones to train the same gates for: 0.25,0.75"
    )
    verb.add_argument("--kv", choices=("retain", "evict"), default=None, help="of skipped tokens (default: the plan's)")
    verb.add_argument(
        "--samples", type=_positive, default=None, help="rows to train on (default: one per step and row)"
    )
    _streaming(verb)
    verb.add_argument(
        "--max-broken-rows", type=_not_negative, default=None, help="rows that may be unreadable (default 0)"
    )
    verb.add_argument("--calibration-data", default=None, help="held-out rows (default: another split of the data)")
    verb.add_argument("--calibration-split", default="calibration", help="of these (default %(default)s)")
    verb.add_argument("--calibration-samples", type=_positive, default=192, help="how many (default %(default)s)")
    verb.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=False, help="continue the run in --out"
    )
    verb.add_argument("--report-to", default="none", help="as in transformers' Trainer, such as tensorboard")
    verb.add_argument(
        "--processes", type=_positive, default=None, help="stop unless the launcher started as many (default: any)"
    )
    verb.add_argument(
        "--deepspeed", default=None, help="zero1, zero2, zero3, zero2-offload, zero3-offload, or a JSON file"
    )
    verb.add_argument("--precision", choices=("fp32", "bf16"), default=None, help="of the arithmetic (default fp32)")
    verb.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="less memory, a third more time",
    )
    verb.add_argument("--unit", choices=("block", "attention", "mlp"), default=None, help=UNIT)
    verb.add_argument("--granularity", choices=("token", "sequence"), default=None, help=GRANULARITY)
    # Settings of `TrainConfig` that neither the plan nor the data decide; None keeps their defaults.
    for name, kind in (
        ("steps", _positive),
        ("accumulation", _positive),
        ("learning-rate", _number),
        ("gate-learning-rate", _number),
        ("lora-rank", _not_negative),
        ("lora-alpha", _positive),
        ("distillation", _number),
        ("multiplier-rate", _number),
        ("damping", _number),
        ("save-steps", _positive),
    ):
        verb.add_argument(f"--{name}", type=kind, default=None, help="see `skipit.TrainConfig`")


def _export(verb: Parser) -> None:
    verb.add_argument(
        "source", type=Path, help="folder made by `skipit train` or `skipit plan`, or a checkpoint to copy"
    )
    verb.add_argument("--model", default=None, help="of a plan that nothing was trained for: the dense model")
    verb.add_argument(
        "--adapter",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="gates and LoRA alone, in PEFT's format, to be loaded on top of the base",
    )
    verb.add_argument(
        "--eval", type=Path, default=None, help="of a checkpoint: folder made by `skipit eval`, for its model card"
    )
    verb.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it, too; a new repository is private")
    _out(verb)


def _calibrate(verb: Parser) -> None:
    verb.add_argument("checkpoint", type=Path, help="folder made by `skipit export`, which gets an operating point")
    verb.add_argument("data", help=DATA)
    verb.add_argument("--budget", type=_budget, default=None, help=f"{BUDGET}; its number becomes the name")
    verb.add_argument(
        "--risk", type=_share, default=None, help="share of new rows answered otherwise than by the dense model"
    )
    verb.add_argument(
        "--confidence", type=_share, default=0.95, help="that the risk is no larger (default %(default)s)"
    )
    verb.add_argument("--name", default="certified", help="of the point with this risk (default %(default)s)")
    verb.add_argument("--split", default="calibration", help="of the data (default %(default)s)")
    verb.add_argument("--samples", type=_positive, default=1000, help="rows (default %(default)s)")
    verb.add_argument("--batch-size", type=_positive, default=16, help="rows per batch (default %(default)s)")
    verb.add_argument("--max-new-tokens", type=_positive, default=64, help="longest answer (default %(default)s)")
    verb.add_argument("--seed", type=_not_negative, default=0, help="of the order of rows (default %(default)s)")
    verb.add_argument(
        "--overwrite", action=argparse.BooleanOptionalAction, default=False, help="replace a point of the same name"
    )


def _generate(verb: Parser) -> None:
    verb.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    verb.add_argument("--base", default=None, help="of an adapter: a copy of its base (default: where it was trained)")
    verb.add_argument("--image", type=Path, action="append", required=True, help="image file; repeat for several")
    verb.add_argument("--prompt", required=True, help="the question")
    verb.add_argument(
        "--budget", type=_point, default=None, help="a calibrated budget or named point (default: the trained)"
    )
    verb.add_argument("--max-new-tokens", type=_positive, default=64, help="longest answer (default %(default)s)")
    verb.add_argument(
        "--depth-map", type=_picture, default=None, help="PNG or SVG of the layers run per patch and word"
    )
    verb.add_argument("--dense", action=argparse.BooleanOptionalAction, default=False, help="run every layer")


def _eval(verb: Parser) -> None:
    verb.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    verb.add_argument("data", help=DATA)
    _out(verb)
    verb.add_argument("--split", default="test", help="of the data (default %(default)s)")
    verb.add_argument("--samples", type=_positive, default=300, help="rows (default %(default)s)")
    verb.add_argument("--seed", type=_not_negative, default=0, help="of the data (default %(default)s)")
    verb.add_argument(
        "--base",
        default=None,
        help="dense model to compare with (default: the checkpoint's own weights; of an adapter, its base)",
    )
    verb.add_argument(
        "--budget", type=_point, default=None, help="a calibrated budget or named point (default: the trained)"
    )
    verb.add_argument("--profile", type=Path, default=None, help="profile to compare the skips with")
    verb.add_argument(
        "--also",
        type=_named_checkpoint,
        action="append",
        default=None,
        metavar="NAME=CKPT",
        help="a further router of the same base, such as one that began neutral; may be given more than once",
    )
    verb.add_argument("--baselines", type=Path, default=None, help="folder made by `scripts/study peers`")
    verb.add_argument("--transfer", type=Path, default=None, help="folder made by `scripts/study transfer`")
    verb.add_argument(
        "--controlled-samples",
        type=_not_negative,
        default=48,
        metavar="N",
        help="rows of controlled skipping; 0 leaves out all experiments beyond answering rows (default %(default)s)",
    )
    verb.add_argument("--repeats", type=_positive, default=15, help="of the timing (default %(default)s)")


def _demo(verb: Parser) -> None:
    _out(verb, Path("skipit-demo"))
    verb.add_argument("--budget", type=_budget, default=0.5, help=f"{BUDGET} (default %(default)s)")
    verb.add_argument("--kv", choices=("retain", "evict"), default="retain", help=KV)
    verb.add_argument("--steps", type=_positive, default=250, help="training steps (default %(default)s)")
    verb.add_argument("--samples", type=_positive, default=300, help="held-out rows to answer (default %(default)s)")
    verb.add_argument("--seed", type=_not_negative, default=0, help="of everything random (default %(default)s)")


BUDGET = "share of the dense decoder's FLOPs to spend"
UNIT = "what a token skips: the whole layer, or the attention or MLP inside it (default block)"
GRANULARITY = "each token decides for itself, or a prompt's tokens of a modality together (default token)"
KV = "keys and values of skipped tokens (default %(default)s)"
CHECKPOINT = "folder made by `skipit export`, with or without --adapter"
DATA = "`reference`, a folder, a .jsonl or .parquet file, or a Hub id"

# What a verb does, an example of it, and its arguments; in the order of the data flow.
VERBS: dict[str, tuple[str, str, Callable[[Parser], None]]] = {
    "inspect": ("say what a model is and whether it can have gates", "skipit inspect reference", _inspect),
    "profile": ("measure a model on data", "skipit profile reference reference --out runs/profile", _profile),
    "plan": ("turn a profile into gates", "skipit plan runs/profile --budget 0.5 --out runs/plan", _plan),
    "theory": (
        "print how tight the theory's bounds are on a model",
        "skipit theory runs/profile --model reference --data reference",
        _theory,
    ),
    "probe": (
        "measure what linear probes read of the answer before and after each layer",
        "skipit probe reference reference --out runs/probes",
        _probe,
    ),
    "train": (
        "fine-tune gates and LoRA to a budget",
        "skipit train reference reference --budget 0.5 --out runs/run",
        _train,
    ),
    "export": ("write a gated checkpoint", "skipit export runs/run --out runs/checkpoint", _export),
    "calibrate": (
        "add an operating point to a checkpoint: a budget, or a certified risk",
        "skipit calibrate runs/checkpoint reference --risk 0.02 --confidence 0.95",
        _calibrate,
    ),
    "generate": (
        "answer a question about an image",
        'skipit generate runs/checkpoint --image grid.png --prompt "read the top row ."',
        _generate,
    ),
    "eval": (
        "report what a gated checkpoint costs, saves and follows: report.html and eval.json",
        "skipit eval runs/checkpoint reference --profile runs/profile --out runs/eval",
        _eval,
    ),
    "demo": ("the whole data flow on the reference model", "skipit demo --out demo", _demo),
}


def _out(verb: Parser, default: Path | None = None) -> None:
    shown = "folder to make" if default is None else "folder to make (default %(default)s)"
    verb.add_argument("--out", type=Path, required=default is None, default=default, help=shown)
    verb.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="replace --out")


def _model_and_data(verb: Parser) -> None:
    verb.add_argument("model", help="`reference`, a folder, or a Hub id")
    verb.add_argument("data", help=DATA)
    verb.add_argument("--split", default="train", help="of the data (default %(default)s)")
    verb.add_argument("--batch-size", type=_positive, default=16, help="rows per batch (default %(default)s)")
    verb.add_argument("--seed", type=_not_negative, default=0, help="of everything random (default %(default)s)")
    _columns(verb)


def _columns(verb: Parser) -> None:
    verb.add_argument(
        "--columns",
        type=_names,
        default=None,
        metavar="OURS=THEIRS,...",
        help="columns by other names than images, prompt, completion, messages, answer: images=photo,prompt=question",
    )


def _set_defaults(verb: argparse.ArgumentParser, config: Path, argv: list[str]) -> None:
    import yaml

    where = f"--config {config}"
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        verb.error(f"{where} cannot be read: {error}")
    if not isinstance(values, dict):
        verb.error(f"{where}: got a {type(values).__name__}, expected a mapping of option names to values")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    actions = {a.dest: a for a in verb._actions if a.option_strings and a.dest not in ("help", "config")}
    if unknown := sorted(set(values) - set(actions)):
        verb.error(f"{where}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(actions))}")
    typed = {argument.partition("=")[0] for argument in argv}
    for name, value in values.items():
        action = actions[name]
        try:
            default = _checked(action, value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            verb.error(f"{where}: `{name}`: {error}")
        # A list that is typed replaces the file's, where argparse would add to it.
        if value is not None and not typed & set(action.option_strings):
            action.default, action.required = default, False


def _checked(action: argparse.Action, value: Any) -> Any:
    """A value from a file as the option has it, through the checks of what is typed."""
    if value is None:
        return None
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"got {value!r}, expected true or false")
        return value
    if isinstance(action, argparse._AppendAction):
        return [_one(action, item) for item in (value if isinstance(value, list) else [value])]
    return _one(action, value)


def _one(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, bool | list | dict):
        raise ValueError(f"got {value!r}, expected a single value")
    kind: Any = action.type or str
    converted = kind(str(value))
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"got {value!r}, expected one of {', '.join(map(str, action.choices))}")
    return converted


def _positive(text: str) -> int:
    return _whole(text, 1)


def _not_negative(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least {least}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number, at least 0")
    return value


def _above_zero(text: str) -> float:
    value = _number(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def _budget(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number in (0, 1]: the {BUDGET}")
    return value


def _point(text: str) -> float | str:
    """A budget, or the name of an operating point."""
    try:
        float(text)
    except ValueError:
        return text
    return _budget(text)


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number between 0 and 1")
    return value


def _budgets(text: str) -> tuple[float, ...]:
    return tuple(_budget(part) for part in text.split(","))


def _names(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    known = ("images", "prompt", "completion", "messages", "answer")
    if not all(ours in known and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected such as images=photo,prompt=question")
    return {ours: theirs for ours, _, theirs in pairs}


def _named_checkpoint(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name.strip() or not folder:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a name and a checkpoint, such as neutral=runs/neutral"
        )
    return name.strip(), Path(folder)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, but there is no folder {path.parent}")
    return path
