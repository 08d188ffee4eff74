"""Does skipping save time on a GPU, and do the laws hold there? scripts/bench_gpu, for one H100 and six minutes.

Needs torch, transformers and this checkout: nothing is installed or downloaded. Models have random weights and the
shapes of LLaVA-1.5-7B and Qwen2.5-VL-7B; the gates are real ones, with random weights and thresholds at which the
shares of tokens run that a row names, and decide once. Every time is a median of pairs with the untouched eager model.
Each row is written as soon as it is measured; what there is no time for is named, and what fails says why.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from skipit.eval.measure.stopwatch import now, run_once
from skipit.eval.measure.twin import twin
from skipit.router import Decision, Gated, Trace, attach, gate_state, gated_layers, running, set_gates
from skipit.router import compile as compile_layers
from skipit.router.call import Call
from skipit.router.config import KVPolicy
from skipit.router.decoder import find_decoder
from skipit.router.gates import TokenGate, logits_of
from skipit.theory.cost import CostModel, trace_compute
from skipit.theory.inputs import to_model

from .counts import CALLS, count_calls
from .memory import most_allocated, peak_bytes
from .rows import Report
from .shapes import bench_7b, bench_qwen, bench_small, labelled, prompt, prompt_qwen

SHARES = (0.75, 0.5, 0.25)
WAYS: tuple[tuple[KVPolicy, str | None], ...] = (("retain", "whole"), ("retain", "packed"), ("evict", None))
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest logit
EVERYONE = -1e9  # a threshold that every token exceeds


@dataclass(frozen=True)
class _Reading(Gated):
    """Lets everything run, and keeps the logits."""

    threshold: float = EVERYONE
    read: list[Tensor] = field(default_factory=list)

    def decide(self, layers: range, hidden: Tensor, call: Call, gates: Sequence[TokenGate]) -> Decision:
        """As the gates do."""
        self.read.append(logits_of(gates, hidden, call.modality))
        return super().decide(layers, hidden, call, gates)


@torch.no_grad()
def random_gates(model: Any, inputs: dict[str, Tensor]) -> dict[float, float]:
    """Give a model random gates whose logits are spread alike in all layers; thresholds by share of tokens run."""
    gates = [layer.layer_gate for layer in gated_layers(model)]
    weight = torch.randn(len(gates), *gates[0].weight.shape, generator=torch.Generator().manual_seed(0))
    set_gates(model, weight, torch.zeros(weight.shape[:2]))
    with running(policy=(reading := _Reading())):
        model(**inputs, use_cache=False, logits_to_keep=1)
    logits = reading.read[0].flatten(1).double().cpu()
    mean, std = logits.mean(1, keepdim=True), logits.std(1, keepdim=True)
    set_gates(model, (weight / std[..., None]).float(), (-mean / std).float().expand(weight.shape[:2]))
    return {share: float(((logits - mean) / std).quantile(1 - share)) for share in SHARES}


def cases(thresholds: dict[float, float]) -> dict[str, dict[str, Any]]:
    """Options of `running` by name."""
    found: dict[str, dict[str, Any]] = {"gates, all run": {"policy": Gated(EVERYONE)}}
    for kv in ("retain", "evict"):
        found |= {f"{kv}, {share:.0%} run": {"policy": Gated(t), "kv": kv} for share, t in thresholds.items()}
    return found


@torch.no_grad()
def law(
    size: dict[str, int], dtype: torch.dtype, device: str, batch: int, recorded: bool, **options: Any
) -> dict[str, Any]:
    """Masked and gathered execution give the same, in a prompt and some tokens after it."""
    model = bench_small(image_tokens=16, **size).to(device, dtype)
    inputs = to_model(prompt(16, 48, batch), model)
    attach(model)
    policy = Gated(random_gates(model, inputs)[0.5])
    if recorded:
        compile_layers(model, backend="cudagraphs")
    with running(mode="masked", policy=policy, **options):
        wanted = answered(model, inputs)
    for _ in range(3 if recorded else 1):  # it is recorded the second time, and replayed the third
        with running(mode="gathered", policy=policy, **options):
            found = answered(model, inputs)
    error = float((wanted - found).abs().max() / wanted.abs().max())
    return {"error": error, "holds": error <= CLOSE[dtype]}


def answered(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a prompt and of tokens after it, fp32."""
    output = model(**inputs, use_cache=True)
    logits, mask = [output.logits], inputs["attention_mask"]
    for token in range(11, 17):
        mask = torch.cat([mask, mask[:, :1]], dim=1)
        ids = torch.full_like(mask[:, :1], token)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=output.past_key_values)
        logits.append(output.logits)
    return torch.cat(logits, dim=1).float()


class Subject:
    """A model, its gated twin, and a batch of prompts."""

    def __init__(self, dense: Any, inputs: dict[str, Tensor]) -> None:
        self.dense, self.inputs = dense, to_model(inputs, dense)
        self.gated, self.recorded = twin(dense), twin(dense)
        attach(self.gated)
        self.cases = cases(random_gates(self.gated, self.inputs))
        attach(self.recorded)
        set_gates(self.recorded, **gate_state(self.gated))
        compile_layers(self.recorded, backend="cudagraphs")
        self.costs = CostModel.of(dense)

    def counts(self, options: dict[str, Any] | None, call: int) -> dict[str, Any]:
        """Launches and reads of one call, of the untouched model where there are no options."""
        found = count_calls(self.gated if options else self.dense, self.inputs, **(options or {}))[call]
        row = {"launches": sum(one.total() for one in found.launches.values()), "reads": found.waited()}
        return {**row, **(self._profiled(options) if self.dense.device.type == "cuda" and call == 0 else {})}

    @torch.no_grad()
    def _profiled(self, options: dict[str, Any] | None) -> dict[str, Any]:
        """What the device says: kernels, and copies to the host."""
        from torch.profiler import ProfilerActivity, profile

        with running(**(options or {})), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
            (self.gated if options else self.dense)(**self.inputs, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
        names = [event.name for event in record.events() if "CUDA" in str(event.device_type)]
        kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in names)
        return {"kernels": kernels, "copies_to_host": sum("DtoH" in name for name in names)}

    def speed(self, model: Any, options: dict[str, Any], steps: int, seconds: float) -> dict[str, Any]:
        """Time to the first token, pictures encoded, and per token after it; FLOPs run; memory of a forward pass."""
        times: list[tuple[float, float, float, float]] = []
        with running(**options):  # the untouched model has no gates that this would reach
            for _ in range(3 if model is self.recorded else 1):  # recorded the second time
                run_once(model, self.inputs, steps)
            run_once(self.dense, self.inputs, steps)
            started = time.monotonic()
            while len(times) < 3 or (time.monotonic() - started < seconds and len(times) < 15):
                times.append((*run_once(self.dense, self.inputs, steps), *run_once(model, self.inputs, steps)))
            peak = peak_bytes(model, self.inputs)
        row = {"ttft_ms": 1000 * median(t[2] for t in times), "ttft_speed_up": median(t[0] / t[2] for t in times)}
        row |= {"tpot_ms": 1000 * median(t[3] for t in times), "tpot_speed_up": median(t[1] / t[3] for t in times)}
        return {**row, **self._flops(model, options, steps), "peak_mb": peak / 1e6, "repeats": len(times)}

    @torch.no_grad()
    def answer(self, model: Any, options: dict[str, Any], tokens: int, **given: Any) -> dict[str, Any]:
        """Milliseconds of `generate` per token after the first, what it does between calls of the model included."""

        def seconds(new: int) -> float:
            started = now(model.device)
            model.generate(**self.inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **given)
            return now(model.device) - started

        with running(**options):
            for _ in range(3):
                seconds(tokens)
            times = [(seconds(tokens) - seconds(1)) / (tokens - 1) for _ in range(3)]
        return {"ms_per_token": 1000 * median(times), "repeats": len(times)}

    def _flops(self, model: Any, options: dict[str, Any], steps: int) -> dict[str, float]:
        if not options:
            return {"prefill_flops": 1.0, "decode_flops": 1.0}
        with running(**options, trace=(trace := Trace())):
            run_once(model, self.inputs, steps)
        first, whole = trace_compute(self.costs, trace.steps[:1]), trace_compute(self.costs, trace.steps)
        decode = (whole.executed - first.executed).sum() / (whole.dense - first.dense).sum()
        return {"prefill_flops": float(first.share), "decode_flops": float(decode)}


def training_step(dense: Any, inputs: dict[str, Tensor], kv: KVPolicy | None, repeats: int = 3) -> dict[str, Any]:
    """Milliseconds and memory of a forward and a backward pass in which gates learn, through frozen weights.

    Args:
        dense: the model.
        inputs: with labels.
        kv: of its gated twin; None is the untouched model, whose gradients go as far as those of LoRA would.
        repeats: the first, which is not timed, not counted.
    """
    model = twin(dense)
    if kv is not None:
        attach(model)
    model.requires_grad_(False)
    gates = [p for layer in gated_layers(model) for p in layer.layer_gate.parameters()] if kv else []
    for gate in gates:
        gate.requires_grad_(True)
    hook = model.get_input_embeddings().register_forward_hook(lambda *given: given[-1].requires_grad_())
    model.train()

    def step() -> float:
        started = now(model.device)
        with running(mode="masked", kv=kv) if kv else running():
            model(**inputs, use_cache=False).loss.backward()
        return now(model.device) - started

    try:
        peak, times = most_allocated(step, model.device), [step() for _ in range(repeats)]
    finally:
        hook.remove()
        dense.requires_grad_(False).eval()
    return {"ms": 1000 * median(times), "peak_mb": peak / 1e6, "gates_learn": all(g.grad is not None for g in gates)}


def backend(model: Any) -> str:
    """Of torch.compile: on a CPU, where this script is only tried, one that makes no kernels."""
    return "inductor" if model.device.type == "cuda" else "eager"


def compiled(dense: Any, whole: bool) -> Any:
    """The untouched model, its decoder compiled as a whole, or its layers' norms and MLPs, which takes seconds."""
    model = twin(dense)
    _, decoder, layers = find_decoder(model, None)
    parts = [decoder] if whole else [m for layer in layers for n, m in layer.named_children() if "attn" not in n]
    for part in parts:
        part.compile(backend=backend(model))
    return model


def shapes(tiny: bool, device: str) -> Iterator[tuple[str, Any, Callable[[int, int], dict[str, Tensor]]]]:
    """Models one after the other, each with what makes prompts of some images and a batch for it."""
    side = 4 if tiny else 24

    def llava(images: int, batch: int) -> dict[str, Tensor]:
        return prompt(side**2, 64, batch, images)

    def qwen(images: int, batch: int) -> dict[str, Tensor]:
        return prompt_qwen(side**2 * images, 64, batch)  # one picture of as many tokens

    yield "LLaVA-1.5-7B", bench_small(128, 2, side**2) if tiny else bench_7b(device=device), llava
    small: dict[str, Any] = (
        {"hidden": 128, "layers": 2, "dtype": torch.float32, "tower": 0, "vocabulary": 1000} if tiny else {}
    )
    yield "Qwen2.5-VL-7B", bench_qwen(**small, device=device), qwen


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print Markdown and write JSON."""
    parser = argparse.ArgumentParser(
        "scripts/bench_gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"), help="JSON file (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=6, help="after which no row is begun (default %(default)s)")
    parser.add_argument("--device", default="cuda", help="(default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="models of a few layers: to try the script itself")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device`: got cuda, and torch finds none. Try the script with --device cpu --tiny.")
    card = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    report = Report(given.out, given.minutes, device=card, tiny=given.tiny)
    size = {"hidden": 128, "layers": 2} if given.tiny else {"hidden": 1024, "layers": 6}
    for dtype, (kv, route), batch, recorded in product(CLOSE, WAYS, (1, 4), (False, True)):
        what: dict[str, Any] = {"dtype": str(dtype), "kv": kv, "route": route, "batch": batch, "recorded": recorded}
        options = {"kv": kv, "route": route}
        report.add(partial(law, size, dtype, given.device, batch, recorded, **options), kind="law", **what)
    for number, (shape, dense, prompts) in enumerate(shapes(given.tiny, given.device)):
        measure(report, shape, dense, prompts, given.tiny, by=0.72 if number == 0 else 1.0)
        del dense
        torch.compiler.reset()  # which holds weights, too
        gc.collect()
    print("\n" + report.tables())


def measure(report: Report, shape: str, dense: Any, prompts: Any, tiny: bool, by: float) -> None:
    """All rows of one shape, the most telling ones first."""
    per_image, pace, tokens = (16, (2, 0.0), 4) if tiny else (576, (8, 1.0), 17)
    parts = compiled(dense, whole=False)
    for images, batch in ((1, 1), (4, 1)) if tiny else ((1, 1), (4, 1), (1, 16), (1, 8), (4, 8)):
        subject = Subject(dense, prompts(images, batch))
        what: dict[str, Any] = {"shape": shape, "image_tokens": images * per_image, "batch": batch}
        if (images, batch) == (1, 1):
            for name, call in product((None, "gates, all run", "retain, 50% run", "evict, 50% run"), (0, 2)):
                counted = partial(subject.counts, subject.cases[name] if name else None, call)
                report.add(counted, by, kind="counts", **what, model=name or "dense", call=CALLS[call])
        cases = {k: v for k, v in subject.cases.items() if batch == 1 or "all" in k or "50" in k}
        models = {"dense": (subject.dense, {}), **{name: (subject.gated, case) for name, case in cases.items()}}
        models["dense, norms and MLPs compiled"] = (parts, {})
        # Of a large batch recordings save nothing, and take memory.
        recorded = {f"{k}, recorded": (subject.recorded, {**v, "route": "whole"}) for k, v in cases.items()}
        for name, (model, case) in {**models, **(recorded if batch == 1 else {})}.items():
            report.add(partial(subject.speed, model, case, *pace), by, kind="speed", **what, model=name)
        if (images, batch) == (1, 1):
            for name, (model, case) in {"dense": models["dense"], **recorded}.items():
                answer = partial(subject.answer, model, case, tokens)
                report.add(answer, by, kind="answer", **what, model=name)
            if dense.device.type == "cuda":  # transformers then has torch.compile capture its steps (reduce-overhead)
                static = partial(subject.answer, subject.dense, {}, tokens, cache_implementation="static")
                report.add(static, by - 0.1, kind="answer", **what, model="dense, static cache, compiled")
        if (images, batch) == (1, 1) and "LLaVA" in shape:
            learn = to_model(labelled(per_image, 64, 1, 16), dense)
            for kv in (None, "retain", "evict"):
                report.add(partial(training_step, dense, learn, kv), by, kind="training step", **what, kv=kv or "dense")
        del subject, models, recorded, model
        gc.collect()
    subject = Subject(dense, prompts(1, 1))
    what = {"shape": shape, "image_tokens": per_image, "batch": 1, "model": "dense, decoder compiled"}
    report.add(partial(subject.speed, compiled(dense, whole=True), {}, *pace), by - 0.1, kind="speed", **what)
