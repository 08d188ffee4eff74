"""The command line as a user meets it: every verb end to end on the reference model, and every refusal."""

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)
from transformers.modeling_utils import PreTrainedModel

from skipit.cli.main import RUNS, main
from skipit.cli.options import VERBS, parse
from skipit.router.folders import load_json, save_json
from skipit.theory.artefact import load_plan
from skipit.train.display import _TrainingBar
from skipit.train.reference.data import reference_dataset
from skipit.train.reference.model import build_processor

TRAIN = ("--steps", 4, "--batch-size", 4, "--calibration-samples", 8, "--lora-rank", 2)
EVAL = ("--samples", 12, "--repeats", 2, "--controlled-samples", 2)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def skipit(*argv: Any) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in argv])
    return Result(code, out.getvalue(), err.getvalue())


def refused(*argv: Any, code: int = 1) -> str:
    """Run a command line that must be refused; returns what it says."""
    result = skipit(*argv)
    assert result.code == code, result
    assert result.out == ""
    return result.err


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole data flow, each step made by its verb."""
    at = tmp_path_factory.mktemp("chain")
    reference_dataset("test", 6)[1]["images"][0].save(at / "grid.png")
    for argv in (
        ("profile", "reference", "reference", "--samples", 12, "--draws", 1, "--out", at / "profile"),
        ("plan", at / "profile", "--budget", 0.6, "--out", at / "plan"),
        ("train", "reference", "reference", "--plan", at / "plan", *TRAIN, "--out", at / "run"),
        ("export", at / "run", "--out", at / "checkpoint"),
        ("eval", at / "checkpoint", "reference", *EVAL, "--profile", at / "profile", "--out", at / "eval"),
    ):
        result = skipit(*argv)
        assert result.code == 0, result.err
        (at / f"{argv[0]}.out").write_text(result.out)
        (at / f"{argv[0]}.err").write_text(result.err)
    return at


class TestVerbs:
    def test_profile_plan(self, chain: Path) -> None:
        assert (chain / "profile.out").read_text().startswith(f"{chain}/profile: 12 rows measured, 0 not finite.")
        assert re.fullmatch(r"profile +12/12  \d+ s\n", (chain / "profile.err").read_text())
        assert "theory gates for 60% of the FLOPs; expected to run" in (chain / "plan.out").read_text()
        assert load_plan(chain / "plan").budget == 0.6

    def test_train(self, chain: Path, recwarn: pytest.WarningsRecorder) -> None:
        record = load_json(chain / "run" / "run.json")
        assert (record["base"], record["config"]["steps"], record["config"]["budget"]) == ("reference", 4, 0.6)
        assert f"{record['calibrated_share']:.1%} of the dense decoder's FLOPs" in (chain / "train.out").read_text()
        assert re.fullmatch(r"train +4/4  \d+ s  .*\n", (chain / "train.err").read_text())

    def test_export_loads_without_skipit_as_the_dense_model(self, chain: Path) -> None:
        model, info = AutoModelForImageTextToText.from_pretrained(chain / "checkpoint", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(model).__name__ == "LlavaForConditionalGeneration"
        provenance = load_json(chain / "checkpoint" / "provenance.json")
        assert provenance["model"] == load_plan(chain / "plan").model
        assert {"made_by", "exported_by", "config"} <= set(provenance)
        assert "skipit.load" in (chain / "checkpoint" / "README.md").read_text()

    def test_generate(self, chain: Path, tmp_path: Path) -> None:
        ask = ("generate", chain / "checkpoint", "--image", chain / "grid.png", "--prompt", "read the top row .")
        result = skipit(*ask, "--depth-map", tmp_path / "depth.png")
        assert result.code == 0, result.err
        assert re.fullmatch(r"\d \d \d\n", result.out), "the answer alone is on standard output"
        assert re.search(r"^\(\d+\.\d% of the dense decoder's FLOPs\)$", result.err, re.MULTILINE)
        assert f"depth map: {tmp_path / 'depth.png'}" in result.err
        with Image.open(tmp_path / "depth.png") as picture:
            picture.verify()
        assert skipit(*ask, "--budget", 0.6) == Result(0, result.out, result.err.partition("depth map")[0])
        dense = skipit(*ask, "--dense")
        assert (dense.code, dense.err) == (0, "")

    def test_eval(self, chain: Path) -> None:
        figures = load_json(chain / "eval" / "eval.json")
        assert {"dense", "gated", "also", "theory", "units", "growing", "settings", "made", "made_by"} <= set(figures)
        assert figures["units"]["rows"] == figures["growing"]["rows"] == 2
        assert figures["dense"]["compute"] == 1
        assert figures["gated"]["tracking"]["tables"].keys() == {"damage", "geometric", "cross-attention"}
        out = (chain / "eval.out").read_text()
        assert "12 held-out rows" in out
        assert out.endswith(f"{chain / 'eval'}: report.html, eval.json\n")
        page = (chain / "eval" / "report.html").read_text()
        assert f"{figures['gated']['compute']:.1%}" in page
        assert f"skipit eval {chain}/checkpoint reference --baselines BASELINES --out DIR" in page
        # Bars for what takes long, each filled to its end.
        assert re.search(r"^units +25/25  \d+ s$", (chain / "eval.err").read_text(), re.MULTILINE)
        for what in ("eval", "sets", "2x2"):
            done, total = re.search(rf"^{what} +(\d+)/(\d+)  \d+ s$", (chain / "eval.err").read_text(), re.M).groups()
            assert done == total

    def test_a_profile_is_optional_for_eval(self, chain: Path, tmp_path: Path) -> None:
        result = skipit("eval", chain / "checkpoint", "reference", *EVAL, "--out", tmp_path / "eval")
        assert result.code == 0, result.err
        assert "rank corr." not in result.out
        assert load_json(tmp_path / "eval" / "eval.json")["gated"]["tracking"] is None

    def test_other_libraries_are_silent_and_hear_nothing_of_it(self, chain: Path, recwarn: Any) -> None:
        logging = transformers.utils.logging
        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        result = skipit("export", chain / "run", "--out", chain / "again", "--overwrite")
        assert (result.code, result.err) == (0, "")
        assert not recwarn.list
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


class TestHelp:
    def test_help_answers_at_once(self) -> None:
        code = "import sys; from skipit.cli.main import main; print(main(['--help']), *sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        help_, _, rest = result.stdout.rpartition("\n0 ")
        assert all(re.search(rf"^ +{verb}\b", help_, re.MULTILINE) for verb in VERBS)
        assert not {"torch", "transformers", "datasets", "matplotlib", "yaml"} & set(rest.split())

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_help_ends_in_an_example_that_parses(self, verb: str) -> None:
        result = skipit(verb, "--help")
        assert result.code == 0
        example = result.out.rstrip().splitlines()[-1]
        name, *argv = shlex.split(example)
        assert name == "skipit"
        assert parse(argv, RUNS).verb == verb

    def test_version(self) -> None:
        assert re.fullmatch(r"skipit \d+\.\d+\.\d+\n", skipit("--version").out)


WRONG: list[tuple[str, str]] = [
    ("", "the following arguments are required: VERB"),
    ("prune", "invalid choice: 'prune'"),
    ("plan p", "the following arguments are required: --out"),
    ("plan p --out x --bud 0.5", "unrecognized arguments: --bud"),
    ("plan p --out x --kv drop", "argument --kv: invalid choice: 'drop'"),
    *(
        (f"plan p --out x --budget={budget}", f"argument --budget: got '{budget}', expected a number in (0, 1]")
        for budget in ("0", "1.5", "-0.5", "nan", "half")
    ),
    ("demo --budget 2", "argument --budget: got '2', expected a number in (0, 1]"),
    ("demo --steps 0", "argument --steps: got '0', expected a whole number, at least 1"),
    ("demo --samples few", "argument --samples: got 'few', expected a whole number, at least 1"),
    ("demo --seed -1", "argument --seed: got '-1', expected a whole number, at least 0"),
    ("train m d --plan p --out x --learning-rate fast", "argument --learning-rate: got 'fast', expected a number"),
    ("train m d --out x --columns image=photo", "got 'image=photo', expected such as images=photo,prompt=question"),
    ("train m d --plan p --out x --damping nan", "argument --damping: got 'nan', expected a number, at least 0"),
    ("eval c d --out x --also runs/neutral", "got 'runs/neutral', expected a name and a checkpoint, such as neutral="),
    ("eval c d --out x --also =runs/neutral", "got '=runs/neutral', expected a name and a checkpoint"),
    ("eval c d --out x --controlled-samples -1", "argument --controlled-samples: got '-1', expected a whole number"),
    ("generate c --image i --prompt p --depth-map d.jpg", "expected a name that ends in .png or .svg"),
    ("generate c --image i --prompt p --depth-map no/d.png", "got 'no/d.png', but there is no folder no"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_wrong_arguments(line: str, message: str) -> None:
    said = refused(*line.split(), code=2)
    assert message in said
    assert re.search(r"\nTry `skipit( \w+)? --help`\.\n$", said)


class TestConfig:
    @pytest.fixture
    def config(self, tmp_path: Path) -> Callable[[str], Path]:
        def write(text: str) -> Path:
            (tmp_path / "settings.yaml").write_text(text)
            return tmp_path / "settings.yaml"

        return write

    def test_defaults_come_from_the_file_and_the_command_line_wins(self, config: Any) -> None:
        file = config(
            "out: runs/x\nplan: runs/plan\nbatch-size: 4\nlora_rank: 2\nlearning-rate: 1e-3\noverwrite: true\n"
            "steps: 9\nresume: yes\nreport-to: null\n"
        )
        arguments = parse(["train", "m", "d", "--config", str(file), "--steps", "7", "--no-resume"], RUNS)
        assert (arguments.out, arguments.plan) == (Path("runs/x"), Path("runs/plan"))
        assert (arguments.batch_size, arguments.lora_rank, arguments.learning_rate) == (4, 2, 1e-3)
        assert (arguments.steps, arguments.overwrite, arguments.resume) == (7, True, False)
        assert (arguments.report_to, arguments.damping, arguments.split) == ("none", None, "train")

    def test_the_file_may_come_first_and_with_an_equals_sign(self, config: Any) -> None:
        file = config("budget: 0.25")
        assert parse(["plan", f"--config={file}", "p", "--out", "x"], RUNS).budget == 0.25
        assert parse(["plan", f"--config={file}", "p", "--out", "x", "--budget=0.75"], RUNS).budget == 0.75

    def test_columns(self) -> None:
        parsed = parse(["train", "m", "d", "--out", "x", "--columns", "images=photo,messages=chat"], RUNS)
        assert parsed.columns == {"images": "photo", "messages": "chat"}

    def test_lists(self, config: Any) -> None:
        file = config("image: [a.png, b.png]\nprompt: what is it ?")
        line = ["generate", "c", "--config", str(file)]
        assert parse(line, RUNS).image == [Path("a.png"), Path("b.png")]
        assert parse([*line, "--image", "c.png"], RUNS).image == [Path("c.png")]
        assert parse(["generate", "c", "--config", str(config("image: a.png\nprompt: 3"))], RUNS).image == [
            Path("a.png")
        ]

    def test_an_empty_file_changes_nothing(self, config: Any) -> None:
        assert parse(["demo", "--config", str(config(""))], RUNS).steps == 250

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("buget: 0.5", "unknown keys buget; known: budget, "),
            ("config: other.yaml", "unknown keys config"),
            ("budget: 1.5", "`budget`: got '1.5', expected a number in (0, 1]"),
            ("budget: half", "`budget`: got 'half', expected a number in (0, 1]"),
            ("budget: [0.5]", "`budget`: got [0.5], expected a single value"),
            ("budget: true", "`budget`: got True, expected a single value"),
            ("overwrite: 1", "`overwrite`: got 1, expected true or false"),
            ("kv: drop", "`kv`: got 'drop', expected one of retain, evict"),
            ("- budget", "got a list, expected a mapping of option names to values"),
            ("budget: [", "cannot be read: while parsing"),
        ],
    )
    def test_wrong_files(self, config: Any, text: str, message: str) -> None:
        file = config(text)
        said = refused("plan", "p", "--out", "x", "--config", file, code=2)
        assert said.startswith(f"skipit plan: --config {file}")
        assert message in said

    def test_no_file(self) -> None:
        assert "--config no.yaml cannot be read" in refused("plan", "p", "--out", "x", "--config", "no.yaml", code=2)


def with_rows(folder: Path, change: Callable[[list[dict[str, Any]]], Any], rows: int = 8) -> Path:
    """The reference's rows with a change, as a data set on disk with two splits."""
    whole = reference_dataset("train", rows)
    values = whole.with_format("arrow")[:].to_pylist()
    changed = change(values) or values
    dataset = Dataset.from_list(changed, features=whole.features if changed[0].keys() == values[0].keys() else None)
    DatasetDict({"train": dataset, "calibration": dataset}).save_to_disk(folder)
    return folder


def break_image(number: int) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[number]["images"][0]["bytes"] = b"no picture"

    return change


class TestBadInput:
    def test_unknown_model(self, tmp_path: Path) -> None:
        said = refused("profile", "no/such-model", "reference", "--out", tmp_path / "x")
        assert said.startswith("skipit: model 'no/such-model' cannot be loaded: ")
        assert "Give a folder with config.json and safetensors weights, a Hub id, or `reference`" in said

    @pytest.mark.parametrize("verb", ["generate", "eval"])
    def test_not_a_checkpoint(self, chain: Path, tmp_path: Path, verb: str) -> None:
        rest = {"generate": ("--image", chain / "grid.png", "--prompt", "?"), "eval": ("reference", "--out", "x")}[verb]
        said = refused(verb, tmp_path, *rest)
        assert said.startswith(f"skipit: {tmp_path} has no router_config.json: it is not a gated checkpoint")

    def test_a_further_router_that_is_none(self, chain: Path, tmp_path: Path) -> None:
        line = ("eval", chain / "checkpoint", "reference", "--out", tmp_path / "x")
        said = refused(*line, "--also", f"neutral={tmp_path}")
        assert said == (
            f"skipit: {tmp_path} has no router_config.json: it is no gated checkpoint. Make one with `skipit export`.\n"
        )
        other = tmp_path / "other"
        other.mkdir()
        (other / "router_config.json").write_text("{}")
        save_json(other / "provenance.json", {"model": "0123456789abcdef"})
        said = refused(*line, "--also", f"neutral={other}")
        assert f"{other} was made from a model with fingerprint 0123456789abcdef, {chain / 'checkpoint'} from" in said
        assert "leave it out of --also" in said

    def test_folders_of_studies_that_are_none(self, chain: Path, tmp_path: Path) -> None:
        line = ("eval", chain / "checkpoint", "reference", "--out", tmp_path / "x")
        assert f"{tmp_path}: no summary.json. Give a folder" in refused(*line, "--baselines", tmp_path)
        assert f"{tmp_path}: no summary.json. Give a folder" in refused(*line, "--transfer", tmp_path)
        assert not (tmp_path / "x").exists()

    def test_not_an_artefact(self, tmp_path: Path) -> None:
        assert (
            refused("plan", tmp_path, "--out", "x") == f"skipit: {tmp_path} is not a profile: it has no profile.json.\n"
        )
        train = ("train", "reference", "reference", "--plan", tmp_path, "--out", tmp_path / "x")
        assert refused(*train) == f"skipit: {tmp_path} is not a plan: it has no plan.json.\n"
        assert "is not a finished run: it has no run.json." in refused("export", tmp_path, "--out", tmp_path / "x")

    def test_decoder_not_found(self, tmp_path: Path) -> None:
        small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        config = Blip2Config(
            vision_config=Blip2VisionConfig(image_size=8, patch_size=4, **small),
            qformer_config=Blip2QFormerConfig(encoder_hidden_size=16, **small),
            text_config=OPTConfig(vocab_size=50, ffn_dim=16, word_embed_proj_dim=16, **small),
        )
        Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "blip")
        build_processor().save_pretrained(tmp_path / "blip")
        said = refused("profile", tmp_path / "blip", "reference", "--out", tmp_path / "x")
        assert "no decoder layers in `Blip2ForConditionalGeneration`. Module lists found: " in said
        assert "language_model.model.decoder.layers (1 x OPTDecoderLayer)" in said

    def test_unknown_data(self, tmp_path: Path) -> None:
        said = refused("profile", "reference", tmp_path / "no", "--out", tmp_path / "x")
        assert said.startswith(f"skipit: data '{tmp_path}/no', split 'train', cannot be read: ")
        said = refused("profile", "reference", "reference", "--split", "dev", "--out", tmp_path / "x")
        assert said == "skipit: `split`: got 'dev', expected one of train, calibration, test.\n"

    def test_missing_columns(self, tmp_path: Path) -> None:
        data = with_rows(tmp_path / "data", lambda rows: [{"image": r["images"], "text": r["answer"]} for r in rows])
        said = refused("profile", "reference", data, "--out", tmp_path / "x")
        assert said.startswith(
            "skipit: row 0: no column images, prompt, completion; found: image, text. Rows need images"
        )

    def test_unreadable_image_in_the_data(self, chain: Path, tmp_path: Path) -> None:
        data = with_rows(tmp_path / "data", break_image(5))
        said = refused("profile", "reference", data, "--batch-size", 2, "--out", tmp_path / "x")
        assert said.startswith("skipit: row 5 cannot be read: cannot identify image file")
        train = ("train", "reference", data, "--plan", chain / "plan", *TRAIN, "--out", tmp_path / "run")
        assert refused(*train).startswith("skipit: row 5 cannot be read: cannot identify image file")

    def test_unreadable_image_met_while_training(self, chain: Path, tmp_path: Path) -> None:
        data = with_rows(tmp_path / "data", break_image(66), rows=67)
        line = ("--plan", chain / "plan", *TRAIN, "--steps", 17, "--calibration-samples", 4, "--out", tmp_path / "run")
        assert "skipit: row 66 cannot be read: cannot identify image file" in refused("train", "reference", data, *line)

    def test_images_and_placeholders_do_not_match(self, tmp_path: Path) -> None:
        def change(rows: list[dict[str, Any]]) -> None:
            rows[3]["images"] *= 2

        data = with_rows(tmp_path / "data", change)
        said = refused("profile", "reference", data, "--out", tmp_path / "x")
        assert said.startswith("skipit: row 3: its prompt has 1 image parts, its `images` 2. Each image needs one part")

    def test_image_token_in_the_text(self, chain: Path, tmp_path: Path) -> None:
        def change(rows: list[dict[str, Any]]) -> None:
            rows[2]["prompt"][0]["content"][1]["text"] = "what is <image> ?"

        data = with_rows(tmp_path / "data", change)
        said = refused("profile", "reference", data, "--out", tmp_path / "x")
        assert said.startswith("skipit: row 2: 2 image tokens, 1 images. Its text must not hold `<image>` itself.")
        ask = ("generate", chain / "checkpoint", "--image", chain / "grid.png", "--prompt", "what is <image> ?")
        assert refused(*ask).startswith("skipit: the question: 2 image tokens, 1 images.")

    @pytest.mark.parametrize("name", ["no.png", "text.png"])
    def test_unreadable_image_file(self, chain: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "text.png").write_text("no picture")
        said = refused("generate", chain / "checkpoint", "--image", tmp_path / name, "--prompt", "?")
        assert said.startswith(f"skipit: image {tmp_path / name} cannot be read: ")

    def test_no_such_operating_point(self, chain: Path) -> None:
        ask = ("generate", chain / "checkpoint", "--image", chain / "grid.png", "--prompt", "?")
        assert "`budget`: got '0.3', this router is calibrated for: 0.6." in refused(*ask, "--budget", 0.3)

    @pytest.mark.parametrize("flag", [("--budget", 0.6), ("--depth-map", "d.png")])
    def test_a_dense_run_has_neither_budget_nor_depth(self, chain: Path, flag: tuple[Any, ...]) -> None:
        ask = ("generate", chain / "checkpoint", "--image", chain / "grid.png", "--prompt", "?", "--dense", *flag)
        assert refused(*ask).startswith("skipit: a dense run executes every layer for every token: leave out")

    def test_artefacts_of_another_model(self, chain: Path, tmp_path: Path) -> None:
        other = tmp_path / "plan"
        other.mkdir()
        (other / "plan.safetensors").symlink_to(chain / "plan" / "plan.safetensors")
        save_json(other / "plan.json", {**load_json(chain / "plan" / "plan.json"), "model": "0123456789abcdef"})
        said = refused("train", "reference", "reference", "--plan", other, *TRAIN, "--out", tmp_path / "run")
        assert said.startswith(
            "skipit: the plan was made for a model with fingerprint 0123456789abcdef, this model has "
        )
        assert not (tmp_path / "run").exists()
        other = tmp_path / "profile"
        other.mkdir()
        (other / "profile.safetensors").symlink_to(chain / "profile" / "profile.safetensors")
        save_json(
            other / "profile.json", {**load_json(chain / "profile" / "profile.json"), "model": "0123456789abcdef"}
        )
        line = ("eval", chain / "checkpoint", "reference", "--samples", 2, "--profile", other, "--out", tmp_path / "x")
        assert "the profile was made for a model with fingerprint 0123456789abcdef" in refused(*line)

    def test_a_run_whose_base_has_changed(self, chain: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        for path in (chain / "run").iterdir():
            (run / path.name).symlink_to(path)
        (run / "run.json").unlink()
        save_json(run / "run.json", {**load_json(chain / "run" / "run.json"), "model": "0123456789abcdef"})
        said = refused("export", run, "--out", tmp_path / "x")
        assert re.search(
            r"was trained from a model with fingerprint 0123456789abcdef; reference now has \w{16}\.", said
        )
        (run / "run.json").write_text((chain / "run" / "run.json").read_text())
        (run / "adapter").unlink()
        assert f"{run}/adapter cannot be loaded: " in refused("export", run, "--out", tmp_path / "x")
        assert not (tmp_path / "x").exists()

    def test_training_data_without_held_out_rows(self, chain: Path, tmp_path: Path) -> None:
        reference_dataset("train", 8).to_parquet(tmp_path / "rows.parquet")
        line = ("--plan", chain / "plan", *TRAIN, "--out", tmp_path / "run")
        said = refused("train", "reference", tmp_path / "rows.parquet", *line)
        assert "has one split, which is trained on. Name held-out rows: --calibration-data." in said


class TestExistingFolders:
    LINES = (
        "profile reference reference",
        "plan {chain}/profile",
        "train reference reference --plan {chain}/plan",
        "export {chain}/run",
        "eval {chain}/checkpoint reference",
        "demo",
    )

    @pytest.fixture(autouse=True)
    def _no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def work(*_: Any, **__: Any) -> None:
            raise AssertionError("worked before it refused")

        # Modules are imported by the first line that names them: before what they take from `sources` is replaced.
        for name in ("demo.demo", "pipeline.merge_run", "sources.load_model", "sources.load_data"):
            monkeypatch.setattr(f"skipit.{name}", work)
        monkeypatch.setattr("skipit.router.checkpoint.load", work)
        monkeypatch.setattr("skipit.theory.artefact.load_profile", work)
        monkeypatch.setattr("skipit.theory.artefact.load_plan", work)

    @pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
    def test_are_refused_before_any_work(self, chain: Path, tmp_path: Path, line: str) -> None:
        argv = line.format(chain=chain).split()
        (tmp_path / "thesis.tex").write_text("years of work")
        assert re.search("exists.* or pass --overwrite to replace it", refused(*argv, "--out", tmp_path))
        said = refused(*argv, "--out", tmp_path, "--overwrite")
        assert "Delete it yourself or choose another --out." in said
        assert "is a file, expected a folder" in refused(*argv, "--out", tmp_path / "thesis.tex", "--overwrite")
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    @pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("train")])
    def test_that_cannot_be_made(self, chain: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.access", lambda *_: False)
        said = refused(*line.format(chain=chain).split(), "--out", "/no/permission/here")
        assert said == "skipit: /no/permission/here cannot be written: no permission to make a folder in /.\n"


def test_overwrite_replaces_what_skipit_made(chain: Path, tmp_path: Path) -> None:
    line = ("plan", chain / "profile", "--out", tmp_path / "plan")
    assert skipit(*line).code == 0
    assert skipit(*line, "--overwrite", "--budget", 0.3).code == 0
    assert load_plan(tmp_path / "plan").budget == 0.3
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


class TestStops:
    def test_interrupted_training_is_resumed_as_if_nothing_had_happened(
        self, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        line = ("train", "reference", "reference", "--plan", chain / "plan", *TRAIN, "--out", tmp_path / "run")

        def press_ctrl_c(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(_TrainingBar, "on_step_end", press_ctrl_c)
            said = refused(*line, code=130)
        assert said.endswith("skipit: interrupted. The same command with --resume goes on from the last save.\n")
        said = refused("export", tmp_path / "run", "--out", tmp_path / "x")
        assert "it has no run.json. Finish it with `skipit train ... --resume`." in said
        assert "continue with --resume" in refused(*line)
        result = skipit(*line, "--resume")
        assert result.code == 0, result.err
        for name in ("adapter/adapter_model.safetensors", "gates.safetensors"):
            ours, theirs = load_file(tmp_path / "run" / name), load_file(chain / "run" / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_a_loss_that_is_not_finite(self, chain: Path, tmp_path: Path) -> None:
        line = ("train", "reference", "reference", "--plan", chain / "plan", *TRAIN, "--out", tmp_path / "run")
        said = refused(*line, "--learning-rate", 1e30)
        assert re.search(r"skipit: (the loss is nan|a gradient is not finite) at step \d", said)
        assert "No checkpoint was written yet: lower the learning rates and start again." in said
        assert skipit(*line).code == 0, "what is left does not stand in the way"

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
    def test_a_killed_export_leaves_what_was_there(
        self, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
    ) -> None:
        def save_half(self: Any, folder: Path, **_: Any) -> None:
            (Path(folder) / "config.json").write_text("{")
            raise stop

        def export(*flags: str) -> None:
            if stop is KeyboardInterrupt:
                said = refused("export", chain / "run", "--out", tmp_path / "x", *flags, code=130)
                assert said == "skipit: interrupted; nothing was written.\n"
            else:
                with pytest.raises(stop):
                    skipit("export", chain / "run", "--out", tmp_path / "x", *flags)

        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "save_pretrained", save_half)
            export()
            assert not list(tmp_path.iterdir())
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "router_config.json").write_text("of an older export")
            export("--overwrite")
        assert [path.name for path in tmp_path.rglob("*")] == ["x", "router_config.json"]
        assert (tmp_path / "x" / "router_config.json").read_text() == "of an older export"

    def test_an_interrupted_profile_writes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("skipit.train.profiling.profile", interrupt)
        assert "interrupted; nothing was written" in refused(
            "profile", "reference", "reference", "--samples", 2, "--out", tmp_path / "x", code=130
        )
        assert not list(tmp_path.iterdir())


def test_results_are_json(chain: Path) -> None:
    for path in chain.rglob("*.json"):
        json.loads(path.read_text())
