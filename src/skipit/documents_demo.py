"""The data flow on the documents model: profile, the theory's gates, gates trained before, generate, eval."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from skipit.demo import THEORY, TRAINED, Clock, draw_example, draw_units
from skipit.eval.compare import compare
from skipit.router import find_router, running
from skipit.router.checkpoint import save_gated
from skipit.router.config import KVPolicy
from skipit.router.folders import new_directory, provenance, save_json
from skipit.theory.artefact import save_plan, save_profile
from skipit.theory.plan import make_plan
from skipit.train.data.sources import DOCUMENTS, load_data, load_model
from skipit.train.display import loading, progress
from skipit.train.export import merge_run
from skipit.train.gating import gate_by_plan
from skipit.train.profiling import profile_model
from skipit.train.reference.documents.folder import RUN

PROFILE_ROWS, CALIBRATION_ROWS = 32, 24
BATCH = 4  # rows: a page is hundreds of tokens


def documents_demo(
    out: Path,
    *,
    budget: float = 0.5,
    kv: KVPolicy = "evict",
    samples: int = 40,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure the model, give it the theory's gates, ask, compare with the shipped trained ones, and print a table.

    Args:
        out: folder to make: profile/, plan/, theory/ and trained/ (gated checkpoints), plots, summary.json.
        budget: share of the dense decoder's FLOPs for the theory's gates to spend.
        kv: K/V policy of the tokens that they skip.
        samples: held-out rows to answer.
        seed: of the data and of sampling.
        overwrite: replace an existing folder.

    Returns:
        What summary.json holds.

    Raises:
        CheckpointError: the decoder cannot be had.
    """
    clock = Clock()
    with new_directory(out, overwrite) as folder:
        with loading("loading"):
            rows = load_data(DOCUMENTS, "train", PROFILE_ROWS, seed)
            held_out = load_data(DOCUMENTS, "calibration", CALIBRATION_ROWS, seed)
            test = load_data(DOCUMENTS, "test", samples, seed)
            (dense, processor), (theory, _) = load_model(DOCUMENTS), load_model(DOCUMENTS)
            trained, _ = merge_run(RUN)
            save_gated(trained, processor, folder / "trained")
            config = find_router(trained)[1].config
        clock.lap("load")
        with progress("profile", len(rows)) as advance:
            profile = profile_model(dense, processor, advance.over(rows), batch_size=BATCH, seed=seed)
        save_profile(profile, folder / "profile")
        clock.lap("profile")
        with loading("plan"):
            plan = make_plan(profile, budget, kv)
            save_plan(plan, folder / "plan")
            gate_by_plan(theory, processor, plan, held_out, batch_size=BATCH)
            save_gated(theory, processor, folder / "theory")
        clock.lap("plan")
        example = draw_example(folder, trained, processor, next(row for row in test if row["kind"] == "lookup"))
        clock.lap("generate")
        points = {f"{TRAINED} {float(name):.0%}": name for name in config.operating_points}
        with progress("eval", (2 + len(points)) * len(test)) as advance:
            gated = {THEORY: theory, **dict.fromkeys(points, trained)}
            at = {column: partial(running, budget=float(name)) for column, name in points.items()}
            how: dict[str, Any] = {"batch_size": BATCH, "metric": "anls", "contexts": at, "progress": advance}
            result = compare(dense, gated, processor, test, profile, **how)
        clock.lap("eval")
        draw_units(folder, profile, result, kv)
        clock.lap("plots")
        summary = {
            "budget": budget,
            "kv": kv,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "seconds": clock.seconds(),
            "example": example,
            "results": result.to_json(),
            "made_by": provenance(),
        }
        save_json(folder / "summary.json", summary)
    print(f"""{result.table()}
{THEORY}: gates made of the profile for {budget:.0%} of the decoder's FLOPs; nothing was trained for them ({kv}).
{", ".join(points)}: gates and LoRA that ship with skipit, trained once for these shares ({config.kv}).

Example: {example["prompt"]} -> {example["answer"]} (right: {example["right"]})

Everything is in {out}:
  summary.json    all figures
  redundancy.png  what was measured and what is skipped, per layer and modality
  depth.png       layers executed per patch and word of the example
  profile plan theory trained: every artefact; the last two are Hugging Face folders
Ask it: skipit generate {out}/trained --image {out}/example.png --prompt "{example["prompt"]}\"""")
    return summary
