"""What training gates costs beside plain LoRA fine-tuning, in time and memory: scripts/study training-cost.

Every way of training makes whole steps (forward, backward, AdamW) on the same batch of a LLaVA with random weights,
through the `Trainer` that would make them: transformers' own for plain LoRA on the untouched model, ours for the rest.
One step of each in turn, so that whatever else the machine does falls on all alike; medians. The gates let half of
the image tokens run, which costs what any other share does: in training every token is computed.

With --deepspeed each way is a short training of its own instead, as `skipit train --deepspeed` starts it, one after
the other: of a large model a GPU holds one. Memory is then all that was allocated, weights included.
"""

import argparse
import copy
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipit.router.folders import provenance, save_json
from skipit.theory.cost import CostModel
from skipit.theory.identity import fingerprint
from skipit.theory.inputs import to_model
from skipit.theory.labels import IGNORE
from skipit.theory.plan import Plan
from skipit.train.config import Precision, TrainConfig
from skipit.train.launch import launched, training_arguments
from skipit.train.run import lora_targets, prepare
from skipit.train.trainer import SkipTrainer

from .memory import most_allocated
from .shapes import SHAPES, labelled
from .study import command, markdown

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
    return to_model(labelled(image_tokens, text_tokens, rows, ANSWER), model)


def plain_trainer(model: Any, batch: dict[str, Tensor], config: TrainConfig, **options: Any) -> Trainer:
    """LoRA of the same rank on the same maps, by transformers' `Trainer` and PEFT alone."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=lora_targets(model), bias="none")
    return Trainer(model=get_peft_model(model, lora), **options)


def our_trainer(model: Any, batch: dict[str, Tensor], config: TrainConfig, **options: Any) -> SkipTrainer:
    """Gates and LoRA, by ours."""
    costs, width = CostModel.of(model), model.config.text_config.hidden_size
    layers = len(costs.layers)
    gates = torch.randn(layers, 2, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    plan = Plan(gates, torch.zeros(layers, 2), 0.5, config.kv, "zero", fingerprint(model), torch.ones(layers, 2))
    return SkipTrainer(settings=config, costs=costs, model=prepare(model, plan, config), **options)


def one_step(name: str, model: Any, batch: dict[str, Tensor]) -> Step:
    """A whole step of one way of training, to be called again and again."""
    config = OURS.get(name, TrainConfig())
    arguments = training_arguments(config, tempfile.gettempdir())
    if name == PLAIN:
        return whole_step(plain_trainer(model, batch, config, args=arguments), batch)
    trainer = our_trainer(model, batch, config, args=arguments)
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
    steps = {name: one_step(name, copy.deepcopy(base), batch) for name in (PLAIN, *OURS)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + WARM_UP):
        for name, step in steps.items():
            times[name].append(seconds(step, base.device))
    found = compared(times, batch)
    for name, step in steps.items():
        if memory:
            found[name]["peak_mb"] = most_allocated(step, base.device) / 1e6
    return found


def compared(times: dict[str, list[float]], batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Medians of the steps after those that warm up, tokens per second, and the median ratio to plain LoRA's."""
    plain = times[PLAIN][WARM_UP:]
    return {
        name: {
            "seconds": median(took[WARM_UP:]),
            "time_ratio": median(ours / theirs for ours, theirs in zip(took[WARM_UP:], plain, strict=True)),
            "tokens_per_second": batch["input_ids"].numel() / median(took[WARM_UP:]),
        }
        for name, took in times.items()
    }


class _Clock(TrainerCallback):
    """Seconds of every step of a trainer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = _now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.times.append(_now() - self._start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_runs(
    make: Callable[[], Any], batch: Callable[[Any], dict[str, Tensor]], settings: dict[str, Any], repeats: int
) -> dict[str, dict[str, float]]:
    """As `measure`, of short trainings under DeepSpeed, one after the other.

    Args:
        make: makes the dense model.
        batch: makes a batch with labels for it.
        settings: of all runs, such as `deepspeed` and `precision`.
        repeats: timed steps of each, after one to warm up.
    """
    times, peaks = {}, {}
    for name in (PLAIN, *OURS):
        config = replace(OURS.get(name, TrainConfig()), steps=repeats + WARM_UP, save_steps=10**9, **settings)
        with tempfile.TemporaryDirectory() as folder, launched(config, folder) as arguments:
            arguments.save_strategy = "no"
            model, clock = make(), _Clock()
            one = batch(model)
            rows = [{"row": number} for number in range(config.steps * config.batch_size)]
            build = plain_trainer if name == PLAIN else our_trainer
            cpu = {key: value.cpu() for key, value in one.items()}
            options = {"train_dataset": rows, "data_collator": lambda _, held=cpu: dict(held), "callbacks": [clock]}
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            build(model, one, config, args=arguments, **options).train()
        times[name] = clock.times
        if torch.cuda.is_available():
            peaks[name] = torch.cuda.max_memory_allocated() / 1e6
        del model
        gc.collect()
    found = compared(times, one)
    for name, peak in peaks.items():
        found[name]["peak_mb"] = peak
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """In Markdown."""
    plain, rows = found[PLAIN].get("peak_mb", 1.0), []
    for name, row in found.items():
        memory = [f"{row['peak_mb']:.0f}", f"{row['peak_mb'] / plain:.2f}x"] if "peak_mb" in row else ["-", "-"]
        times = [f"{row['seconds']:.2f}", f"{row['tokens_per_second']:.0f}", f"{row['time_ratio']:.2f}x"]
        rows.append([name, *times, *memory])
    return markdown(["step of", "s", "tokens/s", "of plain", "peak MB", "of plain"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table and optionally write JSON."""
    parser = command(__name__, __doc__, repeats=5, file=None)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="(default %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="rows (default %(default)s)")
    parser.add_argument("--image-tokens", type=int, default=576, help="per row (default %(default)s)")
    parser.add_argument("--text-tokens", type=int, default=64, help="per row (default %(default)s)")
    parser.add_argument("--deepspeed", default=None, help="as of `skipit train`: short trainings under DeepSpeed")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="with --deepspeed")
    parser.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False, help="with --deepspeed"
    )
    arguments = parser.parse_args(argv)

    def make() -> Any:
        return SHAPES[arguments.shape](layers=arguments.layers, image_tokens=arguments.image_tokens)

    def batch(model: Any) -> dict[str, Tensor]:
        return batch_for(model, arguments.batch, arguments.image_tokens, arguments.text_tokens)

    if arguments.deepspeed is None:
        base = make()
        found = measure(base, batch(base), arguments.repeats)
    else:
        names = ("deepspeed", "precision", "gradient_checkpointing")
        settings = {"batch_size": arguments.batch, **{name: getattr(arguments, name) for name in names}}
        found = measure_runs(make, batch, settings, arguments.repeats)
    print(table(found))
    if arguments.file is not None:
        save_json(arguments.file, {"results": found, "arguments": vars(arguments), "made_by": provenance()})
