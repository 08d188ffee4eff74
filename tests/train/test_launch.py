"""Several processes, under every launcher, do what one process does; a launch that is not what was asked for stops."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from shallow import shallow_reference

from skipit.cli.main import main
from skipit.router.checkpoint import GATES_FILE
from skipit.theory.artefact import save_plan
from skipit.theory.identity import fingerprint
from skipit.theory.plan import Plan
from skipit.train.config import TrainConfig
from skipit.train.launch import LaunchError, check_engine, deepspeed_config, launched
from skipit.train.reference.data import reference_dataset
from studies.architecture import build_processor

LAYERS = 3
BIN = Path(sys.executable).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
SETTINGS = {"steps": 3, "samples": 24, "lora-rank": 2, "learning-rate": 1e-3, "save-steps": 2, "calibration-samples": 8}
TRAIN = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
# fp32 sums in another order; see docs/training.md.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, a plan whose gates skip token by token, and a run of one process.

    It accumulates as many batches as there are processes elsewhere: the threshold's derivative is of each by itself.
    """
    folder = tmp_path_factory.mktemp("launch")
    model = shallow_reference(LAYERS)
    model.save_pretrained(folder / "model")
    build_processor().save_pretrained(folder / "model")
    weight = torch.randn(LAYERS, 2, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    bias = torch.full((LAYERS, 2), 0.3)
    save_plan(
        Plan(0.2 * weight, bias, 0.5, "retain", "theory", fingerprint(model), torch.ones(LAYERS, 2), decide_at=(0,)),
        folder / "plan",
    )
    with chdir(folder):  # in this process, whose imports are done
        assert main(arguments("one", *alone(2))) == 0
    return folder


def alone(batches: int) -> tuple[Any, ...]:
    """Options of one process for what several do, or several in turn: a step of 8 rows in so many batches."""
    return "--batch-size", 8 // batches, "--accumulation", batches


def arguments(out: str, *options: Any, data: str = "reference") -> list[str]:
    return list(map(str, ("train", "model", data, "--plan", "plan", *TRAIN, *options, "--out", out)))


def start(
    work: Path, out: str, *options: Any, launcher: Sequence[Any] = (sys.executable,), data: str = "reference"
) -> "subprocess.Popen[str]":
    module = ("--module", "skipit.cli") if Path(str(launcher[0])).name == "deepspeed" else ("-m", "skipit.cli")
    line = [*launcher, *module, *arguments(out, *options, data=data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, line)), cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert (process.returncode == 0) == (code == 0), said
    return said


def kill(process: "subprocess.Popen[str]") -> None:
    """With what it has started: workers of torchrun have sessions of their own."""
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.kill()
    process.communicate()


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path, processes: int) -> None:
    assert json.loads((other / "run.json").read_text())["processes"] == processes
    for file in ("adapter/adapter_model.safetensors", GATES_FILE):
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(theirs[name], ours[name], **CLOSE)
    # Something was learned, by every factor of LoRA.
    adapter = load_file(one / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert len(history(one)) == 3
    for ours, theirs in zip(history(one), history(other), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)


def test_zero_2_on_two_processes(work: Path) -> None:
    """The launcher of DeepSpeed; four rows per process and step, two at a time."""
    port = free_port()
    launcher = (BIN / "deepspeed", "--num_gpus", 2, "--master_port", port)
    options = ("--batch-size", 2, "--accumulation", 2, "--deepspeed", "zero2", "--processes", 2)
    said = finish(start(work, "zero2", *options, launcher=launcher))
    assert said.count("Next: skipit export zero2") == 1  # one process speaks
    with chdir(work):
        assert main(arguments("twos", *alone(4))) == 0
    assert_same_run(work / "twos", work / "zero2", 2)


def test_zero_3_on_two_processes(work: Path) -> None:
    """Weights are sharded as they are loaded; layers are computed twice; ranks skip different tokens."""
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", 2)
    finish(
        start(work, "zero3", "--batch-size", 4, "--deepspeed", "zero3", "--gradient-checkpointing", launcher=launcher)
    )
    assert_same_run(work / "one", work / "zero3", 2)


def two_nodes(work: Path, out: str, *options: Any) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    common = (*TORCHRUN, "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "test")
    nodes = [
        start(work, out, *options, launcher=(*common, "--rdzv-endpoint", endpoint, "--node-rank", rank))
        for rank in range(2)
    ]
    for node in nodes:
        finish(node)


def test_two_nodes(work: Path) -> None:
    two_nodes(work, "nodes", "--batch-size", 4, "--processes", 2)
    assert_same_run(work / "one", work / "nodes", 2)


@pytest.mark.slow
def test_two_nodes_with_zero_3(work: Path) -> None:
    two_nodes(work, "nodes3", "--batch-size", 4, "--processes", 2, "--deepspeed", "zero3")
    assert_same_run(work / "one", work / "nodes3", 2)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2-offload", "zero3-offload"])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_configuration(work: Path, zero: str, processes: int) -> None:
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", processes) if processes > 1 else (sys.executable,)
    out = f"{zero}-{processes}"
    options = ("--batch-size", 4, "--accumulation", 2 // processes, "--deepspeed", zero)
    finish(start(work, out, *options, launcher=launcher))
    assert_same_run(work / "one", work / out, processes)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, "zero2", "zero3"])
def test_bf16(work: Path, zero: str | None) -> None:
    options = ["--deepspeed", zero] if zero else []
    finish(start(work, f"bf16-{zero}", *alone(2), "--precision", "bf16", *options))
    for ours, theirs in zip(history(work / "one"), history(work / f"bf16-{zero}"), strict=True):
        assert theirs["ce"] == pytest.approx(ours["ce"], rel=0.02)


@pytest.mark.slow
def test_accelerate(work: Path) -> None:
    config = "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\nnum_machines: 1\nnum_processes: 2\n"
    (work / "accelerate.yaml").write_text(f"{config}use_cpu: true\nmain_process_port: {free_port()}\n")
    launcher = (BIN / "accelerate", "launch", "--config_file", "accelerate.yaml")
    said = finish(start(work, "accelerate", "--batch-size", 4, launcher=launcher), code=1)
    assert "accelerate asks for DeepSpeed, the run does not say which. Name it: --deepspeed zero2" in said
    finish(start(work, "accelerate", "--batch-size", 4, "--deepspeed", "zero2", launcher=launcher))
    assert_same_run(work / "one", work / "accelerate", 2)
    # Two are asked for, and without a word one is started.
    silent = (BIN / "accelerate", "launch", "--cpu", "--num_processes", 2)
    said = finish(start(work, "silent", "--batch-size", 4, "--processes", 2, launcher=silent), code=1)
    assert "`processes`: 2 were asked for, 1 take part" in said
    said = finish(start(work, "silent", "--batch-size", 4, "--deepspeed", "zero2", launcher=silent), code=1)
    assert "`deepspeed`: zero2 was asked for, but the model is run by DistributedDataParallel" in said
    assert not (work / "silent" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_resume(work: Path, zero: str) -> None:
    """Two processes are killed after their first checkpoint and go on to the same weights; one alone may not."""
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", 2)
    options, out = ("--batch-size", 4, "--deepspeed", zero, "--save-steps", 1), f"resume-{zero}"
    process = start(work, out, *options, launcher=launcher)
    while process.poll() is None and not list((work / out).glob("checkpoints/*/skipit_state.json")):
        pass
    kill(process)
    assert not (work / out / "run.json").exists()
    said = finish(start(work, out, *options[:1], 8, *options[2:], "--resume"), code=1)
    assert "`processes` was 2, now 1" in said
    finish(start(work, out, *options, "--resume", launcher=launcher))
    assert_same_run(work / "one", work / out, 2)


@pytest.mark.slow
def test_deepspeed_is_forgotten(work: Path) -> None:
    """Else every later `Trainer` of the process would be one with DeepSpeed."""
    program = f"""
import os
from skipit.cli.main import main
line = "train model reference --plan plan {" ".join(map(str, (*TRAIN, *alone(2))))} --out".split()
before = dict(os.environ)
assert main([*line, "first", "--deepspeed", "zero2"]) == 0
assert os.environ == before
from skipit.train.trainer import SkipTrainer
wrapped = []
original = SkipTrainer.finish_step
SkipTrainer.finish_step = lambda self: wrapped.append(type(self.model_wrapped).__name__) or original(self)
assert main([*line, "second"]) == 0
assert set(wrapped) == {{"PeftModel"}}, wrapped
"""
    subprocess.run([sys.executable, "-c", program], cwd=work, check=True, timeout=600)
    assert_same_run(work / "one", work / "first", 1)
    assert_same_run(work / "one", work / "second", 1)


@pytest.mark.slow
def test_text_beside_images_under_zero_3(work: Path) -> None:
    """One process would gather the vision tower's weights alone, and both would wait forever."""
    image = work / "image.png"
    reference_dataset("train", 1)[0]["images"][0].save(image)
    rows = [{"images": [str(image)] * (n % 2), "prompt": "read the top row .", "completion": "1 2"} for n in range(8)]
    (work / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", 2)
    options = ("--batch-size", 1, "--calibration-data", "reference")
    said = finish(start(work, "mixed3", *options, "--deepspeed", "zero3", launcher=launcher, data="mixed.jsonl"), 1)
    assert re.search(r"in step \d only 1 of 2 processes have images in their batch; under ZeRO-3 they would wait", said)
    finish(start(work, "mixed2", *options, "--deepspeed", "zero2", launcher=launcher, data="mixed.jsonl"))
    assert len(history(work / "mixed2")) == 3


@pytest.mark.slow
def test_a_stream_on_two_processes(work: Path) -> None:
    """Each takes its share of the rows, in their order."""
    finish(start(work, "stream1", *alone(2), "--streaming"))
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", 2)
    finish(start(work, "stream2", "--batch-size", 4, "--streaming", "--deepspeed", "zero2", launcher=launcher))
    assert_same_run(work / "stream1", work / "stream2", 2)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_evict_with_gradient_checkpointing(work: Path, zero: str) -> None:
    options = ("--kv", "evict", "--gradient-checkpointing", "--deepspeed", zero)
    if not (work / "evict").exists():
        finish(start(work, "evict", *alone(2), "--kv", "evict"))
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", 2)
    finish(start(work, f"evict-{zero}", "--batch-size", 4, *options, launcher=launcher))
    assert_same_run(work / "evict", work / f"evict-{zero}", 2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TestGuards:
    def test_fewer_processes_than_asked_for(self, tmp_path: Path) -> None:
        message = "`processes`: 4 were asked for, 1 take part. Start them with a launcher: `torchrun --nproc-per-node 4"
        with pytest.raises(LaunchError, match=message), launched(TrainConfig(), tmp_path, processes=4):
            pass

    @pytest.mark.parametrize(
        ("variable", "message"),
        [
            ("ACCELERATE_USE_FSDP", "accelerate asks for FSDP, which skipit does not know"),
            ("ACCELERATE_USE_DEEPSPEED", "accelerate asks for DeepSpeed, the run does not say which"),
        ],
    )
    def test_accelerate_asks_for_something_else(
        self, variable: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, "true")
        with pytest.raises(LaunchError, match=message), launched(TrainConfig(), tmp_path):
            pass

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("tensorbord", "`report_to`: got 'tensorbord', expected none, all, or one of .*tensorboard"),
            ("neptune", "`report_to`: neptune is not installed here. Install it: `pip install neptune`."),
        ],
    )
    def test_a_report_that_nobody_takes(self, name: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(LaunchError, match=message), launched(TrainConfig(), tmp_path, report_to=name):
            pass

    def test_another_engine(self) -> None:
        with pytest.raises(LaunchError, match="zero2 was asked for, but the model is run by Linear"):
            check_engine("zero2", torch.nn.Linear(1, 1))
        check_engine(None, torch.nn.Linear(1, 1))

    def test_the_environment_is_as_before(self, tmp_path: Path) -> None:
        before = dict(os.environ)
        with launched(TrainConfig(precision="bf16", gradient_checkpointing=True), tmp_path) as arguments:
            assert arguments.bf16
            assert arguments.gradient_checkpointing or arguments.activation_checkpointing  # the first name is the older
            assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "logs")
        assert dict(os.environ) == before


class TestDeepSpeedConfig:
    @pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"])
    def test_shipped(self, name: str) -> None:
        values = deepspeed_config(name)
        assert values["zero_optimization"]["stage"] == int(name[4])
        assert ("offload_optimizer" in values["zero_optimization"]) == name.endswith("offload")
        # What has no value of its own is what the run says; DeepSpeed would clip at 1.0 by itself.
        assert values["gradient_clipping"] == values["gradient_accumulation_steps"] == "auto"

    def test_the_users_own(self, tmp_path: Path) -> None:
        (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}')
        assert deepspeed_config(str(tmp_path / "mine.json")) == {
            "zero_optimization": {"stage": 2},
            "gradient_clipping": 0.5,
            "zero_allow_untested_optimizer": True,
        }

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                None,
                r"got '.*bad.json', expected one of zero1, zero2, zero2-offload, zero3, zero3-offload, or a JSON file",
            ),
            ("{", "bad.json cannot be read: Expecting property name"),
            ("[]", "bad.json holds a list, expected a JSON object"),
            ('{"optimizer": {}, "scheduler": {}}', "bad.json sets optimizer and scheduler. Leave these out: gates and"),
        ],
    )
    def test_bad(self, text: str | None, message: str, tmp_path: Path) -> None:
        if text is not None:
            (tmp_path / "bad.json").write_text(text)
        with pytest.raises(LaunchError, match=message):
            deepspeed_config(str(tmp_path / "bad.json"))


def test_what_is_asked_for_is_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    from skipit.cli.main import main

    assert main(["train", "/no/model", "reference", "--processes", "2", "--out", str(tmp_path / "run")]) == 1
    assert not re.search("run", " ".join(path.name for path in tmp_path.iterdir()))
