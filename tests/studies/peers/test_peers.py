"""The comparison with peers: every method makes something that can be measured, and cells are made once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skipit.router.folders import load_json
from skipit.train.data.sources import load_model
from skipit.train.reference.data import reference_dataset
from skipit.train.run import train
from studies import peers
from studies.answers import always
from studies.peers import draw, main, run_cell, summary, table
from studies.peers.choices import with_gate_cost
from studies.peers.lab import Lab, System
from studies.peers.methods import METHODS, TRAINED, UNTRAINED, _met
from studies.peers.policies import UnitRates
from studies.peers.training import depth_penalty, gate_penalty, rate_penalty, sequence_penalty


@pytest.fixture(scope="module")
def lab() -> Lab:
    torch.set_num_threads(1)
    return Lab(seed=0, steps=2, samples=6, calibration=6, profiled=6, batch_size=2)


@pytest.mark.parametrize("name", sorted(set(UNTRAINED) - {"theory-retain", "theory-evict"}))
def test_untrained_methods_meet_the_budget_on_other_rows(name: str, lab: Lab) -> None:
    budget = 0.75 if "attention" in name else 0.6  # attention alone is a third of a layer
    cell = run_cell(name, lab, budget)
    for label, draws in cell["results"].items():
        assert len(draws) == (5 if "random" in label and "+" not in label else 1)
        for found in draws:
            assert found["compute"] == pytest.approx(budget, abs=0.03), label
            assert 0 <= found["accuracy"] <= 1
    assert cell["dense"] > 0.5
    assert set(cell["results"]) == ({name, f"{name}: random tokens"} if name in ("fastv", "pyramid-drop") else {name})


def test_what_was_chosen_on_calibration_rows_is_kept(lab: Lab) -> None:
    found = run_cell("theory-evict+dart", lab, 0.6)["results"]["theory-evict+dart"][0]
    assert {"keep", "threshold", "splits"} == set(found["chosen"])
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", ["shortv+lora", "p-mod", "ours-retain"])
def test_trained_methods_meet_the_budget_on_other_rows(name: str, lab: Lab) -> None:
    cell = run_cell(name, lab, 0.6)
    for label, draws in cell["results"].items():
        assert draws[0]["compute"] == pytest.approx(0.6, abs=0.05), label
    if name == "ours-retain":
        learned, layers = (cell["results"][label][0] for label in (name, f"{name}: permuted over layers"))
        assert layers["compute"] == pytest.approx(learned["compute"], rel=1e-9)  # layers cost alike, `retain`
        assert len(cell["results"]) == 5


@pytest.mark.slow  # a training each
@pytest.mark.parametrize("name", sorted(set(TRAINED) - {"shortv+lora", "p-mod", "ours-retain", "router-tuning"}))
def test_every_other_trained_method_trains(name: str, lab: Lab) -> None:
    cell = run_cell(name, lab, 1.0 if name == "lora" else 0.7)
    for draws in cell["results"].values():
        assert 0 < draws[0]["compute"] < 1.1


def test_a_method_that_cannot_says_so_before_it_trains(lab: Lab) -> None:
    cell = run_cell("router-tuning", lab, 0.5)
    assert cell["results"] == {}
    assert 0.8 < cell["floor"] < 0.9  # attention of five layers of twelve
    assert "cannot: spends 8" in table(summary([cell]))


def test_lora_is_trained_around_the_mask(lab: Lab) -> None:
    choice = lab.static["bi"][0]
    options = _met(lab, choice, with_gate_cost(lab.costs, 0.0), 0.5)
    tuned, base = lab.fit(0.5, options), load_model("reference")[0]
    changed = [
        any(not torch.equal(a, b) for a, b in zip(new.mlp.parameters(), old.mlp.parameters(), strict=True))
        for new, old in zip(tuned.model.language_model.layers, base.model.language_model.layers, strict=True)
    ]
    assert changed == (options["policy"].rate > 0).any(-1).tolist()
    assert 0 < sum(changed) < len(changed)


def test_the_losses_of_peers() -> None:
    run = torch.tensor([[[1.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]])
    real = torch.tensor([[True, True, False]])
    assert float(rate_penalty(0.5)(run, real)) == pytest.approx((abs(2 / 3 - 0.5) + abs(1 / 3 - 0.5)) / 2)
    assert float(depth_penalty(0.1, 0.4)(run, real)) == pytest.approx(0.1 * (4 + 1) / 2)
    assert float(depth_penalty(0.1, 0.6)(run, real)) == 0
    assert float(sequence_penalty(0.2, 0, 2)(run, real)) == pytest.approx((1 - 0.2) + (0.5 - 0.2))
    assert float(sequence_penalty(0.2, 2, 3)(run, real)) == 0
    assert float(gate_penalty(0.2)(run, real)) == pytest.approx(3 * (0.5 - 0.2))
    assert float(gate_penalty(0.6)(run, real)) == 0


def _everything(lab: Lab, budget: float) -> dict[str, list[System]]:
    options = {"policy": UnitRates(torch.ones(len(lab.costs.layers), 2))}
    return {"bi": [System(lab.gated, always(options), with_gate_cost(lab.costs, 0.0))]}


def test_a_sweep_is_done_once_and_ends_in_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[float] = []

    def method(lab: Lab, budget: float) -> dict[str, list[System]]:
        calls.append(budget)
        return _everything(lab, budget)

    monkeypatch.setitem(METHODS, "bi", method)
    monkeypatch.setattr(peers, "REPEATS", 1)
    arguments = ["--out", str(tmp_path), "--methods", "bi", "--seeds", "0", "--rows", "4", "--calibration", "4"]
    main([*arguments, "--budgets", "0.5", "--latency"])
    main([*arguments, "--budgets", "0.5", "0.25"])
    assert calls == [0.5, 0.25]
    shown = capsys.readouterr().out
    assert "bi 0.5 seed 0" in shown
    assert (tmp_path / "table.md").read_text().count("| bi |") == 2
    assert (tmp_path / "pareto_untrained.png").stat().st_size > 1000
    cells = [load_json(path) for path in (tmp_path / "cells").iterdir()]
    assert cells[0]["made_by"]["versions"]["torch"]
    by_budget = {cell["budget"]: cell["results"]["bi"][0] for cell in cells}
    assert by_budget[0.5]["latency"]["this"]["prefill_ms"] > 0
    assert "latency" not in by_budget[0.25]
    for found in by_budget.values():
        assert (found["compute"], found["same_answer"]) == (1.0, 1.0)
    main(["--out", str(tmp_path), "--methods", "bi", "--seeds", "0", "--rows", "5", "--budgets", "0.5"])
    assert calls == [0.5, 0.25, 0.5]
    assert (tmp_path / "table.md").read_text().count("| bi |") == 1
    main([*arguments, "--budgets", "0.25", "--latency"])
    assert calls == [0.5, 0.25, 0.5, 0.25]


def test_what_was_trained_once_serves_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(given[4].budget)
        return train(*given, **more)

    monkeypatch.setattr("studies.study.train", counted)
    lab = Lab(steps=1, samples=2, calibration=4, profiled=4, batch_size=2, out=tmp_path)
    first, again, other = (lab.learned(budget, "evict") for budget in (0.6, 0.6, 0.5))
    assert calls == [0.6, 0.5]
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert any(not torch.equal(one, two) for one, two in zip(first.parameters(), other.parameters(), strict=True))


def test_the_documents_model_is_asked_on_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def model(name: str) -> Any:
        asked.append(name)
        return load_model("reference")

    def data(name: str, *what: Any) -> Any:
        asked.append((name, *what[:2]))
        return reference_dataset(*what)

    monkeypatch.setattr("studies.study.load_model", model)
    monkeypatch.setattr("studies.study.load_data", data)
    monkeypatch.setitem(METHODS, "bi", _everything)
    sizes = ["--rows", "6", "--calibration", "5", "--seeds", "0", "--budgets", "0.5", "--out", str(tmp_path)]
    main(["--model", "documents", "--methods", "bi", *sizes])
    assert set(asked) == {"documents", ("documents", "test", 6)}
    (cell,) = [load_json(path) for path in (tmp_path / "cells").iterdir()]
    assert cell["model"] == "documents"
    assert [len(batch["labels"]) for batch in Lab(model="documents", calibration=5).held_out] == [4, 1]


def test_a_combination_has_a_figure_of_its_own_beside_each_alone(tmp_path: Path) -> None:
    def cells(name: str, budget: float, accuracy: float, **more: Any) -> dict[str, Any]:
        found = {"accuracy": accuracy, "same_answer": accuracy, "compute": budget, **more}
        return {**_cell(name, 0, results={name: [found]}), "budget": budget}

    chosen = {"chosen": {"keep": 0.7, "threshold": 0.1}}
    entries = summary(
        [
            *(cells(name, budget, 0.6) for name in ("theory-evict", "dart") for budget in (0.5, 0.25)),
            *(cells("theory-evict+dart", budget, 0.7, **chosen) for budget in (0.5, 0.25)),
            cells("dart+lora", 0.5, 0.6),
            cells("ours-evict+cdpruner", 0.5, 0.7, **chosen),  # of whose parts neither was measured
        ]
    )
    assert "| theory-evict+dart, 70% of image tokens stay |" in table(entries)
    draw(entries, tmp_path)
    assert {path.name for path in tmp_path.glob("frontier*")} == {"frontier_theory-evict+dart.png"}


def _cell(method: str, seed: int, **more: Any) -> dict[str, Any]:
    return {"method": method, "budget": 0.5, "seed": seed, "dense": 0.8, "results": {}, **more}


def test_the_table_has_means_and_spreads_and_reasons(tmp_path: Path) -> None:
    found = [
        {"accuracy": 0.8, "same_answer": 0.9, "compute": 0.5},
        {"accuracy": 0.4, "same_answer": 0.5, "compute": 0.5},
    ]
    cells = [
        *(_cell("ours-evict", seed, results={"ours-evict": [one]}) for seed, one in enumerate(found)),
        _cell("random", 0, results={"random": found}),
        _cell("fastv", 0, floor=0.61),
        _cell("d-llm", 0, failed="the loss is nan"),
    ]
    entries = {entry["system"]: entry for entry in summary(cells)}
    assert entries["ours-evict"]["accuracy"] == pytest.approx(0.75)
    assert entries["ours-evict"]["spread"] == pytest.approx(2**-0.5 / 2)
    assert (entries["random"]["runs"], entries["random"]["seeds"]) == (2, 1)
    text = table(entries.values())
    assert "| 0.5 | ours-evict | yes | 2 | 2 | 50.0% | 75.0% ± 35.4% | 70.0% |" in text
    assert "cannot: spends 61.0% at least" in text
    assert "training failed" in text
    draw(list(entries.values()), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"pareto_trained.png", "pareto_untrained.png"}
