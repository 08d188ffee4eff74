"""lmms-eval's questions are answered as `skipit.load` and `generate` answer them, in order, and FLOPs are reported.

Where lmms-eval is not installed, the few names that the plugin takes from it are stood in for.
"""

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures

import skipit
from skipit.eval.measure.runner import run_dataset
from skipit.router import InputError, RouterConfig, RouterConfigError, attach, gate_state, running, set_gates
from skipit.theory.cost import CostModel
from skipit.train.data.collate import Collator
from skipit.train.data.sources import load_data, load_model

INSTALLED = find_spec("lmms_eval") is not None
TWELVE = {"max_new_tokens": 12, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


class Base:
    """Of lmms-eval's `lmms`, what the plugin relies on."""

    rank = 0

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": None},
    }
    for path, values in names.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[path]).update(values)


class Plugin:
    """The plugin's module, and what it has logged."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.logged: list[dict[str, Any]] = []

    def log(self, seconds: float, tokens: int, speed: float, more: dict[str, Any]) -> None:
        self.logged.append({"tokens": tokens, **more})


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugin]:
    if not INSTALLED:
        stand_in(monkeypatch)
    found = Plugin(importlib.import_module("skipit.lmms"))
    metrics = importlib.import_module("lmms_eval.models.model_utils.gen_metrics")
    monkeypatch.setattr(metrics, "log_metrics", found.log)
    yield found
    if not INSTALLED:
        del sys.modules["skipit.lmms"], vars(skipit)["lmms"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model: image tokens leave before layer 4 by default, and at 0.2 no token runs any layer."""
    folder = tmp_path_factory.mktemp("lmms") / "checkpoint"
    model, processor = load_model("reference")
    attach(model, RouterConfig(operating_points={"0.2": 100.0}))
    gates = gate_state(model)
    gates["bias"][4:, 1] = -4.0
    set_gates(model, **gates)
    skipit.save_gated(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(load_data("reference", "test", 12, 0))


def ask(model: Any, rows: list[dict[str, Any]], settings: list[dict[str, Any]]) -> list[str]:
    """Requests as lmms-eval makes them: (text, how to make messages, settings, row, task, split)."""

    def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
        image, text = {"type": "image", "url": row["images"][0]}, {"type": "text", "text": question(row)}
        return [{"role": "user", "content": [image, text]}]

    model.task_dict = {"digits": {"test": rows}}
    return model.generate_until(
        [SimpleNamespace(args=("", messages, wanted, i, "digits", "test")) for i, wanted in enumerate(settings)]
    )


def question(row: dict[str, Any]) -> str:
    return next(part["text"] for part in row["prompt"][0]["content"] if part["type"] == "text")


def expected(checkpoint: Path, rows: list[dict[str, Any]], new_tokens: int = 12, **options: Any) -> Any:
    """What `skipit eval` finds, one row at a time."""
    model, processor = skipit.load(checkpoint)
    with running(**options):
        return run_dataset(
            model,
            processor,
            rows,
            Collator(processor, with_completion=False),
            CostModel.of(model),
            "retain",
            batch_size=1,
            max_new_tokens=new_tokens,
        )


@pytest.mark.parametrize("batch_size", [1, 5])
def test_answers_and_flops_are_those_of_skipit_eval(
    batch_size: int, plugin: Plugin, checkpoint: Path, rows: list[dict[str, Any]]
) -> None:
    model = plugin.module.SkipIt(str(checkpoint), batch_size=batch_size, device="cpu")
    found = expected(checkpoint, rows)
    assert ask(model, rows, [TWELVE] * 12) == found.answers
    assert found.accuracy > 0.5
    assert plugin.logged[0]["executed_flops_share"] == pytest.approx(found.compute, rel=1e-6)
    assert found.compute < 0.7
    assert plugin.logged[0]["total_requests"] == 12


def test_requests_of_different_settings_keep_their_order(
    plugin: Plugin, checkpoint: Path, rows: list[dict[str, Any]]
) -> None:
    model = plugin.module.SkipIt(str(checkpoint), batch_size=4, device="cpu")
    long, short = expected(checkpoint, rows).answers, expected(checkpoint, rows, 1).answers
    assert long != short
    settings = [TWELVE if i % 3 else {**TWELVE, "max_new_tokens": 1} for i in range(12)]
    wanted = [long[i] if i % 3 else short[i] for i in range(12)]
    assert ask(model, rows, settings) == wanted


def test_a_budget_and_a_dense_run(plugin: Plugin, checkpoint: Path, rows: list[dict[str, Any]]) -> None:
    few = rows[:4]
    for options, run in (({"budget": 0.2}, {"budget": 0.2}), ({"dense": True}, {"mode": "dense"})):
        model = plugin.module.SkipIt(str(checkpoint), device="cpu", **options)
        found = expected(checkpoint, few, **run)
        assert ask(model, few, [TWELVE] * 4) == found.answers
        assert plugin.logged[-1]["executed_flops_share"] == pytest.approx(found.compute, rel=1e-6)
    assert plugin.logged[0]["executed_flops_share"] < 0.5
    assert plugin.logged[1]["executed_flops_share"] == 1.0


def test_what_is_refused(plugin: Plugin, checkpoint: Path) -> None:
    make = plugin.module.SkipIt
    with pytest.raises(RouterConfigError, match=r"`budget`: got '0.7', this router is calibrated for: 0.2"):
        make(str(checkpoint), budget=0.7)
    with pytest.raises(InputError, match="leave out `budget`"):
        make(str(checkpoint), budget=0.2, dense=True)
    with pytest.raises(InputError, match="`batch_size`: got 'auto', expected a whole number"):
        make(str(checkpoint), batch_size="auto")
    model = make(str(checkpoint), device="cpu")
    with pytest.raises(InputError, match="this one asks for log likelihoods"):
        model.loglikelihood([])
    with pytest.raises(InputError, match="this one has several rounds"):
        model.generate_until_multi_round([])
    with pytest.raises(InputError, match="a part of type 'audio'; skipit takes text, images and videos"):
        plugin.module.conversation([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])


def test_settings_pictures_and_ends(plugin: Plugin) -> None:
    sampled = plugin.module.generation_settings({"temperature": 0.7, "top_p": 0.9, "image_aspect_ratio": "pad"})
    assert sampled == {"max_new_tokens": 1024, "num_beams": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    grey = Pictures.new("L", (4, 4))
    ((turn,),) = [plugin.module.conversation([{"role": "user", "content": [{"type": "image", "url": grey}]}])]
    assert turn["content"][0]["image"].mode == "RGB"
    assert plugin.module.cut(" one. two ", ".") == "one"
    assert plugin.module.cut("one\n\ntwo", ["\n\n", "|"]) == "one\n\ntwo"


def test_lmms_eval_finds_it(plugin: Plugin) -> None:
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = declared["lmms_eval.models"]["skipit"].partition(":")
    found = getattr(importlib.import_module(module), name)()
    assert found.model_id == "skipit"
    module, _, name = found.chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is plugin.module.SkipIt
    assert plugin.module.SkipIt.is_simple is False


TASK = """
task: digits
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function digits.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 12, temperature: 0, do_sample: false}}
process_results: !function digits.score
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"]]


def score(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval: pip install 'skipit[lmms]'")
def test_lmms_eval_runs_a_task(checkpoint: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    docs = [{"image": row["images"][0], "question": question(row), "answer": row["answer"]} for row in rows]
    DatasetDict({"test": Dataset.from_list(docs, features=features)}).save_to_disk(tmp_path / "data")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "digits.yaml").write_text(TASK.format(data=tmp_path / "data"))
    (tmp_path / "task" / "digits.py").write_text(FUNCTIONS)
    for given, options in (("", {}), (",budget=0.2", {"budget": 0.2})):
        found = expected(checkpoint, rows, **options)
        command = [sys.executable, "-m", "lmms_eval", "--model", "skipit"]
        command += ["--model_args", f"pretrained={checkpoint}{given}", "--include_path", str(tmp_path / "task")]
        command += ["--tasks", "digits", "--batch_size", "4", "--device", "cpu"]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert f"executed {found.compute:.1%} of the dense decoder's FLOPs over 12 requests" in done.stdout
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("|digits")]
        assert float(line.split("|")[6]) == pytest.approx(found.accuracy, abs=1e-4)
