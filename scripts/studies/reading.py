"""How well does the documents model read held-out pages: scripts/study reading.

Greedy answers to questions of every kind on test pages, in % right by exact match, ANLS and relaxed accuracy (5 %),
with 95 % bootstrap intervals of the mean; and what it says beside what is right, for people. With --run the gates and
LoRA of a training answer, at one of its budgets.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipit.eval.measure.runner import answer_batches, right_answers
from skipit.eval.metrics.vqa import METRICS, answer_scores
from skipit.router import running
from skipit.router.folders import provenance, save_json
from skipit.train.data.collate import Collator
from skipit.train.data.sources import DOCUMENTS, load_data, load_model, on_gpu
from skipit.train.display import progress
from skipit.train.export import merge_run

from .study import command, markdown


def interval(scores: np.ndarray[Any, Any], seed: int = 0) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean."""
    drawn = np.random.default_rng(seed).choice(scores, (2000, len(scores))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: scores by kind of question, by kind of page, and over all."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for column in ("kind", "page"):
        for value in dict.fromkeys(row[column] for row in rows):
            groups[f"{column}: {value}"] = [row for row in rows if row[column] == value]
    lines = []
    for name, group in {**groups, "all": list(rows)}.items():
        scores = {metric: np.array([row[metric] for row in group]) for metric in METRICS}
        spread = "{:.0%} to {:.0%}".format(*interval(scores["anls"]))
        lines.append([name, str(len(group)), *(f"{scores[metric].mean():.1%}" for metric in METRICS), spread])
    return markdown(["", "rows", "exact match", "ANLS", "relaxed accuracy", "ANLS, 95 %"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Ask, print the table, and write every answer."""
    parser = command(__name__, __doc__, file=Path("runs/reading.json"), samples=160, seed=0)
    parser.add_argument("--split", default="test", choices=("train", "calibration", "test"))
    parser.add_argument("--batch-size", type=int, default=8, help="rows asked at once (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest answer (default %(default)s)")
    parser.add_argument("--run", type=Path, default=None, help="folder of a `skipit train documents`")
    parser.add_argument("--budget", type=float, default=None, help="of the run; its first, if it is not given")
    given = parser.parse_args(argv)
    if given.budget is not None and given.run is None:
        parser.error("--budget is one of a run's: give its folder, too (--run).")
    model, processor = load_model(DOCUMENTS) if given.run is None else merge_run(given.run)
    model = on_gpu(model)
    gated = nullcontext() if given.run is None else running(budget=given.budget)
    rows, said = list(load_data(DOCUMENTS, given.split, given.samples, given.seed)), list[str]()
    how = {"batch_size": given.batch_size, "max_new_tokens": given.max_new_tokens}
    with torch.no_grad(), gated, progress("ask", len(rows)) as advance:
        for batch in answer_batches(model, rows, Collator(processor, with_completion=False), **how):
            said += [text.strip() for text in processor.batch_decode(batch.new, skip_special_tokens=True)]
            advance(len(batch.rows))
    right = [right_answers(row, number) for number, row in enumerate(rows)]
    scores = {metric: answer_scores(said, right, metric)[0].tolist() for metric in METRICS}
    found = [
        {"kind": row["kind"], "page": row["page"], "asked": row["prompt"][0]["content"][-1]["text"],
         "right": right[number], "said": said[number], **{metric: scores[metric][number] for metric in METRICS}}
        for number, row in enumerate(rows)
    ]  # fmt: skip
    print(table(found))
    gates = {} if given.run is None else {"run": str(given.run), "budget": given.budget}
    settings = {"split": given.split, "seed": given.seed, **how, **gates}
    given.file.parent.mkdir(parents=True, exist_ok=True)
    save_json(given.file, {"settings": settings, "rows": found, "made_by": provenance()})
