"""How long a decoder layer takes on this machine when some of its tokens skip it, by every way of running it."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skipit.router import Gated, RouterConfig, attach, running
from skipit.router.call import Call, Route
from skipit.router.config import KVPolicy
from skipit.router.decoder import find_decoder, layer_kinds
from skipit.router.gates import TokenGate
from skipit.router.measured import device_name
from skipit.router.stretch import Decision
from skipit.theory.cost import CostModel
from skipit.theory.layer_times import LayerTime, LayerTimes, StepTime

from .twin import twin

# Of the decoder that is timed, at most: as many layers as the model has, where they are so small that what surrounds
# them, decisions above all, takes time beside theirs; but two of LLaVA-7B's.
PARAMETERS = 10**8
VOCABULARY = 16
SHARES = (0.25, 0.5, 0.75)
WAYS: tuple[tuple[KVPolicy, Route | None], ...] = (("retain", "packed"), ("retain", "whole"), ("evict", None))


@dataclass(frozen=True)
class Case:
    """A way to run every layer: how many tokens of a prompt skip it, chosen by chance, and how that is carried out."""

    kv: KVPolicy
    route: Route | None
    skipped: int


@dataclass(frozen=True)
class Spent:
    """Seconds of a case in every repeat: of the prompt, and of one token after it, of those that a step is made of."""

    prompt: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Skipping(Gated):
    """The gates decide, which takes its time, and then a table does."""

    run: Bool[Tensor, "layers seq"] = field(kw_only=True)
    decide_at: ClassVar = (0,)

    def decide(
        self, layers: range, hidden: Float[Tensor, "batch seq dim"], call: Call, gates: Sequence[TokenGate]
    ) -> Decision:
        """Run where the table says so."""
        super().decide(layers, hidden, call, gates)
        return Decision(self.run[layers.start : layers.stop, None].expand(-1, len(hidden), -1))


def measure_layers(
    model: nn.Module,
    layers: str | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokens: Sequence[int] = (64, 640),
    seconds: float = 45.0,
) -> LayerTimes:
    """Time layers with random weights: one prompt, all cases in turn, until the time is over.

    Args:
        model: whose layers these are to be like; it may be on the meta device.
        layers: dotted path of its decoder layers, where they are not found.
        dtype: of the weights.
        device: to measure on.
        tokens: of the prompts.
        seconds: to measure, at most, beyond two repeats of every case.
    """
    dense = small_decoder(model, layers, dtype, device)
    gated = twin(dense)
    attach(gated, RouterConfig(layers="layers"))
    now, clock = clock_of(device)
    depth = len(dense.layers)  # type: ignore[arg-type]
    base, rows, steps = {}, [], {}
    for size in tokens:
        cases = [Case(kv, None, skipped) for kv in ("retain", "evict") for skipped in (0, size)]
        # The last but one: a layer that a single token enters is not yet a layer that nobody does.
        part = sorted({*(round(share * size) for share in SHARES), size - 1} - {0, size})
        cases += [Case(kv, route, skipped) for skipped in part for kv, route in WAYS]
        found = _times(dense, gated, cases, size, now, seconds / len(tokens))
        base[size] = 1000 * statistics.median(found[None].prompt) / depth
        for case in cases:
            ms = 1000 * statistics.median(found[case].prompt) / depth
            relative = _relative(found[case].prompt, found[None].prompt)
            rows.append(LayerTime(size, case.skipped, case.kv, case.route, ms, relative))
        ends = (found[Case("evict", None, skipped)].step for skipped in (0, size))
        entered, left_out = (_relative(end, found[None].step) for end in ends)
        steps[size] = StepTime(1000 * statistics.median(found[None].step) / depth, entered, left_out)
    cost = CostModel.of(dense, "layers").layers[0]
    width, kind = int(dense.config.hidden_size), str(dtype).removeprefix("torch.")  # type: ignore[union-attr, arg-type]
    return LayerTimes(device_name(device), kind, width, cost.linear, clock, base, tuple(rows), steps)


def small_decoder(model: nn.Module, layers: str | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A decoder with layers like a model's, at most `PARAMETERS` in them, a small vocabulary, and random weights."""
    _, decoder, stack = find_decoder(model, layers)
    config: Any = copy.deepcopy(decoder.config)
    most = max(2, PARAMETERS // sum(p.numel() for p in stack[0].parameters()))
    kinds = [kind for kind in layer_kinds(config) if kind != "cross_attention"][:most]
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = len(kinds), VOCABULARY, None
    if getattr(config, "layer_types", None):
        config.layer_types = kinds
    if getattr(config, "cross_attention_layers", None):
        config.cross_attention_layers = []
    with torch.device(device):
        small: nn.Module = type(decoder)._from_config(config, dtype=dtype)  # type: ignore[attr-defined]
    return small.eval()


@torch.no_grad()
def _times(
    dense: nn.Module, gated: nn.Module, cases: list[Case], size: int, now: Callable[[], float], seconds: float
) -> dict[Case | None, Spent]:
    """Seconds of the decoder, in turn, for the untouched one (None) and by case."""
    device = next(dense.parameters()).device
    ids = torch.randint(VOCABULARY, (1, size), device=device)
    order = torch.rand(len(dense.layers), size, device=device).argsort(-1)  # type: ignore[arg-type]
    found: dict[Case | None, Spent] = {case: Spent() for case in (None, *cases)}
    ends = (None, *(Case("evict", None, skipped) for skipped in (0, size)))

    def timed(decoder: nn.Module, **inputs: Any) -> tuple[float, Any]:
        before = now()
        cache = decoder(**inputs, use_cache=True).past_key_values
        return now() - before, cache

    begun = time.perf_counter()
    for repeat in count():
        for case in found:
            skipped = 0 if case is None else case.skipped
            options = {"mode": "dense"} if case is None else {"kv": case.kv, "route": case.route}
            decoder, run = dense if case is None else gated, order >= skipped
            with running(**options, policy=_Skipping(run=run)):
                spent, cache = timed(decoder, input_ids=ids)
            if repeat:  # the first warms up
                found[case].prompt.append(spent)
            if case not in ends:
                continue
            with running(**options, policy=_Skipping(run=run[:, :1])):
                spent, _ = timed(decoder, input_ids=ids[:, :1], past_key_values=cache)
            if repeat:
                found[case].step.append(spent)
        if repeat >= 2 and time.perf_counter() - begun > seconds:
            return found
    raise AssertionError


def _relative(times: Sequence[float], dense: Sequence[float]) -> float:
    """To the untouched decoder's, the median of ratios in turn."""
    return statistics.median(a / b for a, b in zip(times, dense, strict=True))


def clock_of(device: torch.device) -> tuple[Callable[[], float], str]:
    """A clock, and what it counts."""
    if device.type == "cuda":

        def now() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return now, "wall time"
    if torch.get_num_threads() == 1:  # what others do on the machine does not count
        return time.thread_time, "processor time of one thread"
    return time.perf_counter, "wall time"
