"""Speed of gated execution on LLaVA-shaped models with random weights: scripts/study speed.

Parts: `efficiency` (time saved for FLOPs saved, prefill and decoding), `schemes` (what peers do, on the same engine),
`scaling` (image tokens and batch), `memory` (keys and values against the ideal, and the peak). Skips are spread evenly
over tokens and layers, so that nothing is flattered by whole layers falling away, unless a row says otherwise. Every
time is a median of interleaved repeats against the untouched model, which is compiled by torch.compile beside it: over
the best is against the faster of the two.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from skipit.eval.measure.latency import Subject, compiled_subject, time_models
from skipit.eval.measure.stopwatch import run_once
from skipit.eval.measure.twin import compiled as compiled_twin
from skipit.eval.measure.twin import twin
from skipit.router import Decision, FixedUnits, LayerByLayer, Trace, attach, running
from skipit.router.call import Call
from skipit.router.config import KVPolicy
from skipit.router.folders import provenance, save_json
from skipit.router.gates import TokenGate
from skipit.theory.cost import CostModel, trace_compute
from skipit.theory.inputs import to_model
from skipit.train.display import note

from .memory import cache_bytes, peak_bytes
from .shapes import SHAPES, prompt
from .study import command, markdown

UNTOUCHED, COMPILED = "untouched", "untouched, compiled"
ATTACHED, WHOLE = "gates decide, all run", "budget 1, nothing is decided"
KINDS = ("prefill", "decode")
DECODE_STEPS = 8
Cases = dict[str, dict[str, Any]]  # options of `running`, by name
TEXT_TOKENS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EvenShare(LayerByLayer):
    """Runs a share of the tokens of every layer, spread evenly and differently in each layer.

    Attributes:
        share: of the tokens.
        by_row: whole rows run or skip a layer together, as under sequence granularity.
    """

    share: float
    by_row: bool = False

    def decide_layer(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        """Run where a low-discrepancy sequence over (token or row, layer) lies below the share."""
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        place = rows.expand_as(call.position) if self.by_row else call.position + 7 * rows
        golden = (place.double() * 0.6180339887 + layer * 0.7548776662) % 1
        return Decision(golden < self.share)


def units(layers: int, skipped: int, modality: str) -> FixedUnits:
    """A table that skips `skipped` of the layers, spread evenly and not the first: vision tokens or all of them."""
    run = torch.ones(layers, 2, dtype=torch.bool)
    for i in range(skipped):
        layer = 1 + i * (layers - 1) // skipped
        run[layer, 0 if modality == "all" else 1 :] = False
    return FixedUnits(run)


def even(*shares: float) -> Cases:
    """Both K/V policies, at some shares of tokens run."""
    return {
        f"{kv}, {1 - share:.0%} skipped": {"policy": EvenShare(share), "kv": kv}
        for kv in get_args(KVPolicy)
        for share in shares
    }


class Bench:
    """An untouched model and its gated twin, and how to time both on one batch of prompts."""

    def __init__(
        self, shape: str, batch: int, image_tokens: int, dtype: str | None = None, compiled: bool = False, **size: int
    ) -> None:
        self.dense = SHAPES[shape](image_tokens=image_tokens, **size)
        if dtype is not None:
            self.dense = self.dense.to(DTYPES[dtype])
        self.gated = twin(self.dense)
        attach(self.gated)
        self.costs = CostModel.of(self.dense)
        self.batch, self.image_tokens = batch, image_tokens
        self.inputs = to_model(prompt(image_tokens, TEXT_TOKENS, batch), self.dense)
        fast = compiled_subject(self.dense, self.inputs) if compiled else "nobody asked"
        self.compiled = {COMPILED: fast} if isinstance(fast, Subject) else {}
        if compiled and not self.compiled:
            note(f"the untouched model could not be compiled: {fast}")
        self.graphs = compiled_twin(self.gated) if compiled else None

    def flops_saved(self, options: dict[str, Any]) -> tuple[float, float]:
        """Share of the dense decoder's FLOPs that a prefill, and a few decoding steps after it, do not execute."""
        trace = Trace()
        with torch.no_grad(), running(**options, trace=trace):
            run_once(self.gated, self.inputs, DECODE_STEPS)
        prefill, whole = trace_compute(self.costs, trace.steps[:1]), trace_compute(self.costs, trace.steps)
        decode = (whole.executed - prefill.executed).sum() / (whole.dense - prefill.dense).sum()
        return 1 - float(prefill.share), 1 - float(decode)

    def time(self, cases: Cases, repeats: int) -> list[dict[str, Any]]:
        """Time the untouched model, eager and compiled, the gated one with everything running, and cases.

        Gates whose logits all exceed the threshold decide for every token all the same; a budget of 1 asks none.
        """
        subjects = {UNTOUCHED: Subject(self.dense), **self.compiled, ATTACHED: Subject(self.gated)}
        cases = {WHOLE: {"budget": 1}, **cases}
        subjects |= {name: Subject(self.gated, _context(options)) for name, options in cases.items()}
        saved = {name: self.flops_saved(options) for name, options in cases.items()}
        if self.graphs is not None:
            for name, options in {ATTACHED: {}, **cases}.items():
                subjects[f"{name}, compiled"] = Subject(self.graphs, _context({**options, "route": "whole"}))
                saved[f"{name}, compiled"] = saved.get(name, (0.0, 0.0))
        times = time_models(subjects, self.inputs, repeats=repeats, decode_steps=DECODE_STEPS)
        rows = []
        best = {
            kind: max(getattr(times[name], f"{kind}_speed_up") for name in (UNTOUCHED, *self.compiled))
            for kind in KINDS
        }
        for name, latency in times.items():
            row = {"name": name, "batch": self.batch, "image_tokens": self.image_tokens, **latency.to_json()}
            for kind, flops in zip(KINDS, saved.get(name, (0.0, 0.0)), strict=True):
                time = 1 - 1 / row[f"{kind}_speed_up"]
                efficiency = time / flops if flops > 0.01 else None
                row |= {f"{kind}_flops_saved": flops, f"{kind}_saved": time, f"{kind}_efficiency": efficiency}
                row[f"{kind}_over_best"] = row[f"{kind}_speed_up"] / best[kind]
            rows.append(row)
        return rows


def efficiency(shape: str, batches: list[int], shares: list[float], repeats: int, **size: Any) -> list[dict[str, Any]]:
    """Time saved for FLOPs saved at several shares of tokens run, for both K/V policies."""
    return [row for batch in batches for row in Bench(shape, batch, 576, **size).time(even(*shares), repeats)]


def schemes(shape: str, batches: list[int], repeats: int, **size: Any) -> list[dict[str, Any]]:
    """What peers do, re-implemented as policies of this engine, all near 30 % of the prefill's FLOPs."""
    out = []
    for batch in batches:
        bench = Bench(shape, batch, 576, **size)
        layers = len(bench.costs.layers)
        frozen, dropped = (units(layers, round(layers * s), of) for s, of in ((0.4, "vision"), (0.33, "all")))
        cases: Cases = {
            "tokens, masked (multiplied by 0)": {"policy": EvenShare(0.65), "kv": "retain", "mode": "masked"},
            "tokens, retain": {"policy": EvenShare(0.65), "kv": "retain"},
            "tokens, evict": {"policy": EvenShare(0.7), "kv": "evict"},
            "rows (sequence plans), evict": {"policy": EvenShare(0.7, by_row=True), "kv": "evict"},
            "vision frozen in layers (ShortV)": {"policy": frozen, "kv": "retain"},
            "layers dropped (ShortGPT)": {"policy": dropped, "kv": "evict"},
            "attention only, evict": {"policy": EvenShare(0.2), "kv": "evict", "unit": "attention"},
            "MLP only": {"policy": EvenShare(0.5), "unit": "mlp"},
        }
        out += bench.time(cases, repeats)
    return out


def scaling(shape: str, image_tokens: list[int], batches: list[int], repeats: int, **size: Any) -> list[dict[str, Any]]:
    """Time against image tokens at batch 1, and against batch at 576 image tokens, when a quarter of tokens run."""
    cases = {f"{kv}, 25% of tokens run": {"policy": EvenShare(0.25), "kv": kv} for kv in get_args(KVPolicy)}
    sizes = [(1, tokens) for tokens in image_tokens] + [(batch, 576) for batch in batches]
    return [row for batch, tokens in sizes for row in Bench(shape, batch, tokens, **size).time(cases, repeats)]


def memory(shape: str, shares: list[float], **size: Any) -> list[dict[str, Any]]:
    """Bytes of keys and values after a prompt, the ideal (tokens that run), and the peak of a forward pass."""
    bench = Bench(shape, 1, 576, **size)
    models: dict[str, tuple[Any, dict[str, Any]]] = {UNTOUCHED: (bench.dense, {}), ATTACHED: (bench.gated, {})}
    models |= {name: (bench.gated, options) for name, options in even(*shares).items()}
    rows = []
    for name, (model, options) in models.items():
        with running(**options):
            held, ideal = cache_bytes(model, bench.inputs, bench.costs)
            peak = peak_bytes(model, bench.inputs)
        rows.append({"name": name, "kv_bytes": held, "kv_ideal": ideal, "peak": peak})
    return rows


def _context(options: dict[str, Any]) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: running(**options)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Times as a Markdown table; the best is the untouched model, compiled or not, whichever is faster."""
    head = ["", "batch", "image tokens"]
    for kind in KINDS:
        head += [f"{kind} ms", "speed-up", "over the best", "FLOPs saved", "time saved", "efficiency"]
    lines = []
    for row in rows:
        lines.append([row["name"], str(row["batch"]), str(row["image_tokens"])])
        for kind in KINDS:
            ratio = row[f"{kind}_efficiency"]
            lines[-1] += [
                f"{row[f'{kind}_ms']:.1f}",
                f"{row[f'{kind}_speed_up']:.2f}x",
                f"{row[f'{kind}_over_best']:.2f}x",
                f"{row[f'{kind}_flops_saved']:.1%}",
                f"{row[f'{kind}_saved']:.1%}",
                "-" if ratio is None else f"{ratio:.2f}",
            ]
    return markdown(head, lines)


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Bytes as a Markdown table, in MB."""
    return markdown(
        ["", "K/V MB", "ideal MB", "peak of a forward pass MB"],
        [
            [row["name"], f"{row['kv_bytes'] / 1e6:.1f}", f"{row['kv_ideal'] / 1e6:.1f}", f"{row['peak'] / 1e6:.0f}"]
            for row in rows
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print tables and optionally write JSON."""
    parts: dict[str, Callable[[], tuple[list[dict[str, Any]], Callable[[Sequence[dict[str, Any]]], str]]]] = {
        "efficiency": lambda: (efficiency(given.shape, given.batch, given.shares, given.repeats, **timed), table),
        "schemes": lambda: (schemes(given.shape, given.batch, given.repeats, **timed), table),
        "scaling": lambda: (scaling(given.shape, given.image_tokens, given.batch, given.repeats, **timed), table),
        "memory": lambda: (memory(given.shape, given.shares, **size), memory_table),
    }
    parser = command(__name__, __doc__, repeats=7, file=None)
    parser.add_argument("--part", nargs="+", choices=parts, default=["efficiency"], help="(default efficiency)")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small", help="(default %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="another than the shape's own")
    parser.add_argument("--layers", type=int, default=None, help="fewer than the shape has")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default 1)")
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[64, 256, 576, 1024, 2304], help="for scaling")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="tokens that run each layer")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=True, help="both models compiled, too"
    )
    given = parser.parse_args(argv)
    size: dict[str, Any] = {name: it for name in ("layers", "dtype") if (it := getattr(given, name)) is not None}
    timed = {**size, "compiled": given.compiled}
    found: dict[str, list[dict[str, Any]]] = {}
    for part in given.part:
        print(f"\n{part}: shape {given.shape}, {torch.get_num_threads()} threads, {TEXT_TOKENS} text tokens")
        found[part], show = parts[part]()
        print(show(found[part]), flush=True)
    if given.file is not None:
        save_json(given.file, {**found, "threads": torch.get_num_threads(), "made_by": provenance()})
