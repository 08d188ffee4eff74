"""One budget over dropping tokens and skipping layers: it is spent, and split where calibration rows say."""

import pytest
import torch

from skipit.router import Gated
from skipit.theory.calibrate import LIMIT
from studies.answers import always, answers, right
from studies.peers import one_budget
from studies.peers.attended import BY_PROMPT
from studies.peers.lab import Lab
from studies.peers.one_budget import combined, pruned_alone
from studies.peers.pruners import Pruned, cdpruner, dart


@pytest.fixture(scope="module")
def lab() -> Lab:
    torch.set_num_threads(1)
    return Lab(seed=0, steps=2, samples=6, calibration=8, profiled=6, batch_size=2)


@pytest.mark.parametrize("budget", [0.6, 0.4])
def test_every_split_spends_the_budget_and_the_best_on_calibration_rows_is_taken(lab: Lab, budget: float) -> None:
    found = combined(lab, lab.planned(budget, "evict"), budget, dart)
    splits = found.chosen["splits"]
    alone = splits[-1]
    for split in splits[:-1]:
        # To a token-layer, but that the last layer's gate says the same of all image tokens: they run or skip together,
        # and the budget may lie between.
        beyond = Pruned(dart, split["keep"], Gated(split["threshold"] + 1e-3))
        less = answers(found.model, lab.held_out, always({"policy": beyond, "kv": "evict", **BY_PROMPT}))
        together = less.share(found.costs) < budget < split["compute"] < budget + 1 / 30
        assert together or split["compute"] == pytest.approx(budget, abs=0.01)
    row = 1 / 40  # a pruner drops whole tokens of every row at once
    assert (alone["threshold"], alone["compute"]) == (-LIMIT, pytest.approx(budget, abs=row))
    assert splits[0]["keep"] == 1
    best = max(split["accuracy"] for split in splits)
    first = next(split for split in splits if split["accuracy"] == best)
    assert (found.chosen["keep"], found.chosen["threshold"]) == (first["keep"], first["threshold"])
    again = answers(found.model, lab.held_out, found.options)
    assert again.same(right(lab.held_out)) == best
    assert again.share(found.costs) == first["compute"]


@pytest.mark.parametrize("wanted", [1.0, 0.85, 0.7])
def test_the_split_follows_calibration_rows(lab: Lab, monkeypatch: pytest.MonkeyPatch, wanted: float) -> None:
    shares = (1.0, 0.85, 0.7)
    turns = iter([*shares, 0.0])  # the last one is the pruner alone
    monkeypatch.setattr(one_budget, "SHARES", shares)
    monkeypatch.setattr("studies.answers.Answers.same", lambda self, given: float(next(turns) == wanted))
    found = combined(lab, lab.planned(0.6, "evict"), 0.6, cdpruner)
    assert found.chosen["keep"] == wanted
    assert found.options({})["policy"].keep == wanted


def test_keeping_every_token_is_the_gates_alone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.planned(0.6, "evict")
    monkeypatch.setattr(one_budget, "SHARES", (1.0,))
    split = combined(lab, model, 0.6, dart).chosen["splits"][0]
    gates = answers(model, lab.held_out, always({"policy": Gated(split["threshold"]), "kv": "evict"}))
    both = answers(
        model,
        lab.held_out,
        always({"policy": Pruned(dart, 1.0, Gated(split["threshold"])), "kv": "evict", **BY_PROMPT}),
    )
    for one, other in zip(gates.steps, both.steps, strict=True):
        assert torch.equal(one.run, other.run)
    assert split["compute"] == both.share(lab.costs)


def test_where_the_pruner_alone_cannot_gates_still_can(lab: Lab) -> None:
    chosen = combined(lab, lab.planned(0.15, "evict"), 0.15, dart).chosen
    assert all(split["threshold"] > -LIMIT for split in chosen["splits"])
    with pytest.raises(Exception, match="this method spends"):
        pruned_alone(lab, 0.15, dart)
