"""The whole data flow on the embedded reference model: profile, plan, train, export, generate, eval."""

import time
from pathlib import Path
from typing import Any

import torch

from skipit.eval.compare import Comparison, compare, theory_tables
from skipit.eval.measure.answer import answer
from skipit.eval.plots import plot_layer_modality_heatmaps
from skipit.router import find_router
from skipit.router.checkpoint import load, save_gated
from skipit.router.config import KVPolicy
from skipit.router.folders import load_json, new_directory, provenance, save_json
from skipit.theory.artefact import save_plan, save_profile
from skipit.theory.plan import Plan, make_plan
from skipit.theory.profile import Profile
from skipit.train.card import write_card
from skipit.train.config import TrainConfig
from skipit.train.data.rows import Rows
from skipit.train.data.sources import load_data, load_model
from skipit.train.data.used import held_out as known_of
from skipit.train.display import loading, progress, training_progress
from skipit.train.export import export
from skipit.train.gating import gate_by_plan
from skipit.train.profiling import profile_model
from skipit.train.run import train
from skipit.train.run_folder import RUN_FILE

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
    config = TrainConfig(budget=budget, kv=kv, steps=steps, seed=seed)
    clock = _Clock()
    with new_directory(out, overwrite) as folder:
        with loading("loading"):
            rows = load_data("reference", "train", max(PROFILE_ROWS, steps * config.batch_size), seed)
            held_out = load_data("reference", "calibration", CALIBRATION_ROWS, seed)
            test = load_data("reference", "test", samples, seed)
        clock.lap("load")
        profile, plan, theory = _theory(folder, rows.select(range(PROFILE_ROWS)), held_out, config, clock)
        trained = _trained(folder, rows, held_out, plan, config, clock)
        dense, processor = load_model("reference")
        example = _example(folder, trained, processor, test)
        clock.lap("generate")
        held, _ = known_of(load_json(folder / "run" / RUN_FILE), Rows(test))
        with progress("eval", 3 * len(test)) as advance:
            gated = {"theory only": theory, "trained": trained}
            result = compare(dense, gated, processor, test, profile, progress=advance, held_out=held)
        clock.lap("eval")
        _plots(folder, profile, result, kv)
        clock.lap("plots")
        figures, made_by = result.to_json(), provenance()
        summary = {
            "budget": budget,
            "kv": kv,
            "steps": steps,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "seconds": clock.seconds(),
            "example": example,
            "results": figures,
            "made_by": made_by,
        }
        save_json(folder / "summary.json", summary)
        evaluation = {"dense": figures["dense"], "gated": figures["trained"], "held_out": held.to_json()}
        write_card(folder / "checkpoint", {**evaluation, "made_by": made_by})
    print(_report(out, result, example))
    return summary


class _Clock:
    """Seconds per step."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, name: str) -> None:
        self._laps[name] = time.perf_counter() - self._started - sum(self._laps.values())

    def seconds(self) -> dict[str, float]:
        laps = {**self._laps, "total": time.perf_counter() - self._started}
        return {name: round(value, 1) for name, value in laps.items()}


def _theory(folder: Path, rows: Any, held_out: Any, config: TrainConfig, clock: _Clock) -> tuple[Profile, Plan, Any]:
    """Profile and plan, and a dense model with the plan's gates: what the theory gives without training."""
    model, processor = load_model("reference")
    with progress("profile", len(rows)) as advance:
        profile = profile_model(model, processor, advance.over(rows), seed=config.seed)
    save_profile(profile, folder / "profile")
    clock.lap("profile")
    with loading("plan"):
        plan = make_plan(profile, config.budget, config.kv)
        save_plan(plan, folder / "plan")
        gate_by_plan(model, processor, plan, held_out)
        save_gated(model, processor, folder / "theory")
    clock.lap("plan")
    return profile, plan, model


def _trained(folder: Path, rows: Any, held_out: Any, plan: Plan, config: TrainConfig, clock: _Clock) -> Any:
    """Train, export, and load what was exported."""
    model, processor = load_model("reference")
    with training_progress(config) as callback:
        train(
            model,
            processor,
            rows,
            plan,
            config,
            folder / "run",
            calibration=held_out,
            base="reference",
            callbacks=[callback],
        )
    clock.lap("train")
    with loading("export"):
        export(folder / "run", folder / "checkpoint")
        trained, _ = load(folder / "checkpoint")
    clock.lap("export")
    return trained


def _example(folder: Path, model: Any, processor: Any, rows: Any) -> dict[str, Any]:
    """Answer one held-out question, keep its picture, and draw how deep each patch and word was computed."""
    row = next(row for row in rows if row["kind"] == "row" or len(rows) < 2)
    row["images"][0].save(folder / "example.png")
    prompt = row["prompt"][0]["content"][-1]["text"]
    reply = answer(model, processor, list(row["images"]), prompt)
    reply.draw(folder / "depth.png")
    threshold = find_router(model)[1].config.threshold
    return {
        "prompt": prompt,
        "answer": reply.text,
        "right": row["answer"],
        "compute": reply.compute,
        "threshold": threshold,
    }


def _report(out: Path, result: Comparison, example: dict[str, Any]) -> str:
    """The table, an example, and where everything is."""
    ask = f'skipit generate {out}/checkpoint --image {out}/example.png --prompt "{example["prompt"]}"'
    return f"""{result.table()}

Example: {example["prompt"]} -> {example["answer"]} (right: {example["right"]})

Everything is in {out}:
  summary.json    all figures
  redundancy.png  what was measured and what is skipped, per layer and modality
  depth.png       layers executed per patch and word of the example
  profile plan theory run checkpoint: every artefact; theory and checkpoint are Hugging Face folders
Ask it: {ask}"""


def _plots(folder: Path, profile: Profile, result: Comparison, kv: KVPolicy) -> None:
    tables = theory_tables(profile, kv)
    plot_layer_modality_heatmaps(
        folder / "redundancy.png",
        {
            "geometric redundancy\n1 - cos, small: redundant": tables["geometric"],
            "cross-attention\nshare of text's attention": tables["cross-attention"],
            "damage of a skip\nKL, nats per answer token": tables["damage"],
            "skip rate\ntheory only": result.outcomes["theory only"].skip_rate.numpy(),
            "skip rate\ntrained": result.outcomes["trained"].skip_rate.numpy(),
        },
        {"skip rate\ntheory only": (0, 1), "skip rate\ntrained": (0, 1)},
    )
