"""A run that was stopped goes on as if it had not been: same weights, same price, same history, bit for bit."""

import copy
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from shallow import shallow_reference
from torch import Tensor
from transformers import TrainerCallback

from skipit.router.checkpoint import GATES_FILE
from skipit.router.errors import CheckpointError
from skipit.theory.artefact import save_plan
from skipit.theory.identity import fingerprint
from skipit.theory.plan import Plan
from skipit.train.config import TrainConfig
from skipit.train.reference.data import reference_dataset
from skipit.train.run import train
from skipit.train.run_folder import STATE_FILE, claimed_run, last_checkpoint
from skipit.train.trainer import LOGIT_RATE, TrainingError
from studies.architecture import build_processor

# Ten rows in batches of two, twice per step: an epoch ends in the middle of a step's batches.
CONFIG = TrainConfig(steps=7, batch_size=2, accumulation=2, lora_rank=2, save_steps=3, learning_rate=1e-3)


class At(TrainerCallback):
    """Does something when an event of the trainer comes, at one step."""

    def __init__(self, event: str, step: int, do: Callable[[Any], None]) -> None:
        def at(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                do(kwargs.get("model"))

        setattr(self, event, at)


def interrupt(model: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return reference_dataset("train", 10)


@pytest.fixture(scope="module")
def model() -> Any:
    return shallow_reference(3)


@pytest.fixture(scope="module")
def run(model: Any, rows: Dataset) -> Callable[..., Path]:
    def run(
        folder: Path,
        *callbacks: TrainerCallback,
        config: TrainConfig = CONFIG,
        decide_at: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Path:
        units, width = (3, 2), model.config.text_config.hidden_size
        gates = 0.1 * torch.randn(*units, width, generator=torch.Generator().manual_seed(0)), torch.zeros(units)
        plan = Plan(*gates, 0.5, "retain", "zero", fingerprint(model), torch.ones(units), decide_at=decide_at)
        copied = copy.deepcopy(model)
        train(copied, build_processor(), rows, plan, config, folder, callbacks=list(callbacks), **options)
        return folder

    return run


def weights(run: Path) -> dict[str, Tensor]:
    return {**load_file(run / "adapter" / "adapter_model.safetensors"), **load_file(run / GATES_FILE)}


def same_run(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    moved = ours["bias"].abs().max() > 0
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return bool(moved) and equal and (one / "history.jsonl").read_text() == (other / "history.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    return tmp_path / "stopped"


@pytest.mark.parametrize(("event", "step"), [("on_step_end", 1), ("on_step_begin", 6), ("on_substep_end", 4)])
def test_interrupted_and_resumed_is_uninterrupted(run: Any, whole: Path, stopped: Path, event: str, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stopped, At(event, step, interrupt))
    checkpoint = last_checkpoint(stopped / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{step}"
    state = json.loads((checkpoint / STATE_FILE).read_text())
    assert len(state["history"]) == step
    assert state["thresholds"] != [0]
    assert state["targets"] == [0.5]
    assert same_run(run(stopped, resume=True), whole)


def test_interrupted_within_an_update_goes_back_to_the_last_checkpoint(run: Any, whole: Path, stopped: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stopped, At("on_optimizer_step", 4, interrupt))  # weights are of step 5, everything else of step 4
    assert last_checkpoint(stopped / "checkpoints").name == "checkpoint-3"  # type: ignore[union-attr]
    assert same_run(run(stopped, resume=True), whole)


def test_a_save_that_was_killed_does_not_count(run: Any, whole: Path, stopped: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stopped, At("on_step_end", 4, interrupt))
    checkpoints = stopped / "checkpoints"
    (checkpoints / "checkpoint-4" / STATE_FILE).unlink()  # it is written last
    assert same_run(run(stopped, resume=True), whole)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "skipit_state.json"])
def test_a_checkpoint_that_lost_or_changed_a_file_is_passed_over(
    run: Any, whole: Path, stopped: Path, name: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stopped, At("on_step_end", 5, interrupt))
    file, notes = stopped / "checkpoints" / "checkpoint-5" / name, list[str]()
    if name == "skipit_state.json":  # still JSON, but of another price
        file.write_text(file.read_text().replace('"step": 5', '"step": 4'))
    else:
        file.unlink()
    assert same_run(run(stopped, resume=True, note=notes.append), whole)
    what = "has changed" if name == "skipit_state.json" else "is missing"
    assert notes == [
        f"checkpoint-5 is damaged, {name} {what}: it is now damaged-checkpoint-5, and checkpoint-3 is resumed."
    ]


def test_a_tensor_less_is_named_where_no_other_checkpoint_is_whole(run: Any, stopped: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stopped, At("on_step_end", 2, interrupt))
    file = stopped / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors"
    before = file.read_bytes()
    save_file(dict(list(load_file(file).items())[1:]), file)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: checkpoint-2: adapter_model.safetensors has"):
        run(stopped, resume=True)
    file.write_bytes(before)
    run(stopped, resume=True)


def test_a_checkpoint_of_an_older_skipit_is_resumed_with_a_note(run: Any, whole: Path, stopped: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stopped, At("on_step_end", 4, interrupt))
    (stopped / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()
    notes: list[str] = []
    assert same_run(run(stopped, resume=True, note=notes.append), whole)
    assert notes == ["checkpoint-4 has no manifest.json: an older skipit wrote it, and it cannot be verified."]


def test_a_second_run_never_deletes_the_first_ones_folder(run: Any, whole: Path, stopped: Path) -> None:
    def other() -> None:
        with claimed_run(stopped, True, resume=False, overwrite=True):
            pass

    def second(model: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            refusal = pool.submit(other).exception()
        assert "stopped is in use: another skipit is writing it" in str(refusal)

    assert same_run(run(stopped, At("on_step_end", 2, second)), whole)
    assert not list(stopped.parent.glob(".*"))


def test_a_finished_run_holds_no_pickle(whole: Path) -> None:
    assert {path.suffix for path in whole.rglob("*") if path.is_file()} <= {".json", ".jsonl", ".safetensors", ".md"}


def test_interrupted_before_the_first_step_can_be_started_again(run: Any, whole: Path, stopped: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stopped, At("on_train_begin", 0, interrupt))
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        run(stopped, resume=True)
    assert same_run(run(stopped), whole)


def spoil_gradients(model: Any) -> None:
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")


def spoil_weights(model: Any) -> None:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).view(-1)[0] = float("inf")


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (At("on_step_begin", 4, spoil_weights), r"the loss is nan at step 5 \(CE nan, KL nan\)"),
        (At("on_substep_end", 4, spoil_gradients), "a gradient is not finite at step 5"),
    ],
)
def test_not_finite_stops_and_keeps_the_last_good_state(
    run: Any, whole: Path, stopped: Path, callback: TrainerCallback, message: str
) -> None:
    with pytest.raises(
        TrainingError, match=rf"{message}.*checkpoint-3 was saved before it: lower .* continue with --resume\."
    ):
        run(stopped, callback)
    assert last_checkpoint(stopped / "checkpoints").name == "checkpoint-3"  # type: ignore[union-attr]
    assert same_run(run(stopped, resume=True), whole)


@pytest.mark.parametrize("room", [0, 2000, 60_000])
def test_a_full_disk_stops_and_keeps_the_last_good_state(
    run: Any, whole: Path, stopped: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file may grow beyond some bytes: settings, weights or the optimizer's state do not fit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(model: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    try:
        with pytest.raises(
            TrainingError, match=r"checkpoint-6 cannot be written: .*checkpoint-3 is whole: make room and continue with"
        ):
            run(stopped, At("on_step_end", 4, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert same_run(run(stopped, resume=True), whole)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import accelerate, datasets, peft, torch, transformers
from skipit.cli.main import main
from skipit.train.run_folder import last_checkpoint

torch.set_num_threads(1)
line = sys.argv[1:]
folder = Path(line[-1]) / "checkpoints"

def live(*options):
    child = os.fork()
    if child == 0:
        os._exit(main([*line, *options]))
    return child

def checkpoints():
    return {path.name for path in folder.glob("checkpoint-*")}

def whole():
    return {path.parent.name for path in folder.glob("*/skipit_state.json")}

def reached():
    last = last_checkpoint(folder)
    return int(last.name.rpartition("-")[2]) if last else 0

def until(happens):
    end = time.time() + 300
    while not happens():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        assert time.time() < end, "it makes no steps"
        time.sleep(0.001)

random.seed(0)
moments = ["in a save"] * 8 + ["between saves"] * 8 + ["at any time"] * 4
random.shuffle(moments)
kills = within = 0
for moment in moments:
    child = live(*["--resume"] * (last_checkpoint(folder) is not None))
    if moment == "at any time":
        time.sleep(random.uniform(0, 8))
    elif moment == "in a save":
        until(lambda: checkpoints() == whole())  # what the kill before has left half written is gone
        until(lambda: checkpoints() != whole())
        time.sleep(random.uniform(0, 0.02))
    else:
        wanted = reached() + random.randint(1, 5)
        until(lambda: reached() >= wanted)
        time.sleep(random.uniform(0, 0.2))
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    within += checkpoints() != whole()
last = last_checkpoint(folder)
print(f"killed {kills} times, {within} within a save; {last and last.name} is the last", flush=True)
assert within > 0
sys.exit(os.waitstatus_to_exitcode(os.waitpid(live("--resume"), 0)[1]))
"""


@pytest.mark.slow
def test_killed_twenty_times_is_uninterrupted(run: Any, model: Any, whole: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, some of them while a checkpoint is written, with one after every step."""
    model.save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    units, width = (3, 2), model.config.text_config.hidden_size
    plan = Plan(
        torch.zeros(*units, width), torch.zeros(units), 0.5, "retain", "zero", fingerprint(model), torch.ones(units)
    )
    save_plan(plan, tmp_path / "plan")
    settings = "--steps 120 --samples 40 --batch-size 2 --accumulation 2 --lora-rank 2 --learning-rate 1e-3"
    line = f"train model reference --plan plan {settings} --calibration-samples 4 --save-steps 1 --out"
    program = [sys.executable, "-c", KILLED, *line.split(), "killed"]
    found = subprocess.run(program, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=1200)
    print(found.stdout)
    assert found.returncode == 0, found.stderr[-3000:]
    subprocess.run([sys.executable, "-m", "skipit.cli", *line.split(), "whole"], cwd=tmp_path, check=True, timeout=600)
    assert same_run(tmp_path / "killed", tmp_path / "whole")


def test_not_finite_before_the_first_checkpoint(run: Any, stopped: Path) -> None:
    with pytest.raises(TrainingError, match="No checkpoint was written yet: lower the learning rates and start again"):
        run(stopped, At("on_step_begin", 1, spoil_weights))
    run(stopped)


def test_learning_rates_can_be_lowered_on_resume(run: Any, stopped: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.extend(group["lr"] for group in kwargs["optimizer"].param_groups)

    with pytest.raises(KeyboardInterrupt):
        run(stopped, At("on_step_end", 4, interrupt))
    shutil.copytree(stopped, tmp_path / "copy")
    run(tmp_path / "copy", Rates(), resume=True)
    usual = seen.copy()
    seen.clear()
    run(
        stopped,
        Rates(),
        resume=True,
        config=replace(CONFIG, learning_rate=5e-4, gate_learning_rate=LOGIT_RATE / 128 / 10),
    )
    assert seen[0::2] == pytest.approx([rate / 10 for rate in usual[0::2]])
    assert seen[1::2] == pytest.approx([rate / 2 for rate in usual[1::2]])


def test_what_a_resumed_run_may_not_change(run: Any, stopped: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stopped, At("on_step_end", 4, interrupt))
    with pytest.raises(CheckpointError, match="`steps` was 7, now 9, `lora_rank` was 2, now 4"):
        run(stopped, resume=True, config=replace(CONFIG, steps=9, lora_rank=4))
    with pytest.raises(CheckpointError, match=r"`decide_at` was None, now \[0\]"):  # of the plan
        run(stopped, resume=True, decide_at=(0,))


def test_a_run_is_not_overwritten_unasked(run: Any, whole: Path, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists and is not empty; choose another --out, or pass --overwrite"):
        run(whole)
    with pytest.raises(CheckpointError, match="is finished"):
        run(whole, resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, At("on_step_end", 4, interrupt))
    with pytest.raises(CheckpointError, match="exists and is not empty; continue with --resume, choose another"):
        run(stopped)
    assert same_run(run(stopped, overwrite=True), whole)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a run"):
        run(tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "thesis.tex").exists()
