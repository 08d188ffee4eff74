"""What several processes have run, as one process publishes it."""

import os

import pytest

from skipit.vllm.decisions import Row, Spent
from skipit.vllm.metrics import FOLDER, Counts, publish
from skipit.vllm.requests import Spending

prometheus = pytest.importorskip("prometheus_client")
NAMES = ["default", "input", "0.5"]


def read() -> dict[tuple[str, str], float]:
    from prometheus_client.parser import text_string_to_metric_families

    text = prometheus.generate_latest().decode()
    families = [family for family in text_string_to_metric_families(text) if family.name.startswith("skipit")]
    return {(it.name, it.labels["budget"]): it.value for family in families for it in family.samples}


def test_counts_add_up_over_steps_requests_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "")
    publish(NAMES)
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        count = Counts(os.environ[FOLDER], NAMES)
        row = Row(Spending("0.5", 0.0), 5)
        for spent in (Spent(5, 8, 10.0, 15.0, 20.0), Spent(1, 2, 3.0, 4.0, 5.0)):
            for name, value in vars(spent).items():
                setattr(row.spent, name, getattr(row.spent, name) + value)
            count(row, spent)
    got = read()
    assert got["skipit_requests_total", "0.5"] == 2
    assert got["skipit_tokens_total", "0.5"] == 12
    assert got["skipit_token_layers_total", "0.5"] == 20
    assert got["skipit_flops_routed_total", "0.5"] == 26
    assert got["skipit_flops_executed_total", "0.5"] == 38
    assert got["skipit_flops_dense_total", "0.5"] == 50
    assert got["skipit_requests_total", "default"] == 0


def test_another_model_begins_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "")
    publish(NAMES)
    Counts(os.environ[FOLDER], NAMES)(Row(Spending("input", None), 1), Spent(1, 1, 1, 1, 1))
    publish(["default"])
    assert set(read().values()) == {0.0}
