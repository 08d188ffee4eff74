"""What gates cost beside arithmetic is bounded: kernels that a layer launches, and how often the host waits.

The rule by which they are counted is in `scripts/studies/counts.py`, and what each kernel is for that the dense layer
does not have in its `LAYER`; docs/benchmarks.md has the table.
"""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from families import ROWS, build, inputs
from torch import Tensor

from skipit.router import RouterConfig, attach
from skipit.router.config import KVPolicy
from studies import counts
from studies.counts import OUTSIDE, count_calls, counting, models
from studies.shapes import prompt

POLICIES = get_args(KVPolicy)
# Launches that a layer has more than the dense one where some of the tokens run it. In a batch under `evict` rows hold
# different keys: queries, keys and values are put into rows, and what attention gives is taken out of them.
MOST = {("retain", 1): 8, ("evict", 1): 6, ("retain", 4): 8, ("evict", 4): 13}
MOST_IN_A_STEP = 21  # for a batch under `evict`: a mask of the keys that each row has comes on top
POINTS = ((0,), (0, 1, 2), None)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, int, str], dict[str, Any]]:
    return {(row["call"], row["batch"], row["way"]): row for row in counts.overview()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("decide_at", POINTS)
def test_the_host_waits_once_per_decision(decide_at: tuple[int, ...] | None, batch: int, padded: bool) -> None:
    dense, gated = models(decide_at, image_tokens=16)
    given = prompt(16, 12, batch)
    if padded:
        given["attention_mask"][0, :3] = 0
    base = count_calls(dense, given)
    points = 5 if decide_at is None else len(decide_at)
    for kv in POLICIES:
        for route in ("packed", "whole"):
            for got, own in zip(count_calls(gated, given, kv=kv, route=route), base, strict=True):
                assert got.waited() - own.waited() == points
                assert set(got.reads) <= {OUTSIDE}  # no layer waits


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("decide_at", POINTS)
def test_a_budget_of_one_launches_and_reads_what_the_dense_model_does(
    decide_at: tuple[int, ...] | None, batch: int
) -> None:
    dense, gated = models(decide_at, image_tokens=16)
    given = prompt(16, 12, batch)
    base = count_calls(dense, given)
    for options in ({}, {"kv": "evict"}, {"mode": "masked"}):
        assert count_calls(gated, given, budget=1, **options) == base
    if decide_at == (0,):
        assert count_calls(gated, given, budget=1, budget_per="input") == base


@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3"])
def test_other_families_wait_no_more(family: str) -> None:
    dense, gated = build(family), build(family)
    attach(gated, RouterConfig(decide_at=(0,)))
    base, got = (count_prefill(model, inputs(family, ROWS)) for model in (dense, gated))
    assert got.waited() - base.waited() == 1


@torch.no_grad()
def count_prefill(model: Any, given: dict[str, Tensor]) -> counts.Counts:
    with counting(model) as found:
        model(**given, use_cache=True)
    return found


@pytest.mark.parametrize("kv", POLICIES)
def test_a_layer_launches_little_more_than_the_dense_one(rows: Any, kv: str) -> None:
    for batch, decision in ((1, 20), (4, 36)):
        prefill = rows["prefill", batch, kv]
        assert prefill["dense"] == 36
        assert 0 < prefill["some"] <= MOST[kv, batch]
        assert prefill["everyone"] <= 0
        assert prefill["decision"] <= decision
    for call in counts.CALLS[1:]:
        assert rows[call, 4, kv]["some"] <= (MOST_IN_A_STEP if kv == "evict" else MOST[kv, 4])


@pytest.mark.parametrize("kv", counts.WAYS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("call", counts.CALLS)
def test_a_layer_that_nobody_runs_launches_nothing(rows: Any, call: str, batch: int, kv: str) -> None:
    assert rows[call, batch, kv]["nobody"] == 0


def test_decoding_in_place_costs_nothing_after_the_first_step(rows: Any) -> None:
    for kv in POLICIES:
        assert rows["first step", 1, kv]["everyone"] == 2  # room is made for the steps to come
        assert rows["later step", 1, kv]["everyone"] <= 0
        assert rows["later step", 1, kv]["decision"] <= 20


def test_every_launch_has_a_reason() -> None:
    found = counts.reasons()  # raises at one that has none
    for (kv, batch), most in MOST.items():
        assert sum(number for *of, _, number, _ in found if of == [kv, batch]) <= most
    assert {(kv, name) for kv, name in counts.LAYER if kv != "both"} <= {(kv, name) for kv, _, name, _, _ in found}


class Calls(torch.nn.Module):
    """A model whose one layer does what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Identity()])


@pytest.mark.parametrize(
    ("call", "launches", "reads"),
    [
        (lambda x: x.view(6).t()[1:].unsqueeze(0).expand(2, -1), 0, 0),
        (lambda x: x + 1, 1, 0),
        (lambda x: x[:0] + 1, 0, 0),
        (lambda x: x.new_empty(3), 0, 0),
        (lambda x: x.index_copy(0, torch.tensor([1]), x[:1]), 2, 0),
        (lambda x: x[x > 0], 2, 1),
        (lambda x: x.nonzero(), 1, 1),
        (lambda x: torch.nonzero_static(x, size=2), 1, 0),
        (lambda x: bool((x > 0).all()), 2, 1),
        (lambda x: int(x.sum()), 1, 1),
        (lambda x: x.tolist(), 0, 1),
        (lambda x: (x.cpu(), x.numpy()), 0, 2),
        (lambda x: torch.stack([x.sum(), x.max()]).tolist(), 3, 1),
    ],
)
def test_the_rule(call: Any, launches: int, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Calls()
    monkeypatch.setattr(counts, "find_decoder", lambda *_: (model, model, model.layers))
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    with counting(model) as found:
        model.layers[0](x)
        call(x)
    assert (found.of(OUTSIDE).total(), found.waited()) == (launches, reads)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts.main(["--out", str(tmp_path / "counts.json")])
    written = json.loads((tmp_path / "counts.json").read_text())
    assert len(written["overview"]) == 18
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 20
    assert [line for line in printed if line not in page] == []  # else print the tables of that page anew
