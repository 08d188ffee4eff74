"""Joining the processes that deepspeed, torchrun or accelerate started, and stopping where they are not as asked."""

import json
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from skipit.router.errors import SkipItError, short

from .config import TrainConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments

CHECKPOINTS = "checkpoints"
LOGS = "logs"
SHIPPED = Path(__file__).parent / "zero"


class LaunchError(SkipItError):
    """The processes that were started are not those that were asked for."""


@contextmanager
def launched(
    config: TrainConfig, out: str | Path, *, report_to: str = "none", processes: int | None = None
) -> Iterator["TrainingArguments"]:
    """Join the processes of a run and make its `TrainingArguments`; under ZeRO-3, load the model inside the block.

    What a run with DeepSpeed leaves behind, which would make every later `Trainer` of the process one with DeepSpeed,
    is undone at the end.

    Args:
        config: settings.
        out: run folder.
        report_to: where `Trainer` reports, such as "tensorboard".
        processes: how many must take part; None is as many as the launcher says.

    Raises:
        LaunchError: another number of processes takes part, or one process has several GPUs, or the launcher asks for
            something else than the settings, or the DeepSpeed configuration cannot be used, or nothing is installed
            that could take a report.
    """
    check_report(report_to)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise LaunchError("accelerate asks for FSDP, which skipit does not know. Use DeepSpeed: --deepspeed zero3.")
    if config.deepspeed is None and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise LaunchError(
            "accelerate asks for DeepSpeed, the run does not say which. Name it: --deepspeed zero2 (or zero1, zero3, "
            "zero2-offload, zero3-offload, or a JSON file)."
        )
    zero = deepspeed_config(config.deepspeed) if config.deepspeed is not None else None
    before = dict(os.environ)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(out) / LOGS))
    try:
        if zero is not None:
            _prepare_deepspeed(os.environ)
        arguments = training_arguments(config, out, report_to, zero)
        _check_processes(arguments.world_size, processes)
        if arguments.n_gpu > 1:
            raise LaunchError(
                f"one process sees {arguments.n_gpu} GPUs. Start one process per GPU, "
                f"`torchrun --nproc-per-node {arguments.n_gpu} -m skipit.cli train ...`, or let it see one: "
                "CUDA_VISIBLE_DEVICES=0."
            )
        yield arguments
    finally:
        if zero is not None:
            _forget_deepspeed()
        os.environ.clear()
        os.environ.update(before)


def check_report(report_to: str) -> None:
    """Refuse a place to report to before a model is loaded, not after.

    Raises:
        LaunchError: `Trainer` does not know it, or it is not installed.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if report_to in ("none", "all"):
        return
    if report_to not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise LaunchError(f"`report_to`: got {short(report_to)}, expected none, all, or one of {known}.")
    if report_to not in get_available_reporting_integrations():
        raise LaunchError(f"`report_to`: {report_to} is not installed here. Install it: `pip install {report_to}`.")


def training_arguments(
    config: TrainConfig, out: str | Path, report_to: str = "none", zero: dict[str, Any] | None = None
) -> "TrainingArguments":
    """What `Trainer` must know of a run; `zero` is a DeepSpeed configuration, or None."""
    from transformers import TrainingArguments

    # Newer releases call it by the first name, transformers 5.17 by the second.
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = next(name for name in names if hasattr(TrainingArguments, name))
    again: dict[str, Any] = {
        checkpointing: config.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False},
    }
    return TrainingArguments(
        output_dir=str(Path(out) / CHECKPOINTS),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.steps // 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        bf16=config.precision == "bf16",
        deepspeed=zero,
        # Rows of a stream have lengths of their own: every process reads it, and takes its share.
        accelerator_config={"dispatch_batches": False},
        remove_unused_columns=False,
        dataloader_num_workers=0,
        report_to=report_to,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **again,
    )


def deepspeed_config(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration, shipped or the user's own, made safe for this training.

    Args:
        name: `zero1`, `zero2`, `zero3`, `zero2-offload`, `zero3-offload`, or a JSON file.

    Raises:
        LaunchError: it cannot be read, or sets an optimizer or a scheduler of its own.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.json"))
    path = SHIPPED / f"{name}.json" if name in shipped else Path(name)
    if not path.is_file():
        raise LaunchError(f"`deepspeed`: got {name!r}, expected one of {', '.join(shipped)}, or a JSON file.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchError(f"`deepspeed`: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise LaunchError(f"`deepspeed`: {path} holds a {type(values).__name__}, expected a JSON object.")
    if own := [key for key in ("optimizer", "scheduler") if key in values]:
        raise LaunchError(
            f"`deepspeed`: {path} sets {' and '.join(own)}. Leave these out: gates and LoRA have learning rates of "
            "their own, which `learning_rate` and `gate_learning_rate` set."
        )
    # DeepSpeed clips at 1.0 where nothing is said, and refuses optimizers that it does not know.
    return {"gradient_clipping": "auto", "zero_allow_untested_optimizer": True, **values}


def check_engine(wanted: str | None, wrapped: Any) -> None:
    """Refuse to train by anything else than DeepSpeed when that was asked for: some launchers drop it without a word.

    Raises:
        LaunchError: the model is wrapped by something else.
    """
    if wanted is not None and type(wrapped).__name__ != "DeepSpeedEngine":
        raise LaunchError(f"`deepspeed`: {wanted} was asked for, but the model is run by {type(wrapped).__name__}.")


def stage_of(arguments: Any) -> int:
    """The ZeRO stage of a run; 0 without DeepSpeed."""
    plugin = arguments.deepspeed_plugin
    return int(plugin.zero_stage) if plugin is not None else 0


def barrier() -> None:
    """Wait until every process of the run is here."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def end_process(status: int) -> None:
    """End one of several processes; returns where there is one. Gloo aborts in about one ordinary exit of five."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    if status == 0:
        barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _check_processes(joined: int, wanted: int | None) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if joined != started:
        raise LaunchError(f"the launcher started {started} processes, but this one trains with {joined} of them.")
    if wanted is not None and joined != wanted:
        raise LaunchError(
            f"`processes`: {wanted} were asked for, {joined} take part. Start them with a launcher: "
            f"`torchrun --nproc-per-node {wanted} -m skipit.cli train ...`."
        )


def _prepare_deepspeed(environment: MutableMapping[str, str]) -> None:
    """One configuration, the run's own; and one process without a launcher is a group of one, with no look at MPI."""
    import deepspeed.comm
    import deepspeed.ops
    from torch.distributed.elastic.utils.distributed import get_free_port

    for name in [name for name in environment if name.startswith("ACCELERATE_") and name != "ACCELERATE_USE_CPU"]:
        del environment[name]
    if "RANK" not in environment:
        port = get_free_port()
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment.update({**alone, "MASTER_PORT": str(port)})
    if not torch.cuda.is_available():
        # Compiled when it is first used, a minute for nothing: gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)


def _forget_deepspeed() -> None:
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
