"""The whole data flow on the embedded reference model: profile, plan, train, export, generate, eval."""

import time
from pathlib import Path
from typing import Any

import torch

from skipit.router import find_router
from skipit.router.artefact import new_directory, provenance, save_json
from skipit.router.checkpoint import load, save_gated
from skipit.router.config import KVPolicy
from skipit.theory.artefact import save_plan, save_profile
from skipit.theory.plan import make_plan
from skipit.theory.profile import Profile
from skipit.train.config import TrainConfig
from skipit.train.run import train

from .answer import answer
from .compare import Comparison, compare
from .display import console, progress, training_progress
from .pipeline import export, gate_by_plan, profile_model
from .sources import load_data, load_model

PROFILE_ROWS = 192
CALIBRATION_ROWS = 192


def demo(
    out: Path,
    *,
    budget: float = 0.5,
    kv: KVPolicy = "retain",
    steps: int = 250,
    samples: int = 300,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run every step, write every artefact into one folder, and print a table.

    Args:
        out: folder to make: profile/, plan/, theory/ and checkpoint/ (gated checkpoints), run/, plots, summary.json.
        budget: share of the dense decoder's FLOPs to spend.
        kv: K/V policy of skipped tokens.
        steps: training steps.
        samples: held-out rows to answer.
        seed: of data, training and sampling.
        overwrite: replace an existing folder.

    Returns:
        What summary.json holds.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    with new_directory(out, overwrite) as folder:
        model, processor = load_model("reference")
        rows = load_data("reference", "train", steps * 16, seed)
        held_out = load_data("reference", "calibration", CALIBRATION_ROWS, seed)
        test = load_data("reference", "test", samples, seed)
        lap("load")
        with progress("profile", PROFILE_ROWS) as advance:
            measured = profile_model(model, processor, advance.over(rows.select(range(PROFILE_ROWS))), seed=seed)
        save_profile(measured, folder / "profile")
        lap("profile")
        plan = make_plan(measured, budget, kv)
        save_plan(plan, folder / "plan")
        theory, _ = load_model("reference")
        gate_by_plan(theory, processor, plan, held_out)
        save_gated(theory, processor, folder / "theory")
        lap("plan")
        config = TrainConfig(budget=budget, kv=kv, steps=steps, seed=seed)
        with training_progress(config) as callback:
            train(
                model, processor, rows, plan, config, folder / "run",
                calibration=held_out, base="reference", callbacks=[callback],
            )
        lap("train")
        export(folder / "run", folder / "checkpoint")
        trained, _ = load(folder / "checkpoint")
        lap("export")
        example = _example(folder, trained, processor, test)
        lap("generate")
        dense, _ = load_model("reference")
        with progress("eval", 3 * len(test)) as advance:
            result = compare(
                dense, {"theory only": theory, "trained": trained}, processor, test, measured, progress=advance
            )
        lap("eval")
        _plots(folder, measured, result, kv)
        lap("plots")
        summary = {
            "budget": budget,
            "kv": kv,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "seconds": {**seconds, "total": round(time.perf_counter() - started, 1)},
            "example": example,
            "results": result.to_json(),
            "made_by": provenance(),
        }
        save_json(folder / "summary.json", summary)
    print(result.table())
    print(f"Everything is in {out}: summary.json, redundancy.png, depth.png, profile/, plan/, run/, theory/, checkpoint/.")
    return summary


def _example(folder: Path, model: Any, processor: Any, rows: Any) -> dict[str, Any]:
    """Answer one held-out question, keep its picture, and draw how deep each patch and word was computed."""
    row = next(row for row in rows if row["kind"] == "row")
    row["images"][0].save(folder / "example.png")
    prompt = row["prompt"][0]["content"][-1]["text"]
    reply = answer(model, processor, list(row["images"]), prompt)
    reply.draw(folder / "depth.png")
    console.print(f"{prompt} -> {reply.text} (right: {row['answer']})", highlight=False)
    threshold = find_router(model)[1].config.threshold
    return {
        "prompt": prompt, "answer": reply.text, "right": row["answer"], "compute": reply.compute, "threshold": threshold
    }


def _plots(folder: Path, measured: Profile, result: Comparison, kv: KVPolicy) -> None:
    from skipit.eval.plots import plot_layer_modality_heatmaps

    from .compare import theory_tables

    tables = theory_tables(measured, kv)
    plot_layer_modality_heatmaps(
        folder / "redundancy.png",
        {
            "geometric redundancy\n1 - cos": tables["geometric"],
            "cross-attention\nshare of text's attention": tables["cross-attention"],
            "damage of a skip\nKL, nats per answer token": tables["damage"],
            "skip rate\ntheory only": result.outcomes["theory only"].skip_rate.numpy(),
            "skip rate\ntrained": result.outcomes["trained"].skip_rate.numpy(),
        },
        {"skip rate\ntheory only": (0, 1), "skip rate\ntrained": (0, 1)},
    )
