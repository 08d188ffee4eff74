"""The `skipit` command: one verb per arrow of the data flow, each thin over one public function.

Heavy imports happen inside the verbs' runs, so `skipit --help` answers at once.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from . import bench, calibrate, demo, export, generate, inspect, plan, probe, profile, theory, train
from . import eval as evaluation
from .options import Parser, claim, partial_folder, set_defaults


class Verb(Protocol):
    """A module of this folder."""

    ABOUT: str
    EXAMPLE: str

    def add_arguments(self, verb: Parser, /) -> None:
        """Add the verb's own arguments to its parser."""

    def run(self, arguments: argparse.Namespace, /) -> None:
        """Do it and print what came of it; a `SkipItError` is what it refuses."""


# In the order of the data flow.
VERBS: dict[str, Verb] = {
    "inspect": inspect,
    "profile": profile,
    "plan": plan,
    "theory": theory,
    "probe": probe,
    "train": train,
    "export": export,
    "calibrate": calibrate,
    "generate": generate,
    "eval": evaluation,
    "bench": bench,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit status: 0 done, 1 refused with a reason, 2 wrong arguments, 130 interrupted, 143 by SIGTERM.
    """
    line = sys.argv[1:] if argv is None else argv
    try:
        # The launcher of DeepSpeed puts this in front; the environment says it too.
        arguments = parse([argument for argument in line if not argument.startswith("--local_rank=")])
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    status = _run(arguments)
    if arguments.verb == "train":
        from skipit.train.launch import end_process

        end_process(status)
    return status


def parse(line: list[str]) -> argparse.Namespace:
    """Parse a command line without the program's name; values of a `--config` file become defaults first.

    Raises:
        SystemExit: 2 for wrong arguments, 0 after help.
    """
    parser = build_parser()
    early = Parser(prog=parser.prog, add_help=False)
    early.add_argument("--config", type=Path)
    config = early.parse_known_args(line)[0].config
    if config is not None and line[0] in VERBS:
        verbs: Any = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        set_defaults(verbs.choices[line[0]], config, line)
    return parser.parse_args(line)


def build_parser() -> Parser:
    """The parser of all verbs."""
    from skipit import __version__

    parser = Parser(prog="skipit", description="Learn which decoder layers a vision-language model may skip.")
    parser.add_argument("--version", action="version", version=f"skipit {__version__}")
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, verb in VERBS.items():
        own: Parser = parsers.add_parser(
            name,
            help=verb.ABOUT,
            description=verb.ABOUT[0].upper() + verb.ABOUT[1:] + ".",
            epilog=f"Example:\n  {verb.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.add_argument("--config", type=Path, default=None, help="YAML file with defaults; the command line wins")
        verb.add_arguments(own)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    try:
        with _stopped_by_signals():
            from skipit.router.errors import SkipItError, readable
            from skipit.train.display import quiet

            try:
                with quiet(), claim(arguments):
                    VERBS[arguments.verb].run(arguments)
            except (SkipItError, OSError) as error:
                print(f"skipit: {readable(str(error))}", file=sys.stderr)
                return 1
    except KeyboardInterrupt as stop:
        if _can_resume(arguments):
            print("skipit: interrupted. The same command with --resume goes on from the last save.", file=sys.stderr)
        else:
            print("skipit: interrupted; nothing was written.", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    return 0


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM, by which clusters preempt, and SIGHUP, of a terminal that closes, stop a verb as Ctrl-C does."""

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # once: what is saved now is saved in full
        raise KeyboardInterrupt(number)

    ours = threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP) if ours}
    ends = [number for number, handler in before.items() if handler == signal.SIG_DFL]  # nohup ignores one
    for number in ends:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ends:
            signal.signal(number, signal.SIG_DFL)


def _can_resume(arguments: argparse.Namespace) -> bool:
    """Whether a verb that was stopped has kept something to go on from."""
    if arguments.verb == "train":
        from skipit.train.run_folder import has_checkpoint

        return has_checkpoint(arguments.out)
    return "resume" in arguments and partial_folder(arguments).is_dir()
