"""A profile measures what it says, a plan spends what it may, and both survive the disk."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tiny_models import ANSWER, FAMILIES, IMAGE, LAYERS, ROWS, WIDTH, TokenTable, build, labelled
from torch import Tensor

from skipit.router import (
    CheckpointError,
    DecoderNotFoundError,
    FixedUnits,
    InputError,
    RouterConfig,
    Trace,
    attach,
    find_router,
    running,
    set_gates,
)
from skipit.router.call import KWARG, Dense
from skipit.router.config import KVPolicy
from skipit.router.folders import save_tensors
from skipit.theory import calibrate as theory_calibrate
from skipit.theory.artefact import (
    check_same_model,
    load_plan,
    load_profile,
    profile_tables,
    save_plan,
    save_profile,
)
from skipit.theory.calibrate import calibrate, measured_share
from skipit.theory.cost import CostModel
from skipit.theory.damage import apart_output
from skipit.theory.identity import fingerprint
from skipit.theory.plan import Plan, allocate, make_plan, skip_set
from skipit.theory.profile import Profile, profile
from skipit.theory.profile_sums import ProfileSums
from skipit.theory.states import recorded

# What no draw of an answer has a part in.
EXACT = ("geometric", "update", "histogram", "count", "keys", "tokens_per_row", "var_text", "var_last")
NO_DAMAGE = tuple(f"ridge_{name}_{kv}" for name in ("bias", "mean", "std", "r2") for kv in ("retain", "evict"))
DATA = Path(__file__).parent / "data"
KV = pytest.mark.parametrize("kv", ["retain", "evict"])


def prompts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


@torch.no_grad()
def log_probabilities(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with running(**options):
        return torch.log_softmax(model(**prompts(batch)).logits[:, :-1], dim=-1)


def divergence(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """KL(full || skipping) per answer token, for every row."""
    full = log_probabilities(model, batch, mode="dense")
    skipping = log_probabilities(model, batch, **options)
    answer = batch["labels"][:, 1:] != -100
    return ((full.exp() * (full - skipping)).sum(-1) * answer).sum(-1) / answer.sum(-1)


def unit_divergences(model: Any, batches: list[dict[str, Tensor]], kv: str) -> Tensor:
    """KL per answer token when one unit skips, over the rows that have the unit: [layers, modalities]."""
    table = torch.zeros(LAYERS, 2)
    for layer, m in itertools.product(range(LAYERS), range(2)):
        run = torch.ones(LAYERS, 2, dtype=torch.bool)
        run[layer, m] = False
        rows = []
        for batch in batches:
            has = ((batch["input_ids"] == IMAGE) == bool(m)).logical_and(batch["attention_mask"] > 0).any(-1)
            rows.append(divergence(model, batch, policy=FixedUnits(run), kv=kv)[has])
        table[layer, m] = torch.cat(rows).mean()
    return table


def _same_tables(a: Profile, b: Profile) -> None:
    """Equal to rounding: draws and halves belong to rows, not to batches."""
    right = profile_tables(b)
    for name, table in profile_tables(a).items():
        tolerance = {"atol": 1e-5, "rtol": 1e-4} if name in EXACT else {"atol": 1e-3, "rtol": 1e-2}
        torch.testing.assert_close(
            table, right[name], equal_nan=True, **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(scope="module")
def measured() -> Profile:
    torch.set_num_threads(1)
    return profile(build("llava"), [labelled("llava", seed=s) for s in range(2)], draws=8)


class TestProfile:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_tables(self, family: str) -> None:
        model = build(family)
        result = profile(model, [labelled(family, seed=s) for s in range(2)], draws=2)
        rows = {"rows": 6, "skipped_rows": 0, "skipped_row_numbers": []}
        assert result.about == {**rows, "draws": 2, "temperature": 1.0, "seed": 0}
        assert result.model == fingerprint(model)
        assert result.costs == CostModel.of(model)
        for name, table in profile_tables(result).items():
            assert table.shape[0] == LAYERS
            bad = ~table.isfinite()
            # No answer attends to what vision tokens do in the last layer, so there is no logarithm to regress under
            # `retain`, and `evict` learns from the same tokens.
            assert not bad.any() or (name in NO_DAMAGE and bad.nonzero().tolist() == [[LAYERS - 1, 1]]), name
        batch = labelled(family)
        vision = batch["input_ids"] == IMAGE
        real = batch["attention_mask"].bool()
        counts = torch.stack([(real & ~vision).sum(), vision.sum()]) * 2
        assert torch.equal(result.count.long(), counts.expand(LAYERS, -1))
        assert torch.equal(result.histogram.sum(-1).long(), counts.expand(LAYERS, -1))
        places = real.cumsum(-1).double()
        keys = torch.stack([places[real & ~vision].mean(), places[vision].mean()])
        torch.testing.assert_close(result.keys, keys.expand(LAYERS, -1))
        rows = torch.tensor([3.0, float(vision.any(-1).sum())])  # per batch; one row has no image
        torch.testing.assert_close(result.tokens_per_row, (counts / 2 / rows).double().expand(LAYERS, -1))
        retain, evict = result.damage["retain"], result.damage["evict"]
        for table in (retain.unit, evict.unit, retain.tokens, evict.tokens):
            assert (table >= 0).all()
        assert retain.unit[-1, 1] == retain.tokens[-1, 1] == 0
        assert min(evict.unit[-1, 1], evict.tokens[-1, 1]) > 0
        for table in (result.var_text, result.var_last):
            assert ((table > 0) & (table < 1)).all()

    def test_the_model_is_left_as_it_was(self) -> None:
        model, batch = build("llava").train(), labelled("llava")
        before = {name: type(module) for name, module in model.named_modules()}
        profile(model, [batch], draws=1)
        assert model.training
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert not model._forward_pre_hooks
        assert all(p.grad is None for p in model.parameters())

    def test_gates_are_ignored_and_kept(self) -> None:
        model, batch = build("llava"), labelled("llava")
        dense = profile(model, [batch], draws=1)
        attach(model)
        set_gates(model, torch.randn(LAYERS, 2, WIDTH), torch.randn(LAYERS, 2))
        ours = profile(model, [batch], draws=1)
        find_router(model)
        assert ours.model == dense.model
        got = profile_tables(ours)
        assert all(torch.equal(got[k], v) or v.isnan().any() for k, v in profile_tables(dense).items())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_padding_changes_nothing(self, family: str) -> None:
        model = build(family)
        left, right = (profile(model, [labelled(family, padding=side)], draws=2) for side in ("left", "right"))
        _same_tables(left, right)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_batch_size_changes_nothing(self, family: str) -> None:
        model, batch = build(family), labelled(family)
        together = profile(model, [batch], draws=1)
        alone = profile(model, [labelled(family, [row]) for row in ROWS], draws=1)
        _same_tables(alone, together)

    @pytest.mark.parametrize("padding", ["left", "right"])
    def test_attention_to_vision(self, padding: str) -> None:
        model, batch = build("llava", attention="eager"), labelled("llava", padding=padding)
        measured = profile(model, [batch], draws=1)
        with torch.no_grad():
            weights = model(**prompts(batch), output_attentions=True).attentions
        vision = batch["input_ids"] == IMAGE
        real = batch["attention_mask"].bool()
        for layer, attention in enumerate(weights):
            mass = (attention.mean(1) * vision[:, None]).sum(-1)
            text, last = [], []
            for row in range(3):
                if not vision[row].any():
                    continue
                sees = (vision[row].cumsum(0) > 0) & real[row] & ~vision[row]
                text.append(mass[row][sees].mean())
                last.append(mass[row][real[row].nonzero()[-ANSWER - 1, 0]])
            torch.testing.assert_close(measured.var_text[layer].float(), torch.stack(text).mean())
            torch.testing.assert_close(measured.var_last[layer].float(), torch.stack(last).mean())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_damage_ranks_units_as_skipping_them_does(self, family: str) -> None:
        model, batches = build(family), [labelled(family, seed=s) for s in range(4)]
        measured = profile(model, batches, draws=32, temperature=1.0)
        attach(model)
        for kv in ("retain", "evict"):
            real_damage = unit_divergences(model, batches, kv)
            assert spearmanr(measured.damage[kv].unit.flatten(), real_damage.flatten())[0] > 0.8

    @KV
    def test_damage_of_single_tokens_ranks_units_as_skipping_them_does(self, kv: str) -> None:
        model, batch = build("llava"), labelled("llava", ROWS[:1])
        damage = profile(model, [batch], draws=48, temperature=1.0).damage[kv].tokens
        attach(model)
        length = batch["input_ids"].shape[1]
        real_damage = torch.zeros(LAYERS, 2)
        for layer, place in itertools.product(range(LAYERS), range(length)):
            run = torch.ones(LAYERS, length, 2, dtype=torch.bool)
            run[layer, place] = False
            m = int(batch["input_ids"][0, place] == IMAGE)
            real_damage[layer, m] += divergence(model, batch, policy=TokenTable(run), kv=kv)[0]
        assert spearmanr(damage.flatten(), real_damage.flatten())[0] > 0.8

    @pytest.mark.parametrize("family", [*FAMILIES, "mllama"])
    @pytest.mark.parametrize("m", [0, 1])
    def test_the_output_after_eviction_is_exact(self, family: str, m: int) -> None:
        model, batch = build(family), prompts(labelled(family))
        layers = model.get_decoder().layers
        with recorded(layers) as dense:
            model(**batch, use_cache=False)
        attach(model)
        real, modality = batch["attention_mask"].bool(), (batch["input_ids"] == IMAGE).long()
        chosen = (modality == m) & real
        for layer in range(LAYERS):
            run = torch.ones(LAYERS, 2, dtype=torch.bool)
            run[layer, m] = False
            with running(policy=FixedUnits(run), kv="evict", mode="masked"), recorded(layers) as skipping:
                model(**batch, use_cache=False)
            entered = dense[layer].entered.detach()
            kwargs = {**dense[layer].kwargs, KWARG: Dense()}  # by itself, and for every token
            apart = apart_output(layers[layer], entered, kwargs, modality.masked_fill(~real, -1))
            got = torch.where(chosen[..., None], entered, apart)
            torch.testing.assert_close(got[real], skipping[layer].left[real], atol=1e-4, rtol=1e-4)

    def test_a_layer_that_attends_to_images(self) -> None:
        """Nothing can be evicted from it, and rows that do not have it say nothing about it."""
        model, batch = build("mllama"), labelled("mllama")
        found = profile(model, [batch], draws=2)
        retain, evict = found.damage["retain"], found.damage["evict"]
        assert found.var_text[1] == found.var_last[1] == 1
        assert ((found.var_text > 0) & (found.var_text < 1)).tolist() == [True, False, True, True]
        torch.testing.assert_close(retain.unit[1], evict.unit[1])
        torch.testing.assert_close(retain.tokens[1], evict.tokens[1])
        assert found.keys[1].tolist() == [batch["cross_attention_mask"][0, 0].numel() * 5] * 2
        alone = profile(model, [batch, labelled("mllama", ROWS[1:2])], draws=2)
        for name in EXACT:
            torch.testing.assert_close(getattr(alone, name)[1], getattr(found, name)[1], msg=name)
        assert (alone.count - found.count)[:, 0].tolist() == [6, 0, 6, 6]
        without = profile(model, [labelled("mllama", ROWS[1:2])])
        assert without.damage["retain"].unit[:, 0].isfinite().tolist() == [True, False, True, True]
        for measured in (found, alone, without):
            for kv in ("retain", "evict"):
                plan = make_plan(measured, 0.6, kv)  # type: ignore[arg-type]
                assert plan.bias.isfinite().all()
                assert skip_set(measured, 0.6, kv).any()  # type: ignore[arg-type]

    def test_a_row_that_is_not_finite_is_left_out_and_counted(self) -> None:
        model = build("llava")
        good = labelled("llava", ROWS[:2])
        bad = labelled("llava", [*ROWS[:2], ROWS[0]])
        bad["pixel_values"][0], bad["pixel_values"][1] = good["pixel_values"][0], torch.nan
        tables, result = profile_tables(profile(model, [good], draws=1)), profile(model, [bad], draws=1)
        assert (result.about["rows"], result.about["skipped_row_numbers"]) == (2, [2])
        for name in EXACT:
            torch.testing.assert_close(getattr(result, name), tables[name], atol=1e-6, rtol=1e-5)
        for name, table in profile_tables(result).items():
            assert torch.equal(table.isfinite(), tables[name].isfinite()), name

    def test_a_model_without_vision_rows(self) -> None:
        found = profile(build("llava"), [labelled("llava", ROWS[1:2])], draws=1)
        assert found.damage["retain"].unit[:, 1].isnan().all()
        assert found.damage["retain"].unit[:, 0].isfinite().all()
        assert found.var_text.isnan().all()

    @pytest.mark.parametrize("kv", ["retain", "evict"])
    def test_a_typical_token(self, kv: KVPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        """A power mean over all tokens of a unit, whatever their batch; those that nothing depends on count as zero."""
        heard: list[tuple[int, dict[KVPolicy, Tensor], Tensor]] = []
        add = ProfileSums.add_tokens

        def overheard(sums: ProfileSums, layer: int, damage: dict[KVPolicy, Tensor], kinds: Tensor) -> None:
            heard.append((layer, {kv: of.clone() for kv, of in damage.items()}, kinds))
            add(sums, layer, damage, kinds)

        monkeypatch.setattr(ProfileSums, "add_tokens", overheard)
        found = profile(build("llava"), [labelled("llava"), labelled("llava", seed=1)], draws=2).damage[kv]
        for layer, m in [(0, 0), (0, 1), (LAYERS - 1, 0), (LAYERS - 1, 1)]:
            damages = torch.cat([of[kv][kinds == m] for at, of, kinds in heard if at == layer])
            torch.testing.assert_close(found.typical[layer, m], damages.sqrt().sqrt().mean().pow(4))

    def test_named_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, batch = build("llava"), labelled("llava")
        expected = profile(model, [batch], draws=1)
        monkeypatch.setattr(type(model), "get_decoder", lambda self: self.lm_head)
        with pytest.raises(DecoderNotFoundError):
            profile(model, [batch], draws=1)
        got = profile(model, [batch], draws=1, layers="model.language_model.layers")
        assert got.model == expected.model
        assert torch.equal(got.damage["evict"].unit, expected.damage["evict"].unit)

    def test_errors(self) -> None:
        model, batch = build("llava"), labelled("llava")
        message = r"batch 1: every row needs `labels` with at least one answer token \(not -100\)"
        with pytest.raises(InputError, match=message):
            profile(model, [batch, prompts(batch)])
        unanswered = {**batch, "labels": batch["labels"].clone()}
        unanswered["labels"][1] = -100
        with pytest.raises(InputError, match=message):
            profile(model, [batch, unanswered])
        with pytest.raises(InputError, match="the profile got no batch; expected at least one row with labels"):
            profile(model, [])
        torch.nn.init.constant_(model.lm_head.weight, torch.inf)
        with pytest.raises(InputError, match="the profile got 3 rows, none of which gave finite states and logits"):
            profile(model, [batch])


def spent(result: Profile, run: Tensor, kv: str) -> float:
    """Expected share of dense FLOPs when units run with some probability."""
    linear, kept, pair = (result.costs.column(name)[:, None] for name in ("linear", "keys_values", "attention"))
    tokens, keys = result.tokens_per_row, result.keys
    dense = tokens * (linear + pair * keys)
    skipped = tokens * (kept if kv == "retain" else 0)
    return float((run * dense + (1 - run) * skipped).sum() / dense.sum())


class TestPlan:
    @KV
    @pytest.mark.parametrize("init", ["theory", "theory-bias"])
    @pytest.mark.parametrize("budget", [0.3, 0.5, 0.8, 1.0])
    def test_expected_compute_is_the_budget(self, measured: Profile, budget: float, kv: str, init: Any) -> None:
        plan = make_plan(measured, budget, kv, init)  # type: ignore[arg-type]
        assert spent(measured, plan.run_rate.double(), kv) == pytest.approx(budget, abs=1e-3)
        assert (plan.budget, plan.kv, plan.init, plan.model) == (budget, kv, init, measured.model)
        assert plan.about["rows"] == 6
        for tensor in (plan.weight, plan.bias, plan.run_rate):
            assert tensor.dtype == torch.float32
            assert tensor.isfinite().all()
        assert ((plan.run_rate >= 0) & (plan.run_rate <= 1)).all()
        assert (init == "theory") == bool(plan.weight.any())

    @KV
    def test_dearer_compute_runs_less(self, measured: Profile, kv: str) -> None:
        rates = [make_plan(measured, b, kv).run_rate for b in (0.3, 0.5, 0.8)]  # type: ignore[arg-type]
        assert (rates[0] <= rates[1]).all()
        assert (rates[1] <= rates[2]).all()

    def test_below_what_keys_and_values_cost_everything_skips(self, measured: Profile) -> None:
        floor = spent(measured, torch.zeros(LAYERS, 2).double(), "retain")
        assert make_plan(measured, floor / 2, "retain").run_rate.max() < 1e-6
        assert spent(measured, torch.zeros(LAYERS, 2).double(), "evict") == 0

    @KV
    def test_gates_decide_as_expected_on_dense_states(self, measured: Profile, kv: str) -> None:
        """The rate is a normal approximation, so it is close and no more."""
        model = build("llava")
        attach(model)
        plan = make_plan(measured, 0.5, kv)  # type: ignore[arg-type]
        set_gates(model, plan.weight, plan.bias)
        ran, total = torch.zeros(LAYERS, 2), torch.zeros(LAYERS, 2)
        for seed in range(2):
            batch = prompts(labelled("llava", seed=seed))
            modality, real = (batch["input_ids"] == IMAGE).long(), batch["attention_mask"].bool()
            with torch.no_grad(), running(mode="dense"), recorded(model.get_decoder().layers) as runs:
                model(**batch, use_cache=False)
            for layer, module in enumerate(model.get_decoder().layers):
                run = module.layer_gate(runs[layer].entered.detach(), modality) > 0
                for m in range(2):
                    chosen = real & (modality == m)
                    ran[layer, m] += run[chosen].sum()
                    total[layer, m] += chosen.sum()
        assert spent(measured, (ran / total).double(), kv) == pytest.approx(0.5, abs=0.15)

    def test_other_inits(self, measured: Profile) -> None:
        for init, bias, rate in (("zero", 0.0, 0.5), ("run", 4.0, 1.0)):
            plan = make_plan(measured, 0.5, "retain", init)  # type: ignore[arg-type]
            assert not plan.weight.any()
            assert (plan.bias == bias).all()
            assert (plan.run_rate == rate).all()

    def test_sharpness_scales_the_logits(self, measured: Profile) -> None:
        one, two = make_plan(measured, 0.5), make_plan(measured, 0.5, sharpness=2.0)
        torch.testing.assert_close(two.weight, 2 * one.weight)
        torch.testing.assert_close(two.bias, 2 * one.bias)
        assert torch.equal(two.run_rate, one.run_rate)

    def test_units_without_tokens_run(self) -> None:
        text_only = profile(build("llava"), [labelled("llava", ROWS[1:2])], draws=2)
        for kv in ("retain", "evict"):
            plan = make_plan(text_only, 0.5, kv)  # type: ignore[arg-type]
            assert plan.bias.isfinite().all()
            assert (plan.bias[:, 1] > 0).all()
            assert (plan.run_rate[:, 1] == 1).all()
            assert skip_set(text_only, 0.5, kv)[:, 1].all()  # type: ignore[arg-type]

    @pytest.mark.parametrize("budget", [0, -0.5, 1.01, float("nan"), "0.5", None])
    def test_budgets(self, measured: Profile, budget: Any) -> None:
        message = (
            rf"`budget`: got {budget!r}, expected a number in \(0, 1\]: the share of the dense decoder's FLOPs to spend"
        )
        with pytest.raises(ValueError, match=message):
            make_plan(measured, budget)
        with pytest.raises(ValueError, match=message):
            allocate(torch.ones(1, 2), torch.ones(1, 2), 0.0, 2.0, budget)

    def test_unknown_init(self, measured: Profile) -> None:
        with pytest.raises(ValueError, match="`init`: got 'best', expected one of theory, theory-bias, zero, run"):
            make_plan(measured, 0.5, init="best")  # type: ignore[arg-type]

    @KV
    def test_skip_set(self, measured: Profile, kv: str) -> None:
        assert skip_set(measured, 1.0, kv).all()  # type: ignore[arg-type]
        some = skip_set(measured, 0.5, kv)  # type: ignore[arg-type]
        assert 0 < some.sum() < some.numel()
        assert spent(measured, some.double(), kv) == pytest.approx(0.5, abs=0.15)
        damage = measured.damage[kv].unit / measured.costs.saving(measured.keys, kv)  # type: ignore[index, arg-type]
        per_flop = damage / measured.tokens_per_row
        assert per_flop[some].min() >= per_flop[~some].max()


@st.composite
def instances(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    size = draw(st.integers(1, 3))
    numbers = st.lists(st.floats(0.01, 100), min_size=2 * size, max_size=2 * size)
    damage, cost = (torch.tensor(draw(numbers), dtype=torch.float64).view(size, 2) for _ in range(2))
    return damage, cost, draw(st.floats(0.01, 1.0))


class TestAllocate:
    @given(instances())
    @settings(max_examples=60, deadline=None)
    def test_greedy_is_the_best_there_is(self, instance: tuple[Tensor, Tensor, float]) -> None:
        """The relaxed knapsack's best is at a corner: whole units and one that runs in part."""
        damage, cost, budget = instance
        run, price = allocate(damage, cost, 0.0, float(cost.sum()), budget)
        wanted = budget * cost.sum()
        torch.testing.assert_close((run * cost).sum(), wanted, rtol=1e-5, atol=0)
        best = torch.inf
        d, c = damage.flatten().tolist(), cost.flatten().tolist()
        for whole in itertools.product([0, 1], repeat=len(d)):
            left = float(wanted) - sum(w * x for w, x in zip(whole, c, strict=True))
            if left < -1e-9:
                continue
            lost = sum(x for w, x in zip(whole, d, strict=True) if not w)
            parts = [min(1.0, left / c[i]) * d[i] for i, w in enumerate(whole) if not w]
            best = min(best, lost - max(parts, default=0.0))
        assert float(((1 - run) * damage).sum()) <= best + 1e-4 * float(damage.sum())
        ratio = damage / cost
        assert (run[ratio > price * (1 + 1e-9)] == 1).all()
        assert (run[ratio < price * (1 - 1e-9)] == 0).all()

    def test_floor(self) -> None:
        damage, cost = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 4.0]])
        assert allocate(damage, cost, 2.0, 10.0, 0.6)[0].tolist() == [[0.0, 1.0]]
        assert allocate(damage, cost, 2.0, 10.0, 0.1)[0].tolist() == [[0.0, 0.0]]
        assert allocate(damage, cost, 2.0, 10.0, 1.0)[0].tolist() == [[1.0, 1.0]]

    def test_units_without_tokens(self) -> None:
        damage, cost = torch.tensor([[1.0, torch.nan]]), torch.tensor([[4.0, 0.0]])
        assert allocate(damage, cost, 0.0, 4.0, 0.5)[0].tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("kv", ["retain", "evict"])
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3"])
def test_gates_that_decide_once_say_beforehand_what_every_threshold_spends(
    family: str, kv: Any, granularity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured by running it, to the last token; so a budget is met in two passes, one of which enters no layer."""
    model, costs = build(family), CostModel.of(build(family))
    attach(model, RouterConfig(kv=kv, granularity=granularity))
    batches = [labelled(family), labelled(family, padding="left", seed=1)]
    foretold = theory_calibrate.shares_of(model, batches, costs, kv)
    for threshold in (-1.0, 0.0, 0.3, 1.0):
        assert foretold(threshold) == measured_share(model, batches, costs, kv, threshold)
    passes: list[float] = []
    measured = theory_calibrate.measured_share
    monkeypatch.setattr(theory_calibrate, "measured_share", lambda *a, **k: passes.append(0.0) or measured(*a, **k))
    calibrate(model, batches, costs, 0.6, kv)
    assert len(passes) == 1


class TestCalibrate:
    @KV
    def test_the_budget_is_met_as_measured(self, kv: str) -> None:
        model = build("llava")
        attach(model)
        set_gates(model, torch.randn(LAYERS, 2, WIDTH), torch.zeros(LAYERS, 2))
        batches = [labelled("llava", seed=s) for s in range(8)]
        costs = CostModel.of(model)
        threshold, share = calibrate(model, batches, costs, 0.6, kv, tolerance=0.01)  # type: ignore[arg-type]
        assert share == pytest.approx(0.6, abs=0.03)
        assert measured_share(model, batches, costs, kv, threshold) == share  # type: ignore[arg-type]
        router = find_router(model)[1]
        config = router.config = router.config.with_point(0.6, threshold, default=True)
        assert config.threshold == config.threshold_at(0.6) == threshold
        trace = Trace()
        with running(budget=0.6, trace=trace, kv=kv), torch.no_grad():
            model(**prompts(batches[0]))
        assert not trace.steps[0].run.all()

    def test_a_budget_of_one_is_met_exactly(self) -> None:
        model, costs = build("llava"), CostModel(())
        attach(model)
        assert calibrate(model, [], costs, 1.0, "retain") == (find_router(model)[1].config.threshold_at(1.0), 1.0)

    def test_budget(self) -> None:
        with pytest.raises(ValueError, match="`budget`: got 2"):
            calibrate(build("llava"), [], CostModel(()), 2, "retain")


class TestOnDisk:
    def test_profile(self, measured: Profile, tmp_path: Path) -> None:
        save_profile(measured, tmp_path / "p")
        loaded = load_profile(tmp_path / "p")
        assert (loaded.costs, loaded.model, loaded.about) == (measured.costs, measured.model, measured.about)
        tables = profile_tables(loaded)
        for name, table in profile_tables(measured).items():
            assert torch.equal(tables[name].nan_to_num(7.0), table.nan_to_num(7.0))
            assert tables[name].dtype == table.dtype
        written = json.loads((tmp_path / "p" / "profile.json").read_text())
        assert written["tables"]["count"] == measured.count.tolist()
        assert written["tables"]["ridge_r2_retain"][LAYERS - 1][1] is None  # NaN is no JSON
        assert written["made_by"]["versions"]["torch"] == torch.__version__.partition("+")[0]

    @pytest.mark.parametrize(("kv", "skipped"), [("retain", [3, 4, 5, 6, 7]), ("evict", [4, 5, 6, 7])])
    def test_a_profile_gives_the_plan_that_it_gave(self, kv: KVPolicy, skipped: list[int]) -> None:
        loaded, before = load_profile(DATA / "profile-4"), load_plan(DATA / f"plan-2-{kv}")
        after = make_plan(loaded, before.budget, kv, before.init)  # type: ignore[arg-type]
        for name in ("weight", "bias", "run_rate"):
            torch.testing.assert_close(getattr(after, name), getattr(before, name))
        assert after.about == {**before.about, "log_price": pytest.approx(before.about["log_price"])}
        assert (~skip_set(loaded, before.budget, kv)).flatten().nonzero()[:, 0].tolist() == skipped

    def test_a_profile_without_one_of_its_tables(self, measured: Profile, tmp_path: Path) -> None:
        save_profile(measured, tmp_path / "p")
        tables = {name: table for name, table in profile_tables(measured).items() if name != "ridge_bias_evict"}
        save_tensors(tmp_path / "p" / "profile.safetensors", tables)
        with pytest.raises(CheckpointError, match="its safetensors have no 'ridge_bias_evict'; the file"):
            load_profile(tmp_path / "p")

    def test_plan(self, measured: Profile, tmp_path: Path) -> None:
        plan = make_plan(measured, 0.5, "evict")
        save_plan(plan, tmp_path / "p")
        loaded = load_plan(tmp_path / "p")
        for name in ("weight", "bias", "run_rate"):
            assert torch.equal(getattr(loaded, name), getattr(plan, name))
        assert replace(loaded, weight=plan.weight, bias=plan.bias, run_rate=plan.run_rate) == plan

    @pytest.mark.parametrize("kind", ["profile", "plan"])
    def test_errors(self, kind: str, measured: Profile, tmp_path: Path) -> None:
        folder = tmp_path / "p"

        def save(**options: bool) -> None:
            if kind == "profile":
                save_profile(measured, folder, **options)
            else:
                save_plan(make_plan(measured, 0.5), folder, **options)

        load: Callable[[Path], Any] = load_profile if kind == "profile" else load_plan
        file, tensors = folder / f"{kind}.json", folder / f"{kind}.safetensors"

        def refused(message: str) -> None:
            with pytest.raises(CheckpointError, match=f"^{re.escape(str(folder))}.*{message}"):
                load(folder)

        refused(": no such file or folder")
        folder.mkdir()
        refused(f"is not a {kind}: it has no {kind}.json")
        folder.rmdir()
        save()
        with pytest.raises(CheckpointError, match="pass --overwrite"):
            save()
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"version": 99}))
        refused(rf"{kind}.json: got version 99, this skipit reads [\d to]+: another .* wrote it. {kind.title()} again")
        file.write_text(json.dumps({k: v for k, v in values.items() if k != "model"}))
        refused(f"{kind}.json: no model; the file is incomplete")
        file.write_text("{")
        refused(f"{kind}.json is not readable JSON")
        save(overwrite=True)
        tensors.unlink()
        refused(f"{kind}.safetensors does not exist")
        tensors.write_bytes(b"x")
        refused(f"{kind}.safetensors is not a readable safetensors file")
        save(overwrite=True)
        load(folder)
        if kind == "profile":
            file.write_text(json.dumps(values | {"costs": [{"linear": 1.0}]}))
        else:
            save_tensors(tensors, {"weight": torch.zeros(1)})
        refused("its files do not belong together or are damaged: .*missing")

    def test_a_profile_of_before_costs_knew_the_mlp(self, measured: Profile, tmp_path: Path) -> None:
        save_profile(measured, tmp_path / "p")
        file = tmp_path / "p" / "profile.json"
        values = json.loads(file.read_text())
        costs = [{name: cost for name, cost in layer.items() if name != "mlp"} for layer in values["costs"]]
        file.write_text(json.dumps(values | {"version": 1, "costs": costs}))
        message = "got version 1, this skipit reads 4: another version of skipit wrote it. Profile again: `skipit prof"
        with pytest.raises(CheckpointError, match=message):
            load_profile(tmp_path / "p")

    def test_another_model(self, measured: Profile) -> None:
        check_same_model(measured, measured.model)
        plan = make_plan(measured, 0.5)
        for artefact, kind in ((measured, "profile"), (plan, "plan")):
            message = (
                f"the {kind} was made for a model with fingerprint {measured.model}, this model has abc. Profile this"
            )
            with pytest.raises(CheckpointError, match=message):
                check_same_model(artefact, "abc")


class TestFingerprint:
    def test_another_model(self) -> None:
        prints = [fingerprint(build(family, seed)) for family in FAMILIES for seed in range(2)]
        assert len(set(prints)) == len(prints)
        assert fingerprint(build("llava")) == prints[0]

    def test_gates_and_lora_do_not_count(self) -> None:
        from peft import LoraConfig, get_peft_model

        model = build("qwen2.5-vl")
        expected = fingerprint(model)
        attach(model)
        assert fingerprint(model) == expected
        targets = ["q_proj", "k_proj", "o_proj", "gate_proj"]
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["layer_gate"]))
        assert fingerprint(tuned, "base_model.model.model.language_model.layers") == expected
        assert fingerprint(model) == expected

    def test_a_changed_weight_counts(self) -> None:
        model = build("llava")
        expected = fingerprint(model)
        with torch.no_grad():
            model.get_decoder().layers[2].mlp.up_proj.weight[0, 0] += 1
        assert fingerprint(model) != expected

    def test_without_weights(self) -> None:
        with torch.device("meta"):
            assert len(fingerprint(build("llava"))) == 16


def test_a_plan_holds_what_it_is_given() -> None:
    plan = Plan(torch.zeros(1, 2, 3), torch.zeros(1, 2), 0.5, "retain", "run", "x", torch.ones(1, 2))
    assert plan.about == {}
