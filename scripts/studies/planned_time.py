"""Is a budget in time as fast as it was asked to be: scripts/study planned-time.

On the reference model, with a profile of it, after `skipit bench reference`; or, without a profile, on `bench-small`,
which is measured here. Gates are the plan's, without training: at threshold 0, and calibrated in time on held-out rows.
Beside them are the operating points in time of checkpoints, as `skipit train` and `skipit calibrate` make them. Timed
is the decoder for the prompt of one row at a time, and for `--answer-tokens` after it, against its dense run in turn.
"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from skipit.eval.measure.bench import clock_of, measure_layers
from skipit.router import Gated, attach, find_router, running, set_gates
from skipit.router.checkpoint import load
from skipit.router.config import KVPolicy
from skipit.router.decoder import find_decoder
from skipit.theory.artefact import load_profile
from skipit.theory.calibrate import meet
from skipit.theory.cost import CostModel
from skipit.theory.layer_times import LayerTimes
from skipit.theory.plan import make_plan
from skipit.theory.profile import Profile, profile
from skipit.theory.time_model import TimeModel
from skipit.train.card import LATENCIES, UNNAMED, checkpoint_record
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import load_model
from skipit.train.reference.data import reference_dataset

from .answers import always, answers, right
from .shapes import bench_small, labelled
from .study import command, markdown

TEXT_TOKENS, IMAGE_TOKENS, ANSWER = 64, 576, 8  # of bench-small's prompts
HEAD = ["", "gates", "asked", "by the table", "measured", "FLOPs", "accuracy"]


@dataclass(frozen=True)
class Setting:
    """A dense model with new gates, and what plans of it are made and measured with.

    Attributes:
        model: with gates.
        profile: of it.
        times: of its layers.
        held_out: batches with labels, to calibrate on.
        prompts: one batch each.
    """

    model: Any
    profile: Profile
    times: LayerTimes
    held_out: list[dict[str, Tensor]]
    prompts: list[dict[str, Tensor]]


@contextmanager
def stopwatch(decoder: nn.Module) -> Iterator[list[float]]:
    """Times at which a decoder is entered and left, as they come."""
    now, _ = clock_of(next(decoder.parameters()).device)
    at: list[float] = []
    hooks = [
        decoder.register_forward_pre_hook(lambda *_: at.append(now()), prepend=True),
        decoder.register_forward_hook(lambda *_: at.append(now())),
    ]
    try:
        yield at
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def decoder_time(
    model: Any, prompts: Sequence[dict[str, Tensor]], repeats: int, answer_tokens: int = 0, **options: Any
) -> float:
    """Time of a gated model's decoder, relative to its dense run: the median of ratios, in turn.

    Args:
        model: with gates.
        prompts: one batch each.
        repeats: measurements of each prompt, after one that does not count.
        answer_tokens: that are decoded after each.
        **options: of `running`.
    """
    ratios: list[float] = []
    dense: dict[str, Any] = {"mode": "dense"}
    length = {"max_new_tokens": answer_tokens + 1, "min_new_tokens": answer_tokens + 1}
    with stopwatch(find_decoder(model)[1]) as at:
        for repeat in range(repeats + 1):
            for prompt in prompts:
                spent = []
                for how in (dense, options):
                    at.clear()
                    with running(**how):
                        model.generate(**prompt, **length, do_sample=False)
                    spent.append(sum(at[1::2]) - sum(at[::2]))
                if repeat:
                    ratios.append(spent[1] / spent[0])
    return statistics.median(ratios)


def reference(at: Path, samples: int) -> Setting:
    """The reference model, its profile, and rows that were not profiled."""
    model, processor = load_model("reference")
    attach(model)
    held_out = list(batches(reference_dataset("calibration", 96), Collator(processor), 48))
    times = TimeModel.of(model).times
    return Setting(model, load_profile(at), times, held_out, _prompts(processor, samples))


def _prompts(processor: Any, samples: int) -> list[dict[str, Tensor]]:
    return list(batches(reference_dataset("test", samples), Collator(processor, with_completion=False), 1))


def small(hidden: int, layers: int, samples: int, seconds: float) -> Setting:
    """Layers of `bench-small` with random weights: damages mean nothing, what skipping saves is real."""
    model = bench_small(hidden, layers, IMAGE_TOKENS)
    rows = labelled(IMAGE_TOKENS, TEXT_TOKENS, samples, ANSWER)
    ones = [{name: value[i : i + 1] for name, value in rows.items()} for i in range(samples)]
    tokens = [IMAGE_TOKENS + TEXT_TOKENS]
    times = measure_layers(model, dtype=model.dtype, device=model.device, tokens=tokens, seconds=seconds)
    measured = profile(model, ones, draws=1)
    attach(model)
    prompts = [{name: value for name, value in row.items() if name != "labels"} for row in ones]
    return Setting(model, measured, times, ones, prompts)


def planned(
    setting: Setting, kv: KVPolicy, latency: float, repeats: int, answer_tokens: int = 0
) -> Iterator[list[str]]:
    """A plan in time as it is, and calibrated; of one for an answer the second is by the prompt, which is held."""
    model, costs = setting.model, CostModel.of(setting.model)
    times, asked = TimeModel(setting.times, costs.depth), f"{latency:g}"
    plan = make_plan(setting.profile, latency, kv, times=setting.times, answer_tokens=answer_tokens)
    set_gates(model, plan.weight, plan.bias)
    found = decoder_time(model, setting.prompts, repeats, answer_tokens, kv=kv, policy=Gated(0.0))
    expected = plan.about.get("answer", plan.about)["expected_latency"]
    yield [f"`{kv}`", "plan", asked, f"{expected:.2f}", f"{found:.2f}", f"{plan.budget:.2f}", ""]
    assert plan.latency is not None
    met, asked = meet(model, setting.held_out, costs, plan.latency, kv, times=times), f"{plan.latency:g}"
    assert met.took is not None
    found = decoder_time(model, setting.prompts, repeats, kv=kv, policy=Gated(met.threshold))
    yield [f"`{kv}`", "calibrated", asked, f"{met.took.share:.2f}", f"{found:.2f}", f"{met.flops:.2f}", ""]


def trained(checkpoint: Path, samples: int, repeats: int) -> Iterator[list[str]]:
    """The operating points in time of a checkpoint of the reference model, with the accuracy at each."""
    (model, processor), record = load(checkpoint), checkpoint_record(checkpoint)
    kv = find_router(model)[1].config.kv
    rows = list(batches(reference_dataset("test", 240), Collator(processor), 48))
    for name, took in record[LATENCIES].items():
        how = {} if name == UNNAMED else {"budget": name}
        found = decoder_time(model, _prompts(processor, samples), repeats, **how)
        accuracy = answers(model, rows, always(how)).same(right(rows))
        shares = f"{took['share']:.2f}", f"{found:.2f}", f"{record['calibrated_shares'][name]:.2f}"
        yield [f"`{kv}`", checkpoint.name, f"{took['asked']:g}", *shares, f"{accuracy:.1%}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print asked, expected and measured shares of the dense time."""
    parser = command(__name__, __doc__, samples=16, repeats=3)
    parser.add_argument("profile", type=Path, nargs="?", help="of the reference model; without one, `bench-small`")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.9, 0.75, 0.6, 0.4])
    parser.add_argument("--answer-tokens", type=int, default=0, help="that plans are made for (default 0)")
    parser.add_argument("--kv", nargs="+", choices=get_args(KVPolicy), default=list(get_args(KVPolicy)))
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[], help="of the reference model")
    parser.add_argument("--hidden", type=int, default=1024, help="width of `bench-small` (default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of `bench-small` (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=45.0, help="to measure its layers (default %(default)g)")
    given = parser.parse_args(argv)
    if given.profile is not None:
        setting = reference(given.profile, given.samples)
    else:
        setting = small(given.hidden, given.layers, given.samples, given.seconds)
    timed = given.repeats, given.answer_tokens
    lines = [line for kv in given.kv for at in given.latency for line in planned(setting, kv, at, *timed)]
    lines += [line for at in given.checkpoints for line in trained(at, given.samples, given.repeats)]
    print(markdown(HEAD, lines, (0, 1)))
