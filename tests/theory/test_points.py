"""Gates are regressed on the state that enters their decision point, and profile and plan say which that is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IMAGE, LAYERS, ROWS, build, labelled
from torch import Tensor

from skipit.router import CheckpointError, RouterConfig, RouterConfigError, Trace, running
from skipit.router.config import KVPolicy
from skipit.router.gates import normalize
from skipit.theory.artefact import load_plan, load_profile, profile_tables, save_plan, save_profile
from skipit.theory.modes import choose_span, span_plan
from skipit.theory.plan import make_plan
from skipit.theory.profile import Profile, profile
from skipit.theory.profile_sums import POLICIES, ProfileSums
from skipit.theory.ridge import RidgeSums
from skipit.theory.states import recorded
from skipit.train.gating import attach_plan

DATA = Path(__file__).parent / "data"
BATCHES = [labelled("llava", seed=s) for s in range(2)]
POINTS = (0, 2)


@pytest.fixture(scope="module")
def measured() -> Profile:
    torch.set_num_threads(1)
    return profile(build("llava"), BATCHES, decide_at=POINTS)


def test_where_every_layer_decides_for_itself_the_numbers_are_those_of_before() -> None:
    before = load_profile(DATA / "profile-4")
    now = profile(build("llava"), BATCHES, draws=4, decide_at=None)
    assert (now.model, now.about, now.decide_at) == (before.model, before.about, before.decide_at)
    tables = profile_tables(now)
    for name, table in profile_tables(before).items():
        torch.testing.assert_close(tables[name], table, equal_nan=True, atol=1e-4, rtol=1e-3, msg=name)


def test_a_layer_is_regressed_on_the_state_that_enters_its_point(
    measured: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one regression per layer, on states that a hook saw and on what layers that decide alone learn from."""
    heard: list[tuple[int, dict[KVPolicy, Tensor]]] = []
    add = ProfileSums.add_samples

    def overheard(sums: ProfileSums, group: int, x: Tensor, signal: dict[KVPolicy, Tensor], kinds: Tensor) -> None:
        heard.append((group, signal))
        add(sums, group, x, signal, kinds)

    monkeypatch.setattr(ProfileSums, "add_samples", overheard)
    model = build("llava")
    alone = profile(model, BATCHES, decide_at=None)
    for layer in range(LAYERS):
        point = max(p for p in POINTS if p <= layer)
        for m in (0, 1):
            sums = RidgeSums.empty(measured.damage["retain"].ridge.weight.shape[-1], 2, torch.device("cpu"))
            signals = [signal for of, signal in heard if of == layer]
            for number, (batch, signal) in enumerate(zip(BATCHES, signals, strict=True)):
                with torch.no_grad(), recorded(model.get_decoder().layers) as runs:
                    model(**{k: v for k, v in batch.items() if k != "labels"})
                y = torch.cat([signal[kv] for kv in POLICIES]).movedim(0, -1)
                of_kind = ((batch["input_ids"] == IMAGE) == bool(m)) & (batch["attention_mask"] > 0)
                used = (y > 0).all(-1) & of_kind
                states = normalize(runs[point].entered.detach())
                for row in range(len(y)):
                    half = (number * len(y) + row) % 2
                    sums.add(half, states[row][used[row]], y[row][used[row]].log())
            expected = sums.solve()
            for at, kv in enumerate(POLICIES):
                for name, table in measured.damage[kv].ridge._asdict().items():
                    torch.testing.assert_close(
                        table[layer, m], getattr(expected, name)[at], equal_nan=True, atol=1e-4, rtol=1e-3, msg=name
                    )
    first, other = (p.damage["retain"].ridge.weight for p in (measured, alone))
    torch.testing.assert_close(first[0], other[0])
    assert not torch.allclose(first[1], other[1])
    assert measured.damage["retain"].tokens.equal(alone.damage["retain"].tokens)


def test_layers_over_images_cost_the_others_no_samples_and_a_point_may_be_left_out() -> None:
    """Without an image mllama leaves layer 1 out: what would enter it enters layer 2."""
    texts = [labelled("mllama", ROWS[1:2]), labelled("mllama", [ROWS[1][:-1]])]
    left_out, entered = (
        profile(build("mllama"), texts, decide_at=points).damage["evict"].ridge for points in ((0, 1), (0, 2))
    )
    assert left_out.bias[:, 0].isfinite().tolist() == [True, False, True, True]
    for one, other in zip(left_out, entered, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("kv", POLICIES)
def test_plans_carry_the_points_of_their_profile(measured: Profile, kv: KVPolicy, tmp_path: Path) -> None:
    span = span_plan(measured, choose_span(measured, kv=kv, budget=0.9), "both", kv)
    for number, plan in enumerate((*(make_plan(measured, 0.5, kv, init) for init in ("theory", "run")), span)):
        save_plan(plan, tmp_path / str(number))
        assert plan.decide_at == load_plan(tmp_path / str(number)).decide_at == POINTS


def test_gates_of_a_plan_read_what_they_were_fitted_on(measured: Profile) -> None:
    """The state that enters their point: the dense one at the first, and what skips have left at the next."""
    model, plan = build("llava"), make_plan(measured, 0.5)
    attach_plan(model, plan)
    batch = {name: value for name, value in BATCHES[0].items() if name != "labels"}
    trace, kinds = Trace(), (batch["input_ids"] == IMAGE).long()
    with torch.no_grad(), running(trace=trace), recorded(model.get_decoder().layers) as runs:
        model(**batch, use_cache=False)
    real = batch["attention_mask"].bool()
    assert not trace.steps[0].run[:2].all()
    for layer, found in enumerate(trace.steps[0].probability):
        states = normalize(runs[max(p for p in POINTS if p <= layer)].entered)
        logits = (states @ plan.weight[layer].T + plan.bias[layer]).gather(-1, kinds[..., None])[..., 0]
        torch.testing.assert_close(found[real], logits.sigmoid()[real], atol=1e-5, rtol=1e-4)


def test_points_on_disk(measured: Profile, tmp_path: Path) -> None:
    for points in (POINTS, (0,), None):
        save_profile(replace(measured, decide_at=points), tmp_path / "p", overwrite=True)
        assert load_profile(tmp_path / "p").decide_at == points
    old = load_plan(DATA / "plan-1-evict")
    assert old.decide_at is None
    assert RouterConfig.decide_at is not None  # what is new has points


@pytest.mark.parametrize("kind", ["profile", "plan"])
@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([1], r"`decide_at`: got \[1\], expected ascending layers that begin with 0"),
        ([0, LAYERS], rf"`decide_at`: got \(0, {LAYERS}\), the model has layers 0 to {LAYERS - 1}"),
        ("each", "`decide_at`: got 'each', expected ascending layers"),
    ],
)
def test_points_on_disk_that_are_none(kind: str, points: Any, message: str, measured: Profile, tmp_path: Path) -> None:
    save_profile(measured, tmp_path / "profile")
    save_plan(make_plan(measured, 0.5), tmp_path / "plan")
    load: Callable[[Path], Any] = load_profile if kind == "profile" else load_plan
    file = tmp_path / kind / f"{kind}.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"decide_at": points}))
    with pytest.raises(CheckpointError, match=f"{kind}: {message}"):
        load(tmp_path / kind)
    del values["decide_at"]
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"{kind}.json: no decide_at; the file is incomplete"):
        load(tmp_path / kind)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((), r"got \(\), expected ascending layers that begin with 0"),
        ((1, 2), r"got \(1, 2\), expected"),
        ((0, 2, 1), r"got \(0, 2, 1\), expected"),
        ((0, 9), rf"got \(0, 9\), the model has layers 0 to {LAYERS - 1}"),
    ],
)
def test_points_that_no_model_has(points: tuple[int, ...], message: str) -> None:
    with pytest.raises(RouterConfigError, match=f"`decide_at`: {message}"):
        profile(build("llava"), BATCHES, decide_at=points)
