"""What lossless decoding saves, and what its drafts and verifications cost: scripts/study lossless.

Part `answers`: questions answered by the dense model, by the gated one, and losslessly at several numbers of drafted
tokens, in turn; the time of everything after the prompt, and how many drafted tokens were accepted. The model is a
gated checkpoint (--checkpoint, with rows of --data), or else the reference model, trained at --budget, and reads whole
grids of digits. Part `steps`: what a drafted token and a verification take on a model of a shape with random
weights, whose drafts would be wrong: so many tokens a pass must give to be as fast as the dense model, and so fast it
is when all drafts are right. One JSON file per part; finished ones are not measured again.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import skipit
from skipit.eval.measure.latency import hardware, median_interval
from skipit.eval.measure.stopwatch import now
from skipit.router import Drafts, SkipCache, attach, running
from skipit.theory.inputs import to_model
from skipit.train.adapter import load
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import load_data
from skipit.train.reference.data import reference_dataset

from .shapes import SHAPES, prompt
from .speed import TEXT_TOKENS, EvenShare, units
from .study import Study, command, markdown, once

DENSE, GATED = "dense", "gated"
Options = dict[str, Any]


def after_prompt(model: Any, ask: Callable[[], Any]) -> tuple[Any, float]:
    """What a generation gives, and the seconds that it takes once the model has run the prompt."""
    device = next(model.parameters()).device
    ended: list[float] = []

    def note_end(*_: Any) -> None:
        if not ended:
            ended.append(now(device))

    hook = model.register_forward_hook(note_end)
    try:
        made = ask()
    finally:
        hook.remove()
    return made, now(device) - ended[0]


def answer_times(
    model: Any,
    prompts: Sequence[dict[str, Tensor]],
    drafted: Sequence[int | None],
    budgets: Sequence[float | str | None],
    repeats: int,
    longest: int,
) -> list[dict[str, Any]]:
    """Milliseconds per token, of all ways in turn, and what was drafted and accepted.

    Args:
        model: gated.
        prompts: one row each.
        drafted: numbers of tokens that are drafted at most; None is one more than were accepted the last time.
        budgets: calibrated ones, at which the gated model drafts; None is the default one.
        repeats: of every prompt.
        longest: answer, in tokens.
    """
    ways: dict[str, Options] = {DENSE: {}}
    for budget in budgets:
        at = "" if budget is None else f" at {budget}"
        ways[GATED + at] = {"budget": budget}
        ways |= {
            f"lossless{at}, {most or 'as many as were accepted'} drafted": {
                "lossless": True,
                "draft_budget": budget,
                "draft_tokens": most,
            }
            for most in drafted
        }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counts = {name: Drafts() for name in ways}
    same = dict.fromkeys(ways, 0)
    lengths = []
    for number, batch in enumerate(prompts):
        inputs, wanted = to_model(batch, model), None
        for repeat in range(repeats + (number == 0)):  # the very first one warms up
            names = list(ways)
            for name in [DENSE, *(names[1:] * 2)[repeat % len(names[1:]) :][: len(names[1:])]]:
                settings = {**inputs, **ways[name], "max_new_tokens": longest, "do_sample": False}
                with running(drafts=counts[name], mode="dense" if name == DENSE else None):
                    made, took = after_prompt(model, partial(skipit.generate, model, **settings))
                new = made[0, inputs["input_ids"].shape[1] :]
                wanted = new if wanted is None else wanted
                if number or repeat:
                    seconds[name].append(took / max(1, len(new) - 1))
                    same[name] += torch.equal(new, wanted)
        lengths.append(len(wanted))  # type: ignore[arg-type]
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[DENSE], times, strict=True)]
        rows.append(
            {
                "name": name,
                "ms": 1000 * statistics.median(times),
                "speed_up": statistics.median(ratios),
                "interval": median_interval(ratios),
                "same": same[name] / len(times),
                "drafted": counts[name].drafted,
                "accepted": counts[name].accepted,
                "verifications": counts[name].verifications,
                "tokens": statistics.mean(lengths),
            }
        )
    return rows


@torch.no_grad()
def step_times(
    shape: str, image_tokens: int, drafted: Sequence[int], shares: Sequence[float], repeats: int, **size: Any
) -> list[dict[str, Any]]:
    """Milliseconds of a dense token, of verifications and of drafted tokens, in turn, on one cache with a prompt."""
    model = SHAPES[shape](image_tokens=image_tokens, **size)
    layers = attach(model).num_layers
    inputs, device = to_model(prompt(image_tokens, TEXT_TOKENS, 1), model), next(model.parameters()).device
    cache = SkipCache(layers)
    with running(mode="dense"):
        model(**inputs, past_key_values=cache)
    ways: dict[str, tuple[int, Options]] = {DENSE: (1, {"mode": "dense"})}
    ways |= {_verified(most): (most + 1, {"mode": "dense"}) for most in drafted}
    for share in shares:
        ways[_tokens(share)] = (1, {"policy": EvenShare(share)})
        ways[_layers(share)] = (1, {"policy": units(layers, round((1 - share) * layers), "all")})
    ids = torch.full((1, 1 + max(drafted)), 5, device=device)
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 2):
        names = list(ways)
        for name in (names * 2)[repeat % len(names) :][: len(names)]:
            tokens, options = ways[name]
            with running(**options), cache.undone():
                start = now(device)
                model(input_ids=ids[:, :tokens], past_key_values=cache)
                took = now(device) - start
            if repeat >= 2:
                milliseconds[name].append(1000 * took)
    median = {name: statistics.median(times) for name, times in milliseconds.items()}
    rows = []
    for name in (named(share) for share in shares for named in (_tokens, _layers)):
        for most in drafted:
            spent = (most * median[name] + median[_verified(most)]) / median[DENSE]
            rows.append(
                {
                    "name": name,
                    "drafted": most,
                    "dense_ms": median[DENSE],
                    "draft_ms": median[name],
                    "verification_ms": median[_verified(most)],
                    "break_even": spent,
                    "at_best": (most + 1) / spent,
                }
            )
    return rows


def _verified(most: int) -> str:
    return f"verification of {most}"


def _tokens(share: float) -> str:
    return f"{share:.0%} of layers, other ones for each token"


def _layers(share: float) -> str:
    return f"{share:.0%} of layers, the same for all"


def answers_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Answers as a Markdown table."""
    head = ["", "ms per token", "speed-up", "95 %", "same answer", "drafted tokens accepted", "tokens a dense pass"]
    lines = []
    for row in rows:
        drafts = Drafts(row["drafted"], row["accepted"], row["verifications"])
        between = "-" if row["interval"] is None else "{:.2f} to {:.2f}".format(*row["interval"])
        counted = [f"{drafts.acceptance:.1%}", f"{drafts.accepted_length:.2f}"] if drafts.verifications else ["-", "-"]
        lines.append(
            [row["name"], f"{row['ms']:.2f}", f"{row['speed_up']:.2f}x", between, f"{row['same']:.1%}", *counted]
        )
    return markdown(head, lines)


def steps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Steps as a Markdown table."""
    head = [
        "draft",
        "tokens",
        "dense ms",
        "draft ms",
        "verification ms",
        "as fast at tokens a pass",
        "speed-up at best",
    ]
    numbers = ("dense_ms", "draft_ms", "verification_ms", "break_even")
    lines = (
        [row["name"], str(row["drafted"]), *(f"{row[name]:.2f}" for name in numbers), f"{row['at_best']:.2f}x"]
        for row in rows
    )
    return markdown(head, lines)


def _answers(given: argparse.Namespace) -> dict[str, Any]:
    if given.checkpoint is None:
        study = Study.of(given, given.seed)
        folder = given.out / f"run-{given.kv}-{given.budget:g}-{given.seed}-{given.steps}"
        model, processor = study.trained(study.config(given.budget, given.kv), folder)
    else:
        model, processor = load(given.checkpoint)
    if given.data is None:
        rows = reference_dataset("test", given.samples, given.seed, ("grid",))
    else:
        rows = load_data(given.data, "test", given.samples)
    prompts = list(batches(rows, Collator(processor, with_completion=False), 1))
    budgets = given.draft_budgets or [None]
    return {"rows": answer_times(model, prompts, [None, *given.drafted], budgets, given.repeats, given.max_new_tokens)}


def _steps(given: argparse.Namespace) -> dict[str, Any]:
    times = step_times(given.shape, given.image_tokens, given.drafted, given.shares, given.repeats)
    return {"rows": times}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables."""
    parser = command(
        __name__, __doc__, out=Path("runs/lossless"), budget=0.25, seed=0, steps=250, samples=24, repeats=3
    )
    parser.add_argument(
        "--part", nargs="+", choices=("answers", "steps"), default=["answers", "steps"], help="(default both)"
    )
    parser.add_argument("--checkpoint", type=Path, default=None, help="a gated one, in place of the reference model")
    parser.add_argument("--data", default=None, help="rows with a split `test` (default: grids of digits to be read)")
    parser.add_argument("--kv", choices=("retain", "evict"), default="retain", help="of the reference model's training")
    parser.add_argument("--draft-budgets", nargs="+", default=None, help="calibrated ones (default: the trained)")
    parser.add_argument("--drafted", type=int, nargs="+", default=[1, 2, 3, 5, 8], help="tokens at most")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default %(default)s)")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small", help="of part steps (default %(default)s)")
    parser.add_argument("--image-tokens", type=int, default=576, help="of part steps (default %(default)s)")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.5, 0.25], help="of layers that a drafted token runs"
    )
    given = parser.parse_args(argv)
    data = {name: getattr(given, name) for name in ("data", "kv", "budget", "seed", "steps", "samples")}
    source = {"checkpoint": given.checkpoint and str(given.checkpoint.resolve()), **data}
    size = {"shape": given.shape, "image_tokens": given.image_tokens, "shares": given.shares}
    timed = {"drafted": given.drafted, "repeats": given.repeats, "hardware": hardware()}
    asked = {"draft_budgets": given.draft_budgets, "max_new_tokens": given.max_new_tokens}
    for part in given.part:
        if part == "answers":
            cell = once(given.out, part, {**source, **asked, **timed}, partial(_answers, given))
            print(f"answers of {cell['rows'][0]['tokens']:.0f} tokens in the mean, {timed['hardware']}\n")
            print(answers_table(cell["rows"]))
        else:
            cell = once(given.out, f"{part}-{given.shape}", {**size, **timed}, partial(_steps, given))
            print(f"\nshape {given.shape}, {given.image_tokens} image tokens, {timed['hardware']}\n")
            print(steps_table(cell["rows"]))
