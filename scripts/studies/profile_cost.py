"""What a profile costs, in dense forward + backward passes, and in memory: scripts/study profile-cost.

The unit is a training step without the optimizer: forward, loss and backward to all parameters, on the same batches.
Times are the processor time of one thread, so that other load on the machine counts little, of interleaved repeats. A
profile costs so much per row, and once, at the end, the ridge regressions: both are told apart by profiling n batches
and 2 n. Peak memory is the most that a process of its own held while it ran (resident memory, so it sees what torch
allocates), less what it held with the model and the batches loaded; Linux counts it anew when asked to.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from skipit.router.folders import provenance, save_json
from skipit.theory.profile import profile

from .shapes import bench_small, labelled
from .study import Study, command

Batches = list[dict[str, Tensor]]
PROFILED_ROWS = 256  # what `skipit profile` measures by default


def reference() -> tuple[Any, Batches]:
    """The reference model and four batches of 16 rows."""
    study = Study()
    return study.dense[0], study.read("train", 64, 16)


def random_llava() -> tuple[Any, Batches]:
    """A LLaVA of hidden size 512 and 4 layers with random weights, and a batch of 2 rows of 144 + 64 tokens."""
    return bench_small(hidden=512, layers=4, image_tokens=144), [labelled(144, 64, 2, answer=8)]


CASES: dict[str, Callable[[], tuple[Any, Batches]]] = {"reference": reference, "random LLaVA": random_llava}


def dense(model: Any, rows: Batches) -> None:
    """The unit: forward and backward to all parameters; their gradients are dropped after every batch."""
    for batch in rows:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def measure(model: Any, rows: Batches) -> None:
    """What is compared with it."""
    profile(model, rows)


TASKS: dict[str, Callable[[Any, Batches], None]] = {"dense": dense, "profile": measure}


def seconds(run: Callable[[], None]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def cost(case: str, repeats: int) -> dict[str, float]:
    """Time of a profile in units, medians over repeats after one to warm up.

    Returns:
        `unit_s` (of the batches), `per_row` (units), `once_s` and `total` (units, of a profile of the default number
        of rows).
    """
    model, rows = CASES[case]()
    count = sum(len(batch["input_ids"]) for batch in rows)
    times = []
    for _ in range(repeats + 1):
        unit = seconds(lambda: dense(model, rows))
        times.append((unit, seconds(lambda: measure(model, rows)), seconds(lambda: measure(model, [*rows, *rows]))))
    times = times[1:]
    unit, per_row = median(u for u, _, _ in times), median((two - one) / u for u, one, two in times)
    once = max(median(2 * one - two for _, one, two in times), 0.0)
    total = per_row + once / (unit * PROFILED_ROWS / count)
    return {"unit_s": unit, "per_row": per_row, "once_s": once, "total": total}


def resident(name: str) -> int:
    """Bytes of this process in memory: `VmRSS` now, `VmHWM` at most since the count began."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak_here(case: str, task: str) -> int:
    """Bytes that a task takes at most in this process, beyond the model and the batches."""
    model, rows = CASES[case]()
    Path("/proc/self/clear_refs").write_text("5")  # begins the count of VmHWM anew
    before = resident("VmRSS")
    TASKS[task](model, rows)
    return resident("VmHWM") - before


def peak(case: str, task: str) -> int:
    """The same in a process of its own."""
    code = [sys.executable, "-m", "studies", "profile-cost", "--peak", case, task]
    scripts = Path(__file__).parents[1]
    return int(json.loads(subprocess.run(code, capture_output=True, text=True, check=True, cwd=scripts).stdout))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table and optionally write JSON."""
    parser = command(__name__, __doc__, repeats=5, file=None)
    parser.add_argument("--case", choices=CASES, action="append", help="(default: all)")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "TASK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.peak:
        case, task = arguments.peak
        print(peak_here(case, task))
        return
    print(f"{'':14}{'unit s':>8}{'per row':>9}{'once s':>8}{'total':>7}{'dense MB':>10}{'profile MB':>12}")
    results = {}
    for case in arguments.case or CASES:
        found = cost(case, arguments.repeats)
        found |= {f"{task}_mb": peak(case, task) / 1e6 for task in TASKS}
        results[case] = found
        times = f"{found['unit_s']:8.2f}{found['per_row']:9.2f}{found['once_s']:8.2f}{found['total']:7.2f}"
        print(f"{case:14}{times}{found['dense_mb']:10.0f}{found['profile_mb']:12.0f}")
    print(f"per row and total in units of one dense forward + backward; total for {PROFILED_ROWS} rows; one thread")
    if arguments.file is not None:
        save_json(arguments.file, {"results": results, "made_by": provenance()})
