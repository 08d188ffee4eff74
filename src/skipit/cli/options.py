"""What the verbs' arguments share: a parser, types, groups, and defaults from a YAML file."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

BUDGET = "share of the dense decoder's FLOPs to spend"
LATENCY = "share of the dense layers' time for a prompt to spend instead of FLOPs, as `skipit bench` measured it here"
CHECKPOINT = "folder made by `skipit export`, with or without --adapter"
DATA = "`reference`, `documents`, `conversations`, a folder, a .jsonl or .parquet file, or a Hub id"
KV = "keys and values of skipped tokens (default %(default)s)"
# What the folders that skipit makes hold; `--overwrite` replaces nothing else.
MADE = (
    "profile.json",
    "backbone.json",
    "plan.json",
    "train_config.json",
    "run.json",
    "router_config.json",
    "eval.json",
    "summary.json",
    "probes.json",
)
COLUMNS = ("images", "prompt", "completion", "messages", "answer")


class Parser(argparse.ArgumentParser):
    """An error is one line, and options are written out: a new one never changes what an abbreviation means."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is."""
        from skipit.router.errors import readable

        self.exit(2, f"{self.prog}: {readable(message)}\nTry `{self.prog} --help`.\n")

    def add_flag(self, name: str, about: str) -> None:
        """An option that is off, with its `--no-` twin, which wins over a file that turns it on."""
        self.add_argument(name, action=argparse.BooleanOptionalAction, default=False, help=about)

    def add_out(self, default: Path | None = None) -> None:
        """The folder that a verb makes."""
        about = "folder to make" if default is None else "folder to make (default %(default)s)"
        self.add_argument("--out", type=Path, required=default is None, default=default, help=about)
        self.add_flag("--overwrite", "replace --out")

    def add_model_and_data(self) -> None:
        """A model, and the rows of `load_rows`."""
        self.add_argument("model", help="`reference`, `documents`, a folder, or a Hub id")
        self.add_argument("data", help=DATA)
        self.add_split("train")
        self.add_batch_size()
        self.add_seed()
        self.add_columns()

    def add_columns(self) -> None:
        """How the data calls what skipit reads."""
        self.add_argument(
            "--columns",
            type=column_names,
            default=None,
            metavar="OURS=THEIRS,...",
            help=f"columns by other names than {', '.join(COLUMNS)}: images=photo,prompt=question",
        )

    def add_broken(self) -> None:
        """How many rows may be unreadable."""
        self.add_argument(
            "--max-broken-rows",
            type=nonnegative_int,
            default=0,
            metavar="N",
            help="rows that may be unreadable: they are named and left out (default %(default)s)",
        )

    def add_streaming(self) -> None:
        """Rows that are not read all at once."""
        self.add_flag("--streaming", "read rows as they are needed, never all: the first --samples of the stream")
        self.add_argument(
            "--shuffle-buffer",
            type=nonnegative_int,
            default=0,
            help="of a stream, rows among which the next is drawn (default %(default)s: in order)",
        )

    def add_split(self, default: str) -> None:
        """Which rows of the data."""
        self.add_argument("--split", default=default, help="of the data (default %(default)s)")

    def add_samples(self, default: int, about: str = "rows") -> None:
        """How many rows."""
        self.add_argument("--samples", type=positive_int, default=default, help=f"{about} (default %(default)s)")

    def add_batch_size(self, default: int = 16) -> None:
        """How many rows at once."""
        self.add_argument(
            "--batch-size", type=positive_int, default=default, help="rows per batch (default %(default)s)"
        )

    def add_seed(self, of: str = "of everything random") -> None:
        """What random numbers follow."""
        self.add_argument("--seed", type=nonnegative_int, default=0, help=f"{of} (default %(default)s)")

    def add_operating_point(self) -> None:
        """At which operating point a checkpoint runs."""
        self.add_argument(
            "--budget",
            type=operating_point,
            default=None,
            help="a calibrated budget or named point (default: the trained)",
        )

    def add_max_new_tokens(self) -> None:
        """Where an answer is cut."""
        self.add_argument(
            "--max-new-tokens", type=positive_int, default=64, help="longest answer (default %(default)s)"
        )


def claim(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """Keep the folder of `add_out` for this process, and refuse it before hours of work, not after them.

    Nothing is kept for a verb without one, nor for `train`, of whose processes the first keeps it.

    Raises:
        CheckpointError: it is there and not to be overwritten, holds what skipit did not make, cannot be written, or
            another process writes it.
    """
    from skipit.router import folders

    if arguments.verb == "train" or "out" not in arguments:
        return nullcontext()
    return folders.claimed(arguments.out, lambda: folders.check_out(arguments.out, arguments.overwrite, MADE))


def partial_folder(arguments: argparse.Namespace) -> Path:
    """Where a verb with --resume keeps what it has done until --out is whole."""
    out: Path = arguments.out
    return out.parent / f"{out.name}.partial"


def chosen(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Arguments by their names, as keywords of a function that has the same; those a verb lacks are left out."""
    return {name: getattr(arguments, name) for name in names if name in arguments}


def load_rows(arguments: argparse.Namespace, samples: int) -> Any:
    """At most so many rows of what `add_model_and_data` and, where the verb has it, `add_streaming` name.

    Raises:
        InputError: the data cannot be read, or has no such split or columns.
    """
    from skipit.train.data.sources import load_data

    settings = chosen(arguments, "seed", "streaming", "shuffle_buffer", "columns")
    return load_data(arguments.data, arguments.split, samples, **settings)


def readable_rows(arguments: argparse.Namespace, rows: Any, collate: Any) -> Any:
    """Those of some rows that can be read; see `add_broken`.

    Args:
        arguments: with `max_broken_rows`.
        rows: of `load_rows`.
        collate: makes batches of them.

    Raises:
        InputError: more than may be cannot be read.
    """
    from skipit.train.data.collate import tried
    from skipit.train.data.rows import Broken, readable
    from skipit.train.display import note

    return readable(rows, tried(collate), Broken(arguments.max_broken_rows, note))


def set_defaults(verb: Parser, config: Path, line: list[str]) -> None:
    """Make the values of a YAML file a verb's defaults; what is typed wins over them.

    Args:
        verb: the verb's own parser.
        config: a mapping of option names, with `-` or `_`, to values.
        line: what is typed.

    Raises:
        SystemExit: 2 if the file cannot be read, or names or holds what the options do not take.
    """
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
    typed = {argument.partition("=")[0] for argument in line}
    for name, value in values.items():
        action = actions[name]
        try:
            default = _converted(action, value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            verb.error(f"{where}: `{name}`: {error}")
        # A list that is typed replaces the file's, where argparse would add to it.
        if value is not None and not typed & set(action.option_strings):
            action.default, action.required = default, False


def _converted(action: argparse.Action, value: Any) -> Any:
    """A value from a file as the option has it, through the checks of what is typed."""
    if value is None:
        return None
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"got {value!r}, expected true or false")
        return value
    if isinstance(action, argparse._AppendAction):
        return [_converted_item(action, item) for item in (value if isinstance(value, list) else [value])]
    return _converted_item(action, value)


def _converted_item(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, bool | list | dict):
        raise ValueError(f"got {value!r}, expected a single value")
    kind: Any = action.type or str
    converted = kind(str(value))
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"got {value!r}, expected one of {', '.join(map(str, action.choices))}")
    return converted


def positive_int(text: str) -> int:
    """A whole number, at least 1."""
    return _int(text, 1)


def nonnegative_int(text: str) -> int:
    """A whole number, at least 0."""
    return _int(text, 0)


def _int(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least {least}")
    return value


def nonnegative(text: str) -> float:
    """A finite number, at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number, at least 0")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = nonnegative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def probability(text: str) -> float:
    """A number between 0 and 1, neither of them."""
    value = nonnegative(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number between 0 and 1")
    return value


def budget(text: str) -> float:
    """A number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        percent = f"; {text} % is {value / 100:g}" if 1 < value <= 100 else ""
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number in (0, 1]: the {BUDGET}{percent}")
    return value


def operating_point(text: str) -> float | str:
    """A budget, or the name of an operating point."""
    try:
        float(text)
    except ValueError:
        return text
    return budget(text)


def column_names(text: str) -> dict[str, str]:
    """Columns of the data by skipit's names for them."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours in COLUMNS and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected such as images=photo,prompt=question")
    return {ours: theirs for ours, _, theirs in pairs}
