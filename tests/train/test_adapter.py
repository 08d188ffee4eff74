"""An adapter checkpoint is the merged checkpoint, without the base: equal answers, and nothing that is not its own."""

import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from families import build, config, inputs, processor
from families.family import picture
from safetensors.torch import load_file, save_file
from tiny_run import DECIDE_AT, Made, make_all
from transformers import AutoModelForImageTextToText

import skipit
from skipit.cli.main import main
from skipit.router import CheckpointError, InputError, RouterConfigError, SkipItError, find_router, gate_state
from skipit.router.checkpoint import ROUTER_FILE
from skipit.train.adapter import ADAPTER_WEIGHTS, export_adapter, shape_hash
from skipit.train.card import ADAPTER_CONFIG
from skipit.train.export import export

ROWS: list[list[int | str]] = [[5, "image", 6, 7, 8, 9]]
LORA_ON_NOTHING = r"(.*\.)?model\.language_model\.layers\.\d+\.(self_attn\.nothing)"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_all(tmp_path_factory.mktemp("adapter"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**inputs("llava", ROWS)).logits


def test_it_is_the_merged_checkpoint(made: Made) -> None:
    expected, _ = skipit.load(made.merged)
    model, found = skipit.load(made.adapter)
    assert not model.training
    assert find_router(model)[1].config == find_router(expected)[1].config
    assert find_router(model)[1].config.decide_at == DECIDE_AT  # of the plan
    assert all(torch.equal(gate_state(model)[name], value) for name, value in gate_state(expected).items())
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)
    assert type(found) is type(processor("llava"))
    with skipit.running(mode="dense"):
        assert not torch.equal(logits(model), logits(build("llava")))  # the LoRA is in it


def test_any_copy_of_the_base(made: Made, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(made.base, tmp_path / "elsewhere")
    expected, _ = skipit.load(made.adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, _ = skipit.load(made.adapter, base=elsewhere)
    assert torch.equal(logits(model), logits(expected))


def test_what_is_in_it(made: Made) -> None:
    assert {file.name for file in made.adapter.iterdir()} == {
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
        ROUTER_FILE,
        "provenance.json",
        "README.md",
    }
    assert made.size == sum(file.stat().st_size for file in made.adapter.iterdir())
    router = json.loads((made.adapter / ROUTER_FILE).read_text())
    assert (router["format_version"], router["skipit_version"]) == (3, skipit.__version__)
    assert router["decide_at"] == list(DECIDE_AT)
    assert router["base"] == {
        "model": str(made.base),
        "revision": None,
        "shapes": shape_hash(build("llava")),
        "fingerprint": json.loads((made.run / "run.json").read_text())["model"],
    }
    names = set(load_file(made.adapter / ADAPTER_WEIGHTS))
    assert sum("layer_gate" in name for name in names) == 2 * 4
    assert sum("lora_" in name for name in names) == 2 * 7 * 4 == len(names) - 8
    assert "skipit.load" in (made.adapter / "README.md").read_text()


def test_a_base_on_the_hub_is_taken_at_its_revision(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, old, new = tmp_path / "hub" / "models--someone--base", "0" * 40, "1" * 40
    shutil.copytree(made.base, hub / "snapshots" / old)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(old)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    _rewrite(run / "run.json", base="someone/base")
    export_adapter(run, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / ROUTER_FILE).read_text())["base"]["revision"] == old
    assert json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())["revision"] == old
    # Its owner has trained it on since.
    build("llava", seed=1).save_pretrained(hub / "snapshots" / new)
    processor("llava").save_pretrained(hub / "snapshots" / new)
    (hub / "refs" / "main").write_text(new)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, _ = skipit.load(tmp_path / "adapter")
    assert torch.equal(logits(model), logits(skipit.load(made.adapter)[0]))


def test_plain_peft_loads_the_lora(made: Made) -> None:
    from peft import PeftModel

    dense = AutoModelForImageTextToText.from_pretrained(made.base)
    plain = PeftModel.from_pretrained(dense, made.adapter).eval()
    ours, _ = skipit.load(made.adapter)
    with skipit.running(mode="dense"):
        torch.testing.assert_close(logits(plain), logits(ours), atol=1e-5, rtol=1e-5)


def test_another_base_is_refused(made: Made, tmp_path: Path) -> None:
    changed = config("llava").to_dict()
    changed["text_config"]["intermediate_size"] = 40
    other = AutoModelForImageTextToText.from_config(type(config("llava")).from_dict(changed))
    other.save_pretrained(tmp_path / "other")
    processor("llava").save_pretrained(tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"names and shapes have hash \w+; .*other' has \w+\. Name a copy of that"
    ):
        skipit.load(made.adapter, base=tmp_path / "other")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        skipit.load(made.adapter, base=tmp_path / "nothing")


def test_other_weights_are_noticed(made: Made, tmp_path: Path) -> None:
    build("llava", seed=1).save_pretrained(tmp_path / "other")
    processor("llava").save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="has the shapes of .* but other weights, or another dtype"):
        skipit.load(made.adapter, base=tmp_path / "other")


def test_a_checkpoint_with_weights_takes_no_base(made: Made) -> None:
    with pytest.raises(InputError, match="holds all weights itself"):
        skipit.load(made.merged, base=made.base)


def test_command(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(made.run), "--adapter", "--out", str(tmp_path / "out")]) == 0
    assert "adapter checkpoint, 0.0" in (said := capsys.readouterr().out), said
    picture(0, 0).save(tmp_path / "image.png")
    line = ["generate", str(tmp_path / "out"), "--image", str(tmp_path / "image.png"), "--prompt", "what is it"]
    assert main([*line, "--max-new-tokens", "2"]) == 0
    assert "of the dense decoder's FLOPs" in capsys.readouterr().err
    assert main(["export", str(made.run), "--adapter", "--model", "x", "--out", str(tmp_path / "two")]) == 1
    assert "--adapter is of a run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def moved(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The adapter with a record of a base that is not there, and where the base is."""
    folder = tmp_path_factory.mktemp("moved")
    adapter = Path(shutil.copytree(made.adapter, folder / "adapter"))
    router = json.loads((adapter / ROUTER_FILE).read_text())
    _rewrite(adapter / ROUTER_FILE, base={**router["base"], "model": str(folder / "gone")})
    return adapter, made.base


def test_generate_command_takes_the_base(
    made: Made, moved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(0, 0).save(tmp_path / "image.png")
    asked = ["--image", str(tmp_path / "image.png"), "--prompt", "what is it", "--max-new-tokens", "4"]
    assert main(["generate", str(made.merged), *asked]) == 0
    wanted = capsys.readouterr()
    assert main(["generate", str(moved[0]), "--base", str(moved[1]), *asked]) == 0
    assert capsys.readouterr() == wanted
    assert "of the dense decoder's FLOPs" in wanted.err
    assert main(["generate", str(moved[0]), *asked]) == 1
    assert "gone: no such file or folder" in capsys.readouterr().err
    assert main(["generate", str(made.merged), "--base", str(moved[1]), *asked]) == 1
    assert "holds all weights itself" in capsys.readouterr().err


def test_eval_command_takes_an_adapter(
    made: Made,
    moved: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("skipit.eval.report.page.as_svg", lambda figure: b"<svg/>")  # drawing takes half of the time
    parts = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    prompt = [{"role": "user", "content": parts}]
    rows = [{"images": [picture(number, 0)], "prompt": prompt, "answer": "t5"} for number in range(3)]
    Dataset.from_list(rows, features=_features(rows)).save_to_disk(tmp_path / "data")
    found = {}
    for name, folder, options in (
        ("merged", made.merged, ["--base", str(made.base)]),
        ("recorded", made.adapter, []),
        ("moved", moved[0], ["--base", str(moved[1])]),
    ):
        line = [
            "eval",
            str(folder),
            str(tmp_path / "data"),
            *options,
            "--repeats",
            "1",
            "--no-compiled",
            "--out",
            str(tmp_path / name),
        ]
        assert main(line) == 0, capsys.readouterr().err
        figures = json.loads((tmp_path / name / "eval.json").read_text())
        kept = ("accuracy", "compute", "skip_rate", "same_answer", "rows")
        found[name] = {model: {key: figures[model][key] for key in kept} for model in ("dense", "gated")}
    assert found["merged"] == found["recorded"] == found["moved"]
    assert found["moved"]["gated"]["compute"] < 1 == found["moved"]["dense"]["compute"]
    budget = next(iter(find_router(skipit.load(made.adapter)[0])[1].config.operating_points))
    line = [
        "eval",
        str(made.adapter),
        str(tmp_path / "data"),
        "--repeats",
        "1",
        "--no-compiled",
        "--out",
        str(tmp_path / "at"),
    ]
    assert main([*line, "--budget", budget]) == 0
    assert main([*line, "--budget", "fast", "--overwrite"]) == 1
    assert "`budget`: got 'fast', this router is calibrated for" in capsys.readouterr().err


def _features(rows: list[dict[str, Any]]) -> Features:
    part = {"type": Value("string"), "text": Value("string")}
    turns = [{"role": Value("string"), "content": [part]}]
    return Features({"images": [Image()], "prompt": turns, "answer": Value("string")})


def _rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _tensors(change: Callable[[dict[str, torch.Tensor], str], Any]) -> Callable[[Path], None]:
    """Damage the weights: `change` gets them and the name of one LoRA tensor."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        change(tensors, max(tensors))
        save_file(tensors, folder / ADAPTER_WEIGHTS)

    return damage


def _router(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder / ROUTER_FILE, **changes)


def _adapter(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder / ADAPTER_CONFIG, **changes)


def _without(key: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / ADAPTER_CONFIG).read_text())
        del values[key]
        (folder / ADAPTER_CONFIG).write_text(json.dumps(values))

    return damage


def _twice(file: Path, key: str) -> None:
    text = file.read_text()
    file.write_text(text.replace(f'"{key}":', f'"{key}": 3, "{key}":', 1))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / ROUTER_FILE).unlink(), CheckpointError, "is an adapter without router_config.json"),
        (_router(base="x"), CheckpointError, "`base`: got 'x', expected an object with model"),
        (_router(base={"model": "x"}), CheckpointError, "`base`: got .* expected an object"),
        (_router(format_version=9), RouterConfigError, "this skipit reads 1"),
        (_router(colour=1), RouterConfigError, "unknown keys colour"),
        (_adapter(peft_type="IA3"), CheckpointError, "`peft_type`: got 'IA3', expected"),
        (_adapter(target_modules="nothing"), CheckpointError, "`target_modules`: got 'nothing', expected the pattern"),
        (_adapter(target_modules="(.*a*a*a*)*b"), CheckpointError, "`target_modules`: got .* expected the pattern"),
        (_adapter(target_modules=LORA_ON_NOTHING), CheckpointError, "has, without a place for it, `base_model"),
        (_adapter(exclude_modules="(a*)*b"), CheckpointError, "`exclude_modules`: got .* does not load"),
        (_adapter(layers_pattern="(a*)*b"), CheckpointError, "`layers_pattern`: got .* does not load"),
        (_adapter(rank_pattern={"q_proj": 10**6}), CheckpointError, "`rank_pattern`: got .* does not load"),
        (_adapter(alpha_pattern={"(a*)*b": 1}), CheckpointError, "`alpha_pattern`: got .* does not load"),
        (_adapter(init_lora_weights="pissa"), CheckpointError, "`init_lora_weights`: got 'pissa', expected true"),
        (_adapter(init_lora_weights="olora"), CheckpointError, "`init_lora_weights`: got 'olora', expected true"),
        (_adapter(lora_alpha=None), CheckpointError, "`lora_alpha`: got None, expected a positive number"),
        (_adapter(lora_alpha=-16), CheckpointError, "`lora_alpha`: got -16, expected a positive number"),
        (_adapter(lora_alpha=0), CheckpointError, "`lora_alpha`: got 0, expected a positive number"),
        (_adapter(lora_alpha=True), CheckpointError, "`lora_alpha`: got True, expected a positive number"),
        (_adapter(lora_alpha=float("nan")), CheckpointError, "adapter_config.json is not readable JSON: .*NaN"),
        (_adapter(lora_alpha=float("inf")), CheckpointError, "adapter_config.json is not readable JSON: .*Infinity"),
        (_adapter(lora_alpha=10**400), CheckpointError, "`lora_alpha`: got 1000.*, expected a positive number"),
        (_adapter(lora_alpha=1e300), CheckpointError, "has values that are not finite"),
        (_without("lora_alpha"), CheckpointError, "`lora_alpha` is missing, expected a positive number"),
        (_without("r"), CheckpointError, "`r` is missing, expected a positive whole number"),
        (_adapter(r=100_000), CheckpointError, r"`r`: got 100000, but `.*lora_A.weight` has shape \(2, "),
        (_adapter(r=2.0), CheckpointError, "`r`: got 2.0, expected a positive whole number"),
        (_adapter(use_rslora=True), CheckpointError, "`use_rslora`: got True, which skipit does not load"),
        (_adapter(use_dora=True), CheckpointError, "`use_dora`: got True, which skipit does not load"),
        (_adapter(bias="all"), CheckpointError, "`bias`: got 'all', which skipit does not load"),
        (_adapter(task_type="CAUSAL_LM"), CheckpointError, "`task_type`: got 'CAUSAL_LM', which skipit does not"),
        (_adapter(modules_to_save=["lm_head"]), CheckpointError, "`modules_to_save`: got .*, expected .*layer_gate"),
        (_adapter(megatron_core="os"), CheckpointError, "`megatron_core`: got 'os', which skipit does not load"),
        (_adapter(from_the_future=3), CheckpointError, "`from_the_future`: got 3, which skipit does not load"),
        (_tensors(lambda t, n: t.update({n: t[n].double() * 0 + 1e300})), CheckpointError, "are not finite"),
        (_tensors(lambda t, n: t.update({n: t[n].bool()})), CheckpointError, "is stored as BOOL, expected floating"),
        (_tensors(lambda t, n: t.update({min(t): t[min(t)].bool()})), CheckpointError, "layer_gate.bias` is stored as"),
        (_tensors(lambda t, n: t.update({n: t[n].to(torch.int8)})), CheckpointError, "is stored as I8, expected"),
        (lambda f: _twice(f / ADAPTER_CONFIG, "r"), CheckpointError, "the key 'r' stands there twice"),
        (lambda f: (f / ADAPTER_WEIGHTS).unlink(), CheckpointError, "adapter_model.safetensors does not exist"),
        (lambda f: (f / ADAPTER_WEIGHTS).write_bytes(b"\x00" * 9), CheckpointError, "is not a readable safetensors"),
        (_tensors(lambda t, n: t.pop(n)), CheckpointError, "lacks `base_model"),
        (_tensors(lambda t, n: t.pop(min(t))), CheckpointError, "lacks `base_model.*layer_gate.bias`"),
        (_tensors(lambda t, n: t.update(more=t[n] + 1)), CheckpointError, "has, without a place for it, `more`"),
        (
            _tensors(lambda t, n: t.update({n: t[n][:1]})),
            CheckpointError,
            r"has shape \(1, 2\), but the model makes it \(16, 2\)",
        ),
        (_tensors(lambda t, n: t.update({n: t[n] * torch.nan})), CheckpointError, "are not finite"),
    ],
)
def test_damage(
    damage: Callable[[Path], None], error: type[SkipItError], message: str, made: Made, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made.adapter, tmp_path / "copy"))
    damage(copy)
    started = time.monotonic()
    with pytest.raises(error, match=message):
        skipit.load(copy)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("damage", [_adapter(init_lora_weights="pissa"), _tensors(lambda t, n: t.pop(n))])
def test_the_adapter_of_a_run_is_held_against_the_same(
    damage: Callable[[Path], None], made: Made, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    damage(run / "adapter")
    with pytest.raises(CheckpointError, match=r"`init_lora_weights`: got 'pissa'|lacks `base_model"):
        export(run, tmp_path / "out")
