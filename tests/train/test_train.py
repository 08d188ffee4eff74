"""A training run from a plan to a run folder, on the reference architecture with few layers and random weights."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from shallow import shallow_reference
from torch import nn

from skipit.router import (
    CheckpointError,
    Gated,
    InputError,
    RouterConfig,
    attach,
    find_router,
    gate_state,
    gated_layers,
    running,
)
from skipit.router.checkpoint import GATES_FILE, load_router
from skipit.router.measured import bench_file
from skipit.theory.artefact import save_plan
from skipit.theory.calibrate import LIMIT, calibrate, measured_share
from skipit.theory.cost import CostModel
from skipit.theory.identity import fingerprint
from skipit.theory.labels import IGNORE, before_answer
from skipit.theory.layer_times import LayerTime, LayerTimes, StepTime
from skipit.theory.plan import LEFT_OUT, LOGIT_LIMIT, Plan
from skipit.theory.time_model import TimeModel
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator, batches
from skipit.train.gating import attach_plan
from skipit.train.launch import training_arguments
from skipit.train.objective import answer_losses, answer_targets
from skipit.train.reference.data import reference_dataset
from skipit.train.run import check_answers, least_share, lora_targets, prepare, train
from skipit.train.trainer import CLOSE, TRIES, SkipTrainer
from studies.architecture import build_processor

LAYERS = 3
CONFIG = TrainConfig(steps=6, batch_size=4, lora_rank=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def base() -> Any:
    return shallow_reference(LAYERS)


@pytest.fixture
def model(base: Any) -> Any:
    return copy.deepcopy(base)


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return reference_dataset("train", 16)


def _with_more_text(row: dict[str, Any]) -> dict[str, Any]:
    """A question with a long story after it."""
    (turn,) = row["prompt"]
    words = " ".join(part["text"] for part in turn["content"] if part["text"])
    story = {"type": "text", "text": " ".join([words] * 8)}
    return {**row, "prompt": [{**turn, "content": [*turn["content"], story]}]}


def plan_for(model: Any, bias: float = 0.3) -> Plan:
    width = model.config.text_config.hidden_size
    weight = 0.1 * torch.randn(LAYERS, 2, width, generator=torch.Generator().manual_seed(0))
    biases = torch.full((LAYERS, 2), bias)
    return Plan(weight, biases, 0.5, "retain", "theory", fingerprint(model), torch.ones(LAYERS, 2))


@pytest.fixture(scope="module")
def finished(base: Any, processor: Any, rows: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    model = copy.deepcopy(base)
    tuned = train(
        model,
        processor,
        rows,
        plan_for(base),
        CONFIG,
        out,
        calibration=reference_dataset("calibration", 8),
        base="tiny",
    )
    return tuned, out


class TestRunFolder:
    def test_files(self, finished: tuple[Any, Path]) -> None:
        _, out = finished
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert names >= {
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            GATES_FILE,
            "history.jsonl",
            "router_config.json",
            "run.json",
            "train_config.json",
        }
        assert not any(name.endswith((".pt", ".bin", ".pth", ".pkl")) for name in names)

    def test_record(self, finished: tuple[Any, Path], base: Any) -> None:
        _, out = finished
        record = json.loads((out / "run.json").read_text())
        assert record["base"] == "tiny"
        assert record["model"] == fingerprint(base)
        assert TrainConfig.from_dict(record["config"]) == CONFIG
        assert record["init"] == "theory"
        assert record["calibrated_share"] == pytest.approx(CONFIG.budget, abs=0.05)
        assert record["made_by"]["versions"]["transformers"]
        history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        assert [figures["step"] for figures in history] == list(range(1, CONFIG.steps + 1))
        assert record["last"] == history[-1]
        for figures in history:
            assert set(figures) == {"step", "ce", "kl", "accuracy", "budget", "target", "compute", "threshold"}
            assert 0 <= figures["accuracy"] <= 1
            assert 0 < figures["compute"] < 1.01
            assert min(figures["ce"], figures["kl"]) > 0
            # Rows like the held-out ones spend what these spend, from the first step on.
            assert figures["compute"] == pytest.approx(CONFIG.budget, abs=0.1)
            assert figures["target"] == pytest.approx(CONFIG.budget, abs=0.05)

    def test_the_model_that_comes_back_is_the_one_on_disk(
        self, finished: tuple[Any, Path], base: Any, processor: Any, rows: Dataset
    ) -> None:
        from peft import PeftModel

        tuned, out = finished
        assert not tuned.training
        config, gates = load_router(out)
        assert config == find_router(tuned)[1].config
        assert config.operating_points == {"0.5": config.threshold}
        assert all(torch.equal(gate_state(tuned)[name], value) for name, value in gates.items())
        batch = next(batches(rows, Collator(processor), 4))
        batch.pop("labels")
        fresh = copy.deepcopy(base)
        attach(fresh, config)
        fresh = PeftModel.from_pretrained(fresh, out / "adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(fresh(**batch).logits, tuned(**batch).logits)

    def test_the_calibrated_share_is_what_is_measured(self, finished: tuple[Any, Path], processor: Any) -> None:
        tuned, out = finished
        record = json.loads((out / "run.json").read_text())
        held_out = batches(reference_dataset("calibration", 8), Collator(processor), CONFIG.batch_size)
        costs = CostModel.of(tuned.get_base_model())
        share = measured_share(tuned, held_out, costs, "retain", find_router(tuned)[1].config.threshold)
        assert share == pytest.approx(record["calibrated_share"])

    @torch.no_grad()
    def test_how_held_out_rows_are_answered_before_and_after(
        self, finished: tuple[Any, Path], base: Any, processor: Any
    ) -> None:
        tuned, out = finished
        attach_plan(before := copy.deepcopy(base), plan_for(base), RouterConfig())
        record = json.loads((out / "run.json").read_text())["answered"]["0.5"]
        rows = list(batches(reference_dataset("calibration", 8), Collator(processor), CONFIG.batch_size))
        costs = CostModel.of(base)
        search = {"tolerance": CLOSE, "steps": TRIES}
        for model, found, how in ((before, record["before"], search), (tuned, record["after"], {})):
            threshold, _ = calibrate(model, rows, costs, CONFIG.budget, "retain", **how)
            right = kl = tokens = 0.0
            for batch in rows:
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                wanted, answers = batch["labels"][:, 1:], batch["labels"][:, 1:] != IGNORE
                full = base(**inputs).logits[:, :-1][answers].log_softmax(-1)
                with running(policy=Gated(threshold), prompt=before_answer(batch["labels"])):
                    gated = model(**inputs).logits[:, :-1][answers].log_softmax(-1)
                right += float((gated.argmax(-1) == wanted[answers]).sum())
                kl += float((full.exp() * (full - gated)).sum())
                tokens += int(answers.sum())
            assert found == pytest.approx({"accuracy": right / tokens, "kl": kl / tokens}, abs=1e-4)

    def test_gates_and_lora_were_trained_and_nothing_else(self, finished: tuple[Any, Path], base: Any) -> None:
        tuned, out = finished
        assert not torch.equal(gate_state(tuned)["weight"], plan_for(base).weight)
        adapter = load_file(out / "adapter" / "adapter_model.safetensors")
        factors = [tensor for name, tensor in adapter.items() if "lora_B" in name]
        assert len(factors) == 7 * LAYERS
        assert all(tensor.any() for tensor in factors)
        original = dict(base.named_parameters())
        for name, parameter in tuned.get_base_model().named_parameters():
            name = name.replace(".base_layer.", ".")
            if name in original:
                assert torch.equal(parameter, original[name]), name


class TestPreparation:
    def test_lora_goes_to_the_decoder_alone(self, model: Any) -> None:
        pattern = re.compile(lora_targets(model))
        matched = [name for name, module in model.named_modules() if pattern.fullmatch(name)]
        assert len(matched) == 7 * LAYERS
        assert all(name.startswith("model.language_model.layers.") for name in matched)
        assert all(isinstance(model.get_submodule(name), nn.Linear) for name in matched)

    def test_without_lora_the_gates_train_alone(self, model: Any) -> None:
        tuned = prepare(model, plan_for(model), replace(CONFIG, lora_rank=0))
        trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * LAYERS
        assert all("layer_gate" in name for name in trained)
        assert torch.equal(gate_state(tuned)["bias"], plan_for(model).bias)

    @pytest.mark.parametrize("closed", [LEFT_OUT, -LOGIT_LIMIT], ids=["now", "in plans of before"])
    def test_gates_of_whole_layers_stay_as_a_plan_in_time_has_made_them(self, model: Any, closed: float) -> None:
        plan = plan_for(model)
        plan.bias[0], plan.bias[1], plan.weight[:2] = LOGIT_LIMIT, closed, 0.0
        for latency, learn in ((None, LAYERS), (0.7, LAYERS - 2)):
            tuned = prepare(copy.deepcopy(model), plan, replace(CONFIG, latency=latency))
            gates = [name for name, p in tuned.named_parameters() if p.requires_grad and "layer_gate" in name]
            assert len(gates) == 2 * learn

    def test_nothing_is_left_to_train(self, model: Any) -> None:
        plan = plan_for(model)
        plan.bias.fill_(LOGIT_LIMIT)
        plan.weight.zero_()
        with pytest.raises(InputError, match=r"`lora_rank`: got 0.*decide for whole layers.*`lora_rank` above 0"):
            prepare(model, plan, replace(CONFIG, latency=0.7, lora_rank=0))

    def test_a_plan_for_another_model(self, model: Any, processor: Any, rows: Dataset, tmp_path: Path) -> None:
        other = replace(plan_for(model), model="another")
        with pytest.raises(
            CheckpointError, match="the plan was made for a model with fingerprint another, this model has"
        ):
            train(model, processor, rows, other, CONFIG, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert not model._forward_pre_hooks

    def test_data_without_answers(self) -> None:
        batch = {"attention_mask": torch.ones(1, 3), "labels": torch.full((1, 3), -100)}
        with pytest.raises(InputError, match="the training data has no answer tokens; every row needs a completion"):
            check_answers([batch])


@pytest.fixture
def trainer(model: Any, processor: Any, rows: Dataset, tmp_path: Path) -> Callable[..., SkipTrainer]:
    def make(config: TrainConfig = CONFIG, **options: Any) -> SkipTrainer:
        costs = CostModel.of(model)
        tuned = prepare(copy.deepcopy(model), plan_for(model), config)
        return SkipTrainer(
            settings=config,
            costs=costs,
            model=tuned,
            args=training_arguments(config, tmp_path),
            train_dataset=rows,
            data_collator=Collator(processor),
            **options,
        )

    return make


class TestLoss:
    def test_the_teacher_is_the_base_model(self, trainer: Any, base: Any, processor: Any, rows: Dataset) -> None:
        made = trainer()
        with torch.no_grad():
            for name, parameter in made.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        batch = next(batches(rows, Collator(processor), 4))
        batch.pop("labels")
        made.model.train()
        with torch.no_grad():
            kept = torch.tensor([3, 11])
            torch.testing.assert_close(made._teacher(made.model, batch, kept), base(**batch).logits[:, kept])
        assert made.model.training

    @pytest.mark.parametrize("kv", ["retain", "evict"])
    def test_parts(self, trainer: Any, base: Any, processor: Any, rows: Dataset, kv: str) -> None:
        made = trainer(replace(CONFIG, kv=kv, distillation=0.5))
        made.thresholds[0] = 0.3
        made.model.train()
        batch = next(batches(rows, Collator(processor), 4))
        loss = made.compute_loss(made.model, dict(batch), num_items_in_batch=10)
        labels = batch.pop("labels")
        with torch.no_grad():
            with running(policy=Gated(0.3), kv=kv, mode="masked"):
                student = made.model(**batch, use_cache=False).logits
            kept, targets = answer_targets(labels)
            ce, kl, correct = answer_losses(student[:, kept], base(**batch).logits[:, kept], targets)
        assert loss.item() == pytest.approx(float(ce + 0.5 * kl) / 10, rel=1e-4)
        sums = {name: float(made._sums[name]) for name in ("ce", "kl", "correct", "answers")}
        expected = {"ce": ce, "kl": kl, "correct": correct, "answers": (targets != -100).sum()}
        assert sums == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)

    @pytest.mark.parametrize("decide_at", [None, (0,), (0, 1)])
    def test_gates_and_lora_have_learning_rates_of_their_own(self, trainer: Any, decide_at: Any) -> None:
        made = trainer(replace(CONFIG, gate_learning_rate=0.02))
        assert [group["lr"] for group in made.create_optimizer().param_groups] == [0.02, CONFIG.learning_rate]
        made = trainer()
        router = find_router(made.model)[1]
        router.config = replace(router.config, decide_at=decide_at)
        width = made.model.config.text_config.hidden_size
        groups = made.create_optimizer().param_groups
        assert [group["lr"] for group in groups] == [0.5 / width, CONFIG.learning_rate]
        assert [len(group["params"]) for group in groups] == [2 * LAYERS, 2 * 7 * LAYERS]
        groups = trainer(replace(CONFIG, lora_rank=0)).create_optimizer().param_groups
        assert len(groups) == 1

    @pytest.mark.parametrize(("decide_at", "rate"), [(None, 0.1), ((0,), 0.5), ((0, 1), 0.1)])
    def test_gates_in_shards_that_decide_at_several_points_are_slower(
        self, trainer: Any, decide_at: Any, rate: float
    ) -> None:
        """Nothing then makes up for what their logits have in common."""
        made = trainer()
        router = find_router(made.model)[1]
        router.config = replace(router.config, decide_at=decide_at)
        for layer in gated_layers(made.model):
            for parameter in layer.layer_gate.parameters():
                parameter.ds_id, parameter.ds_shape = 0, parameter.shape
        assert made.gate_rate == rate / made.model.config.text_config.hidden_size

    def test_one_large_batch_is_two_small_ones(self, base: Any, processor: Any, rows: Dataset, tmp_path: Path) -> None:
        histories = []
        for batch_size, accumulation in ((8, 1), (4, 2)):
            config = replace(CONFIG, steps=3, batch_size=batch_size, accumulation=accumulation)
            out = tmp_path / str(batch_size)
            train(copy.deepcopy(base), processor, rows, plan_for(base), config, out)
            histories.append([json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()])
        for one, two in zip(*histories, strict=True):
            assert two == pytest.approx(one, rel=1e-3)


class TestBudget:
    @pytest.mark.parametrize("decide_at", [(0,), None])
    @pytest.mark.parametrize("kv", ["retain", "evict"])
    def test_is_what_held_out_rows_spend(
        self, trainer: Any, model: Any, processor: Any, rows: Dataset, kv: Any, decide_at: Any
    ) -> None:
        """Rows of training with more text to an image spend more, and as much of each image runs as in a held-out row.

        Text runs every layer and images run as the threshold says.
        """
        held, talks = (list(batches(each, Collator(processor), 4)) for each in (rows, rows.map(_with_more_text)))
        config, costs = replace(CONFIG, kv=kv, budget=0.7, more_budgets=(1.0,)), CostModel.of(model)
        made = trainer(config, held=held, sample=talks)
        router = find_router(made.model)[1]
        router.config = replace(router.config, decide_at=decide_at)
        for layer in gated_layers(made.model):
            with torch.no_grad():
                layer.layer_gate.weight[0], layer.layer_gate.bias[0] = 0, 30
        made.begin()
        (threshold, _), (target, everything) = made.thresholds, made.targets
        assert measured_share(made.model, held, costs, kv, threshold) == pytest.approx(0.7, abs=0.03)
        assert measured_share(made.model, talks, costs, kv, threshold) == pytest.approx(target)
        assert target > 0.75
        assert everything == 1
        made.model.train()
        made.compute_loss(made.model, dict(talks[0]), num_items_in_batch=10)
        made.state.global_step = 1
        assert made.finish_step()["compute"] == pytest.approx(target, abs=0.05)

    @pytest.mark.parametrize("kv", ["retain", "evict"])
    def test_training_stays_at_the_thresholds_that_are_calibrated(
        self, model: Any, processor: Any, rows: Dataset, tmp_path: Path, kv: Any
    ) -> None:
        """Gates learn to spend more on text, of which held-out rows have less: a target of the beginning is too low."""
        plan = replace(plan_for(model), decide_at=(0,))
        config = replace(CONFIG, kv=kv, budget=0.6, steps=20, gate_learning_rate=0.02)
        talks, costs = reference_dataset("train", 80).map(_with_more_text), CostModel.of(model)
        tuned = train(model, processor, talks, plan, config, tmp_path / "run", calibration=rows)
        history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
        last = measured_share(tuned, batches(rows, Collator(processor), 4), costs, kv, history[-1]["threshold"])
        assert last == pytest.approx(0.6, abs=0.06)

    @pytest.mark.parametrize("kv", ["retain", "evict"])
    @pytest.mark.parametrize("bias", [-9.0, 9.0])
    def test_is_spent_from_the_second_step_on_wherever_gates_begin(
        self, model: Any, processor: Any, rows: Dataset, tmp_path: Path, kv: Any, bias: float
    ) -> None:
        """A plan that lets nothing run, or everything, is no plan for the budget: the threshold makes it one."""
        config = replace(CONFIG, kv=kv, budget=0.6)
        train(model, processor, rows, plan_for(model, bias=bias), config, tmp_path / "run")
        first, *later = (json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines())
        assert abs(first["compute"] - 0.6) > 0.2
        assert [figures["compute"] for figures in later] == pytest.approx([0.6] * len(later), abs=0.1)

    @pytest.mark.parametrize("kv", ["retain", "evict"])
    def test_the_next_step_runs_where_the_last_would_have_spent_it(
        self, trainer: Any, processor: Any, rows: Dataset, kv: Any
    ) -> None:
        made = trainer(replace(CONFIG, kv=kv, budget=0.6, gate_learning_rate=0))
        made.model.train()
        batch = next(batches(rows, Collator(processor), 4))
        found = []
        for step in range(2):
            made.state.global_step = step
            made.compute_loss(made.model, dict(batch), num_items_in_batch=10)
            made.state.global_step = step + 1
            found.append(made.finish_step())
        assert found[1]["threshold"] != found[0]["threshold"] == 0
        # Not to the token: each layer decides for itself here, on states that the layers before have changed.
        assert found[1]["compute"] == pytest.approx(0.6, abs=0.03) != pytest.approx(found[0]["compute"], abs=0.03)


class TestReach:
    @pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
    @pytest.mark.parametrize("kv", ["retain", "evict"])
    def test_the_least_share_is_what_a_closed_router_executes(
        self, model: Any, processor: Any, rows: Dataset, kv: Any, unit: Any
    ) -> None:
        held, costs = list(batches(rows, Collator(processor), 4)), CostModel.of(model)
        attach(model, RouterConfig(kv=kv, unit=unit))
        measured = measured_share(model, held, costs, kv, threshold=99.0)
        assert least_share(held, costs, kv, unit) == pytest.approx(measured)

    def test_a_budget_that_cannot_be_met(self, model: Any, processor: Any, rows: Dataset, tmp_path: Path) -> None:
        message = (
            r"`budget`: got 0\.05, expected more than 0\.\d{3}: so much is spent when every token skips every layer "
            r"\(unit 'block', kv 'retain'\)\. A smaller share needs unit 'block' and kv 'evict'\."
        )
        with pytest.raises(InputError, match=message):
            train(model, processor, rows, plan_for(model), replace(CONFIG, more_budgets=(0.05,)), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert not model._forward_pre_hooks


def test_fp16_is_refused(model: Any, processor: Any, rows: Dataset, tmp_path: Path) -> None:
    message = r"the model's weights are fp16, and skipit does not scale losses: .* dtype=torch\.bfloat16"
    with pytest.raises(InputError, match=message):
        train(model.half(), processor, rows, plan_for(model), CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_checkpoint_in_fp16_is_trained_in_the_runs_precision(
    base: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    """As stored it would be loaded in fp16."""
    import skipit.train.run
    from skipit.cli.main import main

    copy.deepcopy(base).half().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    save_plan(plan_for(copy.deepcopy(base).half()), tmp_path / "plan")
    seen: list[torch.dtype] = []
    monkeypatch.setattr(skipit.train.run, "prepare", lambda model, *rest: seen.append(model.dtype) or 1 / 0)
    line = f"train {tmp_path}/model reference --plan {tmp_path}/plan --steps 2 --batch-size 2 --precision {precision}"
    with pytest.raises(ZeroDivisionError):
        main([*line.split(), "--calibration-samples", "4", "--out", str(tmp_path / "run")])
    assert seen == [dtype]


def test_several_budgets_take_turns(model: Any, processor: Any, rows: Dataset, tmp_path: Path) -> None:
    """Each has a threshold of its own; the gates are the same."""
    config = replace(CONFIG, budget=0.6, more_budgets=(0.4, 0.8))
    held_out = reference_dataset("calibration", 8)
    tuned = train(model, processor, rows, plan_for(model), config, tmp_path / "run", calibration=held_out)
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [figures["budget"] for figures in history] == [0.6, 0.4, 0.8] * 2
    for figures in history[3:]:
        assert figures["compute"] == pytest.approx(figures["target"], abs=0.15)
    for middle, low, high in (history[:3], history[3:]):
        assert high["threshold"] < middle["threshold"] < low["threshold"]
        assert low["compute"] < middle["compute"] < high["compute"]
    shares = json.loads((tmp_path / "run" / "run.json").read_text())["calibrated_shares"]
    assert {float(budget): share for budget, share in shares.items()} == pytest.approx(
        {budget: budget for budget in (0.6, 0.4, 0.8)}, abs=0.03
    )
    points = find_router(tuned)[1].config.operating_points
    assert points["0.8"] < points["0.6"] < points["0.4"]
    assert find_router(tuned)[1].config.threshold == points["0.6"]


class TestTime:
    """A budget in time: by what `skipit bench` measured of such layers, here of one whose time is not its FLOPs."""

    @pytest.fixture(autouse=True)
    def measured(self, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        width, linear = base.config.text_config.hidden_size, CostModel.of(base).layers[0].linear
        relative = {0: 1.1, 20: 0.8, 39: 0.7, 40: 0.1}  # by how many of 40 tokens skip
        rows = (LayerTime(40, n, kv, None, t, t) for n, t in relative.items() for kv in ("retain", "evict"))
        steps = {40: StepTime(0.5, 1.1, 0.1)}
        times = LayerTimes("a machine", "float32", width, linear, "wall time", {40: 1.0}, tuple(rows), steps)
        times.save(bench_file(torch.device("cpu"), torch.float32, width))

    def test_is_what_training_and_calibration_count(
        self, model: Any, processor: Any, rows: Dataset, tmp_path: Path
    ) -> None:
        config, held = replace(CONFIG, latency=0.85, kv="evict"), reference_dataset("calibration", 8)
        tuned = train(model, processor, rows, plan_for(model), config, tmp_path / "run", calibration=held)
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        took = record["latencies"]["latency-0.85"]
        assert took["share"] == pytest.approx(0.85, abs=0.03)
        assert took["device"] == "a machine"
        assert record["calibrated_share"] == record["calibrated_shares"]["latency-0.85"] < 0.75
        assert set(find_router(tuned)[1].config.operating_points) == {"latency-0.85"}
        history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
        assert {figures["budget"] for figures in history} == {0.85}
        # Rows of training and held-out ones are alike here.
        assert [figures["target"] for figures in history] == pytest.approx([0.85] * len(history), abs=0.03)
        assert all(0.7 < figures["compute"] <= 1.1 for figures in history)
        assert record["answered"]["latency-0.85"].keys() == {"before", "after"}

    def test_rows_of_training_may_take_longer_than_those_that_are_held_out(
        self, model: Any, processor: Any, rows: Dataset, tmp_path: Path
    ) -> None:
        """Held to the share of held-out rows they would skip more tokens than any row does that is served."""
        plan = replace(plan_for(model), decide_at=(0,))
        plan.bias[:, 0] += 2  # text runs, of which these rows have more
        config = replace(CONFIG, kv="evict", latency=0.85, steps=8)
        talks, times = reference_dataset("train", 32).map(_with_more_text), TimeModel.of(model)
        tuned = train(model, processor, talks, plan, config, tmp_path / "run", calibration=rows)
        history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
        last, held = history[-1], list(batches(rows, Collator(processor), 4))
        spent = measured_share(tuned, held, times, "evict", last["threshold"])
        assert spent == pytest.approx(0.85, abs=0.05)
        assert abs(last["target"] - 0.85) > 0.05, "these rows do differ"

    def test_a_plan_of_whole_layers_stays_as_it_is_made(
        self, model: Any, processor: Any, rows: Dataset, tmp_path: Path
    ) -> None:
        """Whatever threshold between open and closed takes as long: nothing of the time left over is spent."""
        plan = plan_for(model)
        runs = torch.arange(LAYERS) % 2 == 0
        bias = torch.where(runs, LOGIT_LIMIT, LEFT_OUT)[:, None].expand_as(plan.bias)
        plan = replace(plan, weight=torch.zeros_like(plan.weight), bias=bias)
        config = replace(CONFIG, latency=0.7, kv="retain")
        tuned = train(model, processor, rows, plan, config, tmp_path / "run", calibration=rows)
        history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
        share = float(torch.where(runs, 1.1, 0.1).mean())
        assert [figures["compute"] for figures in history] == pytest.approx([share] * len(history), abs=1e-3)
        assert {figures["threshold"] for figures in history} == {0.0}
        assert find_router(tuned)[1].config.threshold == 0
        learned = [p for name, p in tuned.named_parameters() if "lora_B" in name and p.requires_grad]
        assert any(bool(p.any()) for p in learned), "LoRA learns, with nothing that gates could save"
        # Gates that learn may move the threshold as far as it goes: a layer that is left out does not come back.
        held = list(batches(rows, Collator(processor), 4))
        assert measured_share(tuned, held, TimeModel.of(model), "retain", -LIMIT) == pytest.approx(share, abs=1e-3)

    def test_less_than_the_least(self, model: Any, processor: Any, rows: Dataset, tmp_path: Path) -> None:
        message = r"`latency`: got 0\.05, expected at least 0\.100 on this machine \(kv 'retain'\)"
        with pytest.raises(InputError, match=message):
            train(model, processor, rows, plan_for(model), replace(CONFIG, latency=0.05), tmp_path / "run")

    def test_parts_of_layers_were_not_measured(self, model: Any, processor: Any, rows: Dataset, tmp_path: Path) -> None:
        config = replace(CONFIG, latency=0.9, unit="mlp")
        with pytest.raises(InputError, match="`skipit bench` measures whole layers for prompts, got unit 'mlp'"):
            train(model, processor, rows, plan_for(model), config, tmp_path / "run")


def test_rows_may_have_several_images_or_none(model: Any, processor: Any, rows: Dataset, tmp_path: Path) -> None:
    """Batches of one row: a batch may be of text alone."""
    pictures = [image for row in rows for image in row["images"]]
    mixed = [
        {"images": pictures[:count], "prompt": "read the top row .", "completion": "1 2 3"} for count in (2, 0, 1, 0)
    ]
    train(model, processor, mixed, plan_for(model), replace(CONFIG, batch_size=1), tmp_path / "run")
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert len(history) == CONFIG.steps
    assert all(figures["ce"] > 0 and 0 < figures["compute"] < 1.01 for figures in history)


def test_tensorboard(model: Any, processor: Any, rows: Dataset, tmp_path: Path) -> None:
    """What is reported, under which names."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(CONFIG, steps=10)
    train(model, processor, rows, plan_for(model), config, tmp_path / "run", report_to="tensorboard")
    read = EventAccumulator(str(tmp_path / "run" / "logs"))
    read.Reload()
    last = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])
    for name in ("ce", "kl", "accuracy", "budget", "compute", "threshold"):
        (event,) = read.Scalars(f"train/{name}")
        assert event.value == pytest.approx(last[name], rel=1e-5), name
    rates = [
        read.Scalars(f"train/skip_rate_{modality}/layer_{layer:02}")[0].value
        for modality in ("text", "vision")
        for layer in range(LAYERS)
    ]
    assert all(0 <= rate <= 1 for rate in rates)
    assert 0 < sum(rates) < len(rates)
    assert {"train/loss", "train/grad_norm", "train/learning_rate"} <= set(read.Tags()["scalars"])


def test_the_budget_is_approached(model: Any, processor: Any, rows: Dataset, tmp_path: Path) -> None:
    """From everything runs, in few steps: the price alone moves the gates."""
    config = replace(CONFIG, steps=30, batch_size=2, gate_learning_rate=5e-2, kv="evict")
    out = tmp_path / "run"
    tuned = train(model, processor, rows, plan_for(model, bias=1.5), config, out)
    shares = [json.loads(line)["compute"] for line in (out / "history.jsonl").read_text().splitlines()]
    assert shares[0] > 0.75
    assert abs(shares[-1] - 0.5) < abs(shares[0] - 0.5)
    assert len(gated_layers(tuned)) == LAYERS
