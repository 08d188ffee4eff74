"""Is a plan in time as fast as it was asked to be, on the reference model: scripts/study planned-time.

Run `skipit bench reference` first. Gates are those of the plan, without training or calibration; timed is the decoder
for the prompt of one held-out row at a time, against its dense run in turn.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from skipit.eval.measure.bench import clock_of
from skipit.router import attach, running, set_gates
from skipit.router.config import KVPolicy
from skipit.router.decoder import find_decoder
from skipit.theory.artefact import load_profile
from skipit.theory.layer_times import times_for
from skipit.theory.plan import make_plan
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import load_model
from skipit.train.reference.data import reference_dataset

from .study import command, markdown


@torch.no_grad()
def decoder_time(model: nn.Module, prompts: Sequence[dict[str, Tensor]], repeats: int, **options: Any) -> float:
    """Time of a gated model's decoder, relative to its dense run: the median of ratios, in turn.

    Args:
        model: with gates.
        prompts: one batch each.
        repeats: measurements of each prompt, after one that does not count.
        **options: of `running`.
    """
    decoder = find_decoder(model)[1]
    now, _ = clock_of(next(decoder.parameters()).device)
    at: list[float] = []
    decoder.register_forward_pre_hook(lambda *_: at.append(now()), prepend=True)
    decoder.register_forward_hook(lambda *_: at.append(now()))
    ratios: list[float] = []
    dense: dict[str, Any] = {"mode": "dense"}
    for repeat in range(repeats + 1):
        for prompt in prompts:
            at.clear()
            for how in (dense, options):
                with running(**how):
                    model(**prompt, use_cache=True)
            if repeat:
                ratios.append((at[3] - at[2]) / (at[1] - at[0]))
    return statistics.median(ratios)


def main(argv: Sequence[str] | None = None) -> None:
    """Print asked, expected and measured shares of the dense time."""
    parser = command(__name__, __doc__, samples=16, repeats=3)
    parser.add_argument("profile", type=Path, help="of the reference model, by `skipit profile reference reference`")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.9, 0.75, 0.6, 0.4])
    given = parser.parse_args(argv)
    profile = load_profile(given.profile)
    times, lines = times_for(profile), []
    for kv in get_args(KVPolicy):
        for latency in given.latency:
            model, processor = load_model("reference")
            collate = Collator(processor, with_completion=False)
            prompts = list(batches(reference_dataset("test", given.samples), collate, 1))
            plan = make_plan(profile, latency, kv, times=times)
            attach(model)
            set_gates(model, plan.weight, plan.bias)
            found = decoder_time(model, prompts, given.repeats, kv=kv)
            expected = plan.about["expected_latency"]
            lines.append([f"`{kv}`", f"{latency:g}", f"{expected:.2f}", f"{found:.2f}", f"{plan.budget:.2f}"])
    print(markdown(["", "asked", "expected", "measured", "FLOPs expected"], lines))
