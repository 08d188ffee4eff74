"""Plans in time: asked is what the measured table expects, units that save none run, and layers fall away whole."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from made_profiles import made_profile

from skipit.router.costs import LayerCost
from skipit.router.errors import InputError
from skipit.router.measured import bench_file
from skipit.theory.layer_times import LayerTime, LayerTimes, StepTime, times_for
from skipit.theory.plan import LEFT_OUT, LOGIT_LIMIT, Plan, make_plan
from skipit.theory.profile import Profile

COST = LayerCost(linear=1000.0, keys_values=32.0, attention=10.0, mlp=500.0, gate=1.0, kv_bytes=32, image=0.0)
DAMAGE = torch.tensor([[0.9, 0.8], [0.1, 0.2], [0.5, 0.01], [0.02, 0.03]])
STEP = StepTime(0.25, 1.1, 0.1)
TOKENS = torch.tensor([[4.0, 12.0]]).expand(4, 2)


def table(*relative: float, hidden: int = 1, linear: float = 1000.0) -> LayerTimes:
    """Times at 0, 25, 75 and 100 % of 16 tokens, the same for both policies."""
    rows = tuple(
        LayerTime(16, skipped, kv, None, 1.0, time)
        for skipped, time in zip((0, 4, 12, 16), relative, strict=True)
        for kv in ("retain", "evict")
    )
    return LayerTimes("a machine", "float32", hidden, linear, "wall time", {16: 1.0}, rows, {16: STEP})


def profile() -> Profile:
    return made_profile(COST, {"retain": DAMAGE, "evict": DAMAGE}, tokens_per_row=TOKENS)


def plan(latency: float, times: LayerTimes, answer_tokens: int = 0) -> Plan:
    return make_plan(profile(), latency, "evict", times=times, answer_tokens=answer_tokens)


EVEN = table(1.0, 0.75, 0.25, 0.0)


@pytest.mark.parametrize("latency", [0.8, 0.5, 0.3])
def test_where_time_is_flops_a_plan_in_time_is_one_in_flops(latency: float) -> None:
    in_time = plan(latency, EVEN)
    flops = make_plan(profile(), latency, "evict")
    assert in_time.about["expected_latency"] == pytest.approx(latency, abs=1e-3)
    assert in_time.budget == pytest.approx(latency, abs=1e-3)
    part = ~(in_time.run_rate == 0).all(-1)  # layers that are not left out for all
    torch.testing.assert_close(in_time.run_rate[part], flops.run_rate[part], atol=0.05, rtol=0)


def test_units_that_save_no_time_run() -> None:
    # Text, a quarter of the tokens, saves nothing by itself.
    found = plan(0.8, table(1.0, 1.05, 0.4, 0.35))
    entered = (found.run_rate != 0).any(-1)
    assert (found.run_rate[entered][:, 0] == 1).all()
    assert (found.bias[entered][:, 0] == LOGIT_LIMIT).all()
    assert (found.run_rate[:, 1] < 1).any()
    assert found.about["expected_latency"] == pytest.approx(0.8, abs=0.01)


def test_where_only_a_layer_that_nobody_runs_saves_time_layers_are_left_out_least_damage_first() -> None:
    times = table(1.05, 1.6, 1.1, 0.1)
    for latency, kept in ((1.0, [0, 1, 2]), (0.6, [0, 2]), (0.35, [0])):
        found = plan(latency, times)
        runs = torch.zeros(4, dtype=torch.bool)
        runs[kept] = True
        assert torch.equal(found.run_rate, runs.float()[:, None].expand(4, 2))
        assert torch.equal(found.bias, torch.where(runs, LOGIT_LIMIT, LEFT_OUT)[:, None].expand(4, 2))
        assert not found.weight.any()
        assert found.about["expected_latency"] == pytest.approx((1.05 * len(kept) + 0.1 * (4 - len(kept))) / 4)
        assert found.about["expected_latency"] <= latency


def test_a_plan_for_an_answer_leaves_layers_out_of_which_a_prompt_saves_little() -> None:
    # Where time is FLOPs a prompt needs no layer left out; of an answer nothing else saves anything.
    prompt, answer = plan(0.9, EVEN), plan(0.9, EVEN, answer_tokens=40)
    assert not prompt.left_out
    assert answer.left_out == [3], "the layer that does least damage"
    about = answer.about
    assert about["answer"]["tokens"] == 40
    assert about["answer"]["latency"] == 0.9
    entered = 4 - len(answer.left_out)
    step = STEP.entered * entered + STEP.left_out * (4 - entered)
    # A prompt takes 1 ms in each of four layers, the answer 40 steps of 0.25 ms.
    taken = (4 * about["expected_latency"] + 40 * STEP.ms * step) / (4 + 4 * 40 * STEP.ms)
    assert about["answer"]["expected_latency"] == pytest.approx(taken)
    assert taken <= 0.9
    # What follows (training, calibration) holds the prompt's share; layers left out stay so by themselves.
    assert answer.latency == pytest.approx(about["expected_latency"], abs=1e-3)


def test_the_longer_the_answer_the_more_layers_are_left_out() -> None:
    found = [plan(0.6, EVEN, tokens).left_out for tokens in (0, 4, 16, 64)]
    assert [len(out) for out in found] == sorted(len(out) for out in found)
    assert len(found[-1]) > len(found[0])
    for shorter, longer in pairwise(found):
        assert set(shorter) <= set(longer), "least damage first"


@pytest.mark.parametrize("tokens", [-1, 8])
def test_tokens_of_an_answer_without_times_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"`answer_tokens`: got {tokens}, expected 0 or more"):
        make_plan(profile(), 0.5, "evict", answer_tokens=tokens)


def test_what_cannot_be_reached_is_refused_with_the_least_that_can() -> None:
    with pytest.raises(InputError, match=r"`latency`: got 0\.05, expected at least 0\.100 on this machine"):
        plan(0.05, table(1.05, 1.6, 1.1, 0.1))


def test_times_are_found_by_width_and_dtype_and_must_be_of_such_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPIT_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"nothing was measured of layers 1 wide on this machine.*skipit bench MODEL"):
        times_for(profile().costs, 1)
    two_bytes, four_bytes = (bench_file(torch.device("cpu"), d, 1) for d in (torch.bfloat16, torch.float32))
    table(1, 1, 1, 1).save(four_bytes)
    with pytest.raises(InputError, match="nothing was measured"):
        times_for(profile().costs, 1)  # its keys and values take two bytes a number
    table(1, 1, 1, 1, linear=2000.0).save(two_bytes)
    with pytest.raises(InputError, match="layers that spend 2000 FLOPs per token, this model's spend 1000"):
        times_for(profile().costs, 1)
    EVEN.save(two_bytes)
    assert times_for(profile().costs, 1) == EVEN
