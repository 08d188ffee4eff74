"""A tiny demo leaves every artefact behind, and each is what it says."""

import io
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import skipit
from skipit.cli.main import main
from skipit.eval.compare import compare
from skipit.eval.measure.answer import answer, open_images
from skipit.router.folders import load_json, save_json
from skipit.router.measured import bench_file
from skipit.theory.artefact import load_plan, load_profile
from skipit.theory.layer_times import load_times

STEPS = ["load", "bench", "profile", "plan", "train", "export", "generate", "eval", "plots", "total"]
TRAINED = ("plan", "run", "checkpoint")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setenv("SKIPIT_CACHE", str(out.parents[1] / "cache"))
        patch.setattr("skipit.demo.BENCH_SECONDS", 1.0)
        measured = bench_file(torch.device("cpu"), torch.float32, 128)
        measured.parent.mkdir(parents=True)
        save_json(measured, {"device": "a version before, which measured less", "packing_pays": 0.0})
        patch.setattr("skipit.demo.PROFILE_ROWS", 16)
        patch.setattr("skipit.demo.CALIBRATION_ROWS", 8)
        patch.setattr("skipit.demo.compare", partial(compare, repeats=2))
        assert main(["demo", "--out", str(out), "--steps", "4", "--samples", "12", "--budget", "0.6"]) == 0
        assert load_times(measured).hidden == 128
    return out, said.getvalue()


def test_everything_is_there_and_nothing_else(demo: tuple[Path, str]) -> None:
    out, _ = demo
    names = {path.name for path in out.iterdir()}
    folders = {"profile", "theory", *TRAINED, *(f"{name}-time" for name in TRAINED)}
    assert names == folders | {"summary.json", "redundancy.png", "depth.png", "example.png"}
    assert [path.name for path in out.parent.iterdir()] == ["here"]


def test_artefacts_are_read_by_their_own_functions(demo: tuple[Path, str]) -> None:
    out, _ = demo
    assert load_profile(out / "profile").about["rows"] == 16
    assert load_plan(out / "plan").budget == 0.6
    assert load_plan(out / "plan-time").latency == 0.7
    for suffix in ("", "-time"):
        assert load_json(out / f"run{suffix}" / "run.json")["config"]["steps"] == 4
    for folder in ("theory", "checkpoint", "checkpoint-time"):
        model, processor = skipit.load(out / folder)
        reply = answer(model, processor, open_images([out / "example.png"]), "read the top row .")
        assert len(reply.text.split()) == 3
        assert 0.3 < reply.compute < 0.9  # type: ignore[operator]


@pytest.mark.parametrize(
    ("folder", "column"), [("theory", None), ("checkpoint", "trained"), ("checkpoint-time", "trained: time")]
)
def test_checkpoints_are_dense_models_to_transformers(demo: tuple[Path, str], folder: str, column: str | None) -> None:
    at = demo[0] / folder
    _, info = LlavaForConditionalGeneration.from_pretrained(at, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    AutoProcessor.from_pretrained(at)
    if column is not None:
        trained = load_json(demo[0] / "summary.json")["results"][column]
        text = (at / "README.md").read_text(encoding="utf-8")
        assert f"| decoder FLOPs executed | 100.0% | {trained['compute']:.1%} |" in text
    assert not [path for path in at.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]


def test_summary(demo: tuple[Path, str]) -> None:
    summary = load_json(demo[0] / "summary.json")
    assert set(summary) == {
        "budget", "latency", "kv", "steps", "seed", "threads", "seconds", "example", "results", "made_by"
    }  # fmt: skip
    assert list(summary["seconds"]) == STEPS
    assert sum(list(summary["seconds"].values())[:-1]) == pytest.approx(summary["seconds"]["total"], abs=0.5)
    assert set(summary["example"]) == {"prompt", "answer", "right", "compute", "threshold"}
    assert set(summary["results"]) == {"dense", "theory only", "trained", "trained: time"}
    for name, figures in summary["results"].items():
        assert figures["rows"] == 12
        assert set(figures["by_kind"]) == {"cell", "row", "grid", "compare", "sum", "count"}
        assert figures["latency"]["prefill_ms"] > 0
        assert (figures["tracking"] is None) == (name == "dense")
        assert figures["compute"] == 1 if name == "dense" else 0.3 < figures["compute"] < 0.9


@pytest.mark.parametrize("name", ["redundancy.png", "depth.png", "example.png"])
def test_pictures(demo: tuple[Path, str], name: str) -> None:
    with Image.open(demo[0] / name) as picture:
        picture.load()
        assert picture.getcolors(maxcolors=3) is None, "more than a blank page"


def test_what_the_user_reads(demo: tuple[Path, str]) -> None:
    out, said = demo
    summary = load_json(out / "summary.json")
    assert max(len(line) for line in said.splitlines() if line.startswith(("┃", "│"))) <= 100
    assert "12 held-out rows" in said
    assert f"Example: {summary['example']['prompt']} -> {summary['example']['answer']}" in said
    assert f"Everything is in {out}:" in said
    assert f"skipit generate {out}/checkpoint --image {out}/example.png --prompt" in said
