"""The whole data flow on the embedded reference model: bench, profile, plan, train, export, generate, eval.

Two routers are trained from one profile: for a share of the FLOPs, and for a share of the time. At this model's size a
layer takes nearly as long for some tokens as for all, so only the second one is faster: it leaves out whole layers.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from skipit.eval.compare import Comparison, compare, theory_tables
from skipit.eval.measure.answer import answer
from skipit.eval.measure.bench import measure_layers
from skipit.eval.plots import plot_layer_modality_heatmaps
from skipit.router import CheckpointError, InputError, find_router
from skipit.router.checkpoint import load, save_gated
from skipit.router.config import KVPolicy
from skipit.router.folders import load_json, new_directory, provenance, save_json
from skipit.router.measured import bench_file
from skipit.theory.artefact import save_plan, save_profile
from skipit.theory.layer_times import LayerTimes
from skipit.theory.plan import Plan, make_plan
from skipit.theory.profile import Profile
from skipit.theory.time_model import TimeModel
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
TIME_RATE = 2e-3  # of LoRA, which alone makes up for layers that are left out
BENCH_SECONDS = 20.0
THEORY, TRAINED, IN_TIME = "theory only", "trained", "trained: time"  # columns


def demo(
    out: Path,
    *,
    budget: float = 0.5,
    latency: float = 0.7,
    kv: KVPolicy = "retain",
    steps: int = 150,
    samples: int = 300,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run every step, write every artefact into one folder, and print a table.

    Args:
        out: folder to make: profile/, theory/ (untrained gates), plan/, run/ and checkpoint/ for the budget, the same
            three with -time for the latency, plots, summary.json.
        budget: share of the dense decoder's FLOPs to spend.
        latency: share of its layers' time for a prompt to spend, in the other router.
        kv: K/V policy of skipped tokens.
        steps: of each training.
        samples: held-out rows to answer.
        seed: of data, training and sampling.
        overwrite: replace an existing folder.

    Returns:
        What summary.json holds.
    """
    config = TrainConfig(budget=budget, kv=kv, steps=steps, seed=seed)
    clock = Clock()
    with new_directory(out, overwrite) as folder:
        with loading("loading"):
            rows = load_data("reference", "train", max(PROFILE_ROWS, steps * config.batch_size), seed)
            held_out = load_data("reference", "calibration", CALIBRATION_ROWS, seed)
            test = load_data("reference", "test", samples, seed)
        clock.lap("load")
        dense, processor = load_model("reference")
        times = _times(dense)
        clock.lap("bench")
        profile = _profile(folder, rows.select(range(PROFILE_ROWS)), seed)
        clock.lap("profile")
        with loading("plan"):
            plan, in_time = make_plan(profile, budget, kv), make_plan(profile, latency, kv, times=times)
            theory = _theory(folder, plan, held_out)
        clock.lap("plan")
        trained = _trained(folder, "", rows, held_out, plan, config, clock)
        for_time = replace(config, latency=latency, learning_rate=TIME_RATE)
        faster = _trained(folder, "-time", rows, held_out, in_time, for_time, clock)
        row = next(row for row in test if row["kind"] == "row" or len(test) < 2)
        example = draw_example(folder, trained, processor, row)
        clock.lap("generate")
        held, _ = known_of(load_json(folder / "run" / RUN_FILE), Rows(test))
        with progress("eval", 4 * len(test)) as advance:
            gated = {THEORY: theory, TRAINED: trained, IN_TIME: faster}
            result = compare(dense, gated, processor, test, profile, progress=advance, held_out=held)
        clock.lap("eval")
        draw_units(folder, profile, result, kv)
        clock.lap("plots")
        figures, made_by = result.to_json(), provenance()
        summary = {
            "budget": budget,
            "latency": latency,
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
        for name, column in (("checkpoint", TRAINED), ("checkpoint-time", IN_TIME)):
            evaluation = {"dense": figures["dense"], "gated": figures[column], "held_out": held.to_json()}
            write_card(folder / name, {**evaluation, "made_by": made_by})
        left_out = len(in_time.left_out)
    print(_report(out, result, example, summary, f"{left_out} of {len(in_time.run_rate)} layers"))
    return summary


class Clock:
    """Seconds per step."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, name: str) -> None:
        """A step ends here."""
        spent = time.perf_counter() - self._started - sum(self._laps.values())
        self._laps[name] = self._laps.get(name, 0.0) + spent

    def seconds(self) -> dict[str, float]:
        """Of each step, and of all, to a tenth."""
        laps = {**self._laps, "total": time.perf_counter() - self._started}
        return {name: round(value, 1) for name, value in laps.items()}


def _times(model: Any) -> LayerTimes:
    """How long layers take on this machine, measured now where `skipit bench` of this version was not run for such."""
    try:
        return TimeModel.of(model).times
    except (InputError, CheckpointError):
        with loading("bench"):
            times = measure_layers(model, dtype=model.dtype, device=model.device, seconds=BENCH_SECONDS)
        times.save(bench_file(model.device, model.dtype, times.hidden))
        return times


def _profile(folder: Path, rows: Any, seed: int) -> Profile:
    model, processor = load_model("reference")
    with progress("profile", len(rows)) as advance:
        profile = profile_model(model, processor, advance.over(rows), seed=seed)
    save_profile(profile, folder / "profile")
    return profile


def _theory(folder: Path, plan: Plan, held_out: Any) -> Any:
    """A dense model with a plan's gates: what the theory gives without training."""
    model, processor = load_model("reference")
    gate_by_plan(model, processor, plan, held_out)
    save_gated(model, processor, folder / "theory")
    return model


def _trained(folder: Path, suffix: str, rows: Any, held_out: Any, plan: Plan, config: TrainConfig, clock: Clock) -> Any:
    """Train, export, and load what was exported."""
    model, processor = load_model("reference")
    run, checkpoint = folder / f"run{suffix}", folder / f"checkpoint{suffix}"
    save_plan(plan, folder / f"plan{suffix}")
    with training_progress(config) as callback:
        train(model, processor, rows, plan, config, run, calibration=held_out, base="reference", callbacks=[callback])
    clock.lap("train")
    with loading("export"):
        export(run, checkpoint)
        trained, _ = load(checkpoint)
    clock.lap("export")
    return trained


def draw_example(folder: Path, model: Any, processor: Any, row: Any) -> dict[str, Any]:
    """Answer one held-out question, keep its picture, and draw how deep each patch and word was computed."""
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


def _report(out: Path, result: Comparison, example: dict[str, Any], settings: dict[str, Any], left_out: str) -> str:
    """The table, what its columns are, an example, and where everything is."""
    ask = f'skipit generate {out}/checkpoint --image {out}/example.png --prompt "{example["prompt"]}"'
    return f"""{result.table()}
{THEORY}, {TRAINED}: gates for {settings["budget"]:.0%} of the decoder's FLOPs.
{IN_TIME}: gates for {settings["latency"]:.0%} of its layers' time for a prompt on this machine, without {left_out}.

Example: {example["prompt"]} -> {example["answer"]} (right: {example["right"]})

Everything is in {out}:
  summary.json     all figures
  redundancy.png   what was measured and what is skipped, per layer and modality
  depth.png        layers executed per patch and word of the example
  profile theory plan run checkpoint, and the last three with -time: every artefact; theory and checkpoints are
  Hugging Face folders
Ask it: {ask}"""


def draw_units(folder: Path, profile: Profile, result: Comparison, kv: KVPolicy) -> None:
    """Draw redundancy.png: what was measured, and what each gated model skips, per layer and modality."""
    tables = theory_tables(profile, kv)
    rates = {f"skip rate\n{name}": name for name in result.outcomes if name != "dense"}
    plot_layer_modality_heatmaps(
        folder / "redundancy.png",
        {
            "geometric redundancy\n1 - cos, small: redundant": tables["geometric"],
            "cross-attention\nshare of text's attention": tables["cross-attention"],
            "damage of a skip\nKL, nats per answer token": tables["damage"],
            **{title: result.outcomes[name].skip_rate.numpy() for title, name in rates.items()},
        },
        dict.fromkeys(rates, (0, 1)),
    )
