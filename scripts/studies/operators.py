"""Where do gates spend their time against the dense model, operator by operator: scripts/study operators.

torch.profiler over a prompt and over decoding steps, batch 1: of the reference model with a plan's gates at half of the
FLOPs, whose decision is made once; and of `bench-small`, where half of the tokens skip each layer, chosen evenly. Self
times by groups of operators, the least of repeats that take turns, because a profiler counts what others took of the
processor, too; and how often each was called. It takes time itself, a microsecond or so a call: sums are above what
`scripts/study speed` measures without it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from skipit.eval.measure.twin import twin
from skipit.router import Gated, attach, running, set_gates
from skipit.router.config import KVPolicy
from skipit.router.folders import provenance, save_json
from skipit.theory.calibrate import calibrate
from skipit.theory.plan import make_plan
from skipit.train.data.collate import Collator, batches

from .options import command, markdown
from .shapes import bench_small, prompt
from .speed import ATTACHED, TEXT_TOKENS, UNTOUCHED, even
from .study import Study

BUDGET, STEPS, IMAGE_TOKENS = 0.5, 8, 576
GROUPS = {
    "linear maps": "mm addmm bmm linear matmul mkldnn",
    "attention": "attention",
    "packing and copies": "index gather scatter nonzero copy clone cat where sort zeros",
    "views and memory": "view reshape transpose slice empty strided expand squeeze select alias resize unbind split "
    "permute detach flatten chunk narrow lift ::t",
    "reads by the host": "item local_scalar is_nonzero",
}
REST = "arithmetic by element"
Cases = dict[str, tuple[Any, dict[str, Any]]]  # a model and options of `running`, by name


def group_of(operator: str) -> str:
    """The group of an operator, by its name.

    Example:
        >>> group_of("aten::addmm"), group_of("aten::index_select"), group_of("aten::silu")
        ('linear maps', 'packing and copies', 'arithmetic by element')
    """
    order = ("reads by the host", "attention", "packing and copies", "views and memory", "linear maps")
    return next((g for g in order if any(_is(part, operator) for part in GROUPS[g].split())), REST)


def _is(part: str, operator: str) -> bool:
    return operator.endswith(part) if part.startswith("::") else part in operator


def recorded(model: Any, inputs: dict[str, Tensor]) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Milliseconds and calls by group of one prompt, then of a decoding step after it, in the mean over `STEPS`."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        found = model(**inputs, use_cache=True, logits_to_keep=1)
    yield _by_group(record, 1)
    mask, token = inputs["attention_mask"], found.logits[:, -1].argmax(-1, keepdim=True)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(STEPS):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
            model(input_ids=token, attention_mask=mask, past_key_values=found.past_key_values, use_cache=True)
    yield _by_group(record, STEPS)


def _by_group(record: Any, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    ms: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    for event in record.key_averages():
        if event.key.startswith("aten::"):
            ms[group_of(event.key)] += event.self_cpu_time_total / 1000 / steps
            calls[group_of(event.key)] += event.count / steps
    return ms, calls


@torch.no_grad()
def measure(cases: Cases, inputs: dict[str, Tensor], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """By phase, a row per group: least milliseconds, and calls, by case; after one repeat that does not count."""
    found: dict[str, dict[str, list[Any]]] = {phase: {name: [] for name in cases} for phase in ("prompt", "token")}
    for repeat in range(repeats + 1):
        for name, (model, options) in cases.items():
            with running(**options):
                for phase, pair in zip(found, recorded(model, inputs), strict=True):
                    found[phase][name] += [pair] if repeat else []
    return {
        phase: [
            {
                "group": group,
                "ms": {name: min(ms[group] for ms, _ in pairs) for name, pairs in by_case.items()},
                "calls": {name: pairs[-1][1][group] for name, pairs in by_case.items()},
            }
            for group in (*GROUPS, REST)
        ]
        for phase, by_case in found.items()
    }


def reference(rows: int) -> tuple[Cases, dict[str, Tensor]]:
    """The reference model and its gates by a plan, calibrated."""
    study = Study(profiled=rows, calibration=rows)
    dense, processor = study.dense
    cases: Cases = {UNTOUCHED: (dense, {})}
    for kv in get_args(KVPolicy):
        plan = make_plan(study.profile, BUDGET, kv)
        gated = twin(dense)
        attach(gated)
        set_gates(gated, plan.weight, plan.bias)
        threshold, _ = calibrate(gated, study.held_out, study.costs, BUDGET, kv)
        cases.setdefault(ATTACHED, (gated, {"policy": Gated(-1e9), "kv": kv}))
        cases[f"{kv}, half of the FLOPs"] = (gated, {"policy": Gated(threshold), "kv": kv})
    inputs = next(batches(study.rows("test", 1), Collator(processor, with_completion=False), 1))
    return cases, inputs


def small(hidden: int, layers: int) -> tuple[Cases, dict[str, Tensor]]:
    """`bench-small`, of whose tokens half skip each layer."""
    dense = bench_small(hidden, layers, IMAGE_TOKENS)
    gated = twin(dense)
    attach(gated)
    cases = {UNTOUCHED: (dense, {}), ATTACHED: (gated, {}), **{n: (gated, o) for n, o in even(1 - BUDGET).items()}}
    return cases, prompt(IMAGE_TOKENS, TEXT_TOKENS, 1)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds and calls of the untouched model, and how many more others take, as a Markdown table."""
    names = list(rows[0]["ms"])
    total = {key: {name: sum(row[key][name] for row in rows) for name in names} for key in ("ms", "calls")}
    lines = []
    for row in (*rows, {"group": "*sum*", **total}):
        ms, calls = row["ms"], row["calls"]
        cells = [f"{ms[name] - ms[UNTOUCHED]:+.2f} ({calls[name] - calls[UNTOUCHED]:+.0f})" for name in names[1:]]
        lines.append([row["group"], f"{ms[UNTOUCHED]:.2f} ({calls[UNTOUCHED]:.0f})", *cells])
    return markdown(["ms (calls)", *names], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table per model and phase, and optionally write JSON."""
    parser = command(__name__, __doc__, repeats=7, profiled=96, file=None)
    parser.add_argument("--model", nargs="+", choices=("reference", "small"), default=["reference", "small"])
    parser.add_argument("--hidden", type=int, default=1024, help="width of `bench-small` (default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of `bench-small` (default %(default)s)")
    given = parser.parse_args(argv)
    found = {}
    for name in given.model:
        cases, inputs = reference(given.profiled) if name == "reference" else small(given.hidden, given.layers)
        found[name] = measure(cases, inputs, given.repeats)
        for phase, rows in found[name].items():
            print(f"\n{name}, one {phase}; {torch.get_num_threads()} threads; others: beyond the untouched model's")
            print(table(rows), flush=True)
    if given.file is not None:
        save_json(given.file, {**found, "threads": torch.get_num_threads(), "made_by": provenance()})
