"""What training gates costs beside plain LoRA fine-tuning, in time and memory: python -m skipit.bench_training.

Every way of training makes whole steps (forward, backward, AdamW) on the same batch of a LLaVA with random weights,
through the `Trainer` that would make them: transformers' own for plain LoRA on the untouched model, ours for the rest.
One step of each in turn, so that whatever else the machine does falls on all alike; medians. The gates let half of
the image tokens run, which costs what any other share does: in training every token is computed.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from skipit.eval.bench_shapes import SHAPES, prompt, to_model
from skipit.eval.memory import most_allocated
from skipit.router.artefact import provenance, save_json
from skipit.theory.cost import CostModel
from skipit.theory.identity import fingerprint
from skipit.theory.labels import IGNORE
from skipit.theory.plan import Plan
from skipit.train.config import TrainConfig
from skipit.train.launch import training_arguments
from skipit.train.run import dense_per_answer, lora_targets, prepare
from skipit.train.trainer import SkipTrainer

from .display import quiet

PLAIN = "plain LoRA"
ANSWER = 16
WARM_UP = 1
Step = Callable[[], Any]

OURS = {
    "skipit, no distillation": TrainConfig(distillation=0.0),
    "skipit": TrainConfig(),
    "skipit, evict, no distillation": TrainConfig(kv="evict", distillation=0.0),
    "skipit, evict": TrainConfig(kv="evict"),
}


def batch_for(model: Any, rows: int, image_tokens: int, text_tokens: int) -> dict[str, Tensor]:
    """Rows of one image and a text each, whose last tokens are the answer."""
    batch = prompt(image_tokens, text_tokens, rows)
    labels = torch.full_like(batch["input_ids"], IGNORE)
    labels[:, -ANSWER:] = batch["input_ids"][:, -ANSWER:]
    return to_model({**batch, "labels": labels}, model)


def plain_step(model: Any, batch: dict[str, Tensor], config: TrainConfig) -> Step:
    """LoRA of the same rank on the same maps, by transformers' `Trainer` and PEFT alone."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=lora_targets(model), bias="none")
    tuned: Any = get_peft_model(model, lora)
    trainer = Trainer(model=tuned, args=training_arguments(config, tempfile.gettempdir()))
    return whole_step(trainer, batch)


def our_step(model: Any, batch: dict[str, Tensor], config: TrainConfig) -> Step:
    """Gates and LoRA, by ours."""
    costs, width = CostModel.of(model), model.config.text_config.hidden_size
    layers = len(costs.layers)
    gates = torch.randn(layers, 2, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    plan = Plan(gates, torch.zeros(layers, 2), 0.5, config.kv, "zero", fingerprint(model), torch.ones(layers, 2))
    tuned = prepare(model, plan, config)
    trainer = SkipTrainer(
        settings=config,
        costs=costs,
        dense_per_answer=dense_per_answer([batch], costs),
        model=tuned,
        args=training_arguments(config, tempfile.gettempdir()),
    )
    inner = whole_step(trainer, batch)

    def step() -> None:
        inner()
        trainer.finish_step()

    return step


def whole_step(trainer: Trainer, batch: dict[str, Tensor]) -> Step:
    """Forward, backward and update, as in the trainer's own loop."""
    optimizer: Any = trainer.create_optimizer()
    items = (batch["labels"] != IGNORE).sum()

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch), num_items_in_batch=items)  # type: ignore[arg-type]
        optimizer.step()
        trainer.model.zero_grad()  # type: ignore[union-attr]

    return step


def seconds(step: Step, device: torch.device) -> float:
    """Wall-clock time of a step."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(base: Any, batch: dict[str, Tensor], repeats: int, memory: bool = True) -> dict[str, dict[str, float]]:
    """Seconds per step and peak memory of every way of training, and both as ratios to plain LoRA.

    Args:
        base: the dense model; it is copied for each.
        batch: with labels.
        repeats: timed steps of each, after one to warm up.
        memory: measure that too, in one more step.
    """
    steps = {PLAIN: plain_step(copy.deepcopy(base), batch, TrainConfig())}
    steps |= {name: our_step(copy.deepcopy(base), batch, config) for name, config in OURS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + WARM_UP):
        for name, step in steps.items():
            times[name].append(seconds(step, base.device))
    found = {name: {"seconds": median(took[WARM_UP:])} for name, took in times.items()}
    for name, step in steps.items():
        found[name]["time_ratio"] = median(
            ours / plain for ours, plain in zip(times[name][WARM_UP:], times[PLAIN][WARM_UP:], strict=True)
        )
        found[name]["tokens_per_second"] = batch["input_ids"].numel() / found[name]["seconds"]
        if memory:
            found[name]["peak_mb"] = most_allocated(step, base.device) / 1e6
            found[name]["memory_ratio"] = found[name]["peak_mb"] / found[PLAIN]["peak_mb"]
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """In Markdown."""
    lines = ["| step of | s | tokens/s | of plain | peak MB | of plain |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in found.items():
        memory = f"{row['peak_mb']:.0f} | {row['memory_ratio']:.2f}x" if "peak_mb" in row else "- | -"
        figures = f"{row['seconds']:.2f} | {row['tokens_per_second']:.0f} | {row['time_ratio']:.2f}x | {memory}"
        lines.append(f"| {name} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="(default %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="rows (default %(default)s)")
    parser.add_argument("--image-tokens", type=int, default=576, help="per row (default %(default)s)")
    parser.add_argument("--text-tokens", type=int, default=64, help="per row (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    arguments = parser.parse_args()
    quiet()
    base = SHAPES[arguments.shape](layers=arguments.layers, image_tokens=arguments.image_tokens)
    batch = batch_for(base, arguments.batch, arguments.image_tokens, arguments.text_tokens)
    found = measure(base, batch, arguments.repeats)
    print(table(found))
    if arguments.out is not None:
        save_json(arguments.out, {"results": found, "arguments": vars(arguments), "made_by": provenance()})


if __name__ == "__main__":
    main()
