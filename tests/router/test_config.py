"""Settings survive the disk, and a wrong one is refused with its name."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build

from skipit.router import RouterConfig, RouterConfigError, attach
from skipit.router.config import EVERYTHING, decision_points

FULL = RouterConfig(kv="evict", layers="model.layers", threshold=-0.25, operating_points={"0.5": -0.25, "0.25": 1.5})


@pytest.mark.parametrize("config", [RouterConfig(), FULL, RouterConfig(budget_per="input")])
def test_round_trip(config: RouterConfig, tmp_path: Path) -> None:
    file = tmp_path / "router_config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert RouterConfig.from_file(file) == RouterConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"kvs": "retain", "budgets": 1},
            "router config: unknown keys budgets, kvs; "
            "known keys: budget_per, decide_at, format_version, granularity, kv, layers, operating_points, threshold, "
            "unit.",
        ),
        ({"kv": "drop"}, "`kv`: got 'drop', expected one of retain, evict."),
        ({"budget_per": "row"}, "`budget_per`: got 'row', expected one of data, input."),
        ({"layers": 3}, "`layers`: got 3, expected a dotted path or null."),
        ({"threshold": "low"}, "threshold 'threshold': got 'low', expected a finite number."),
        ({"threshold": True}, "threshold 'threshold': got True, expected a finite number."),
        ({"threshold": float("nan")}, "threshold 'threshold': got nan, expected a finite number."),
        ({"operating_points": {"0.5": float("inf")}}, "threshold '0.5': got inf, expected a finite number."),
        ({"operating_points": [0.5]}, "`operating_points`: got [0.5], expected a mapping."),
        (
            {"format_version": 4},
            "`format_version`: got 4, this skipit reads 1 to 3. "
            "Load the checkpoint with the skipit version that wrote it, or a newer one.",
        ),
        *(
            (
                {"decide_at": points},
                f"`decide_at`: got {points!r}, expected ascending layers that begin with 0, such as (0,) or (0, 1, 2), "
                "or None: every layer for itself.",
            )
            for points in ([], [1], [0, 2, 1], [0, 0], [0, True], "0", 0)
        ),
        (["retain"], "router config: got list, expected a JSON object."),
    ],
)
def test_bad_values(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RouterConfigError, match=f"^{re.escape(message)}$"):
        RouterConfig.from_dict(values)
    file = tmp_path / "router_config.json"
    file.write_text(text := json.dumps(values))
    if number := re.search("NaN|Infinity", text):  # JSON has neither: the reader refuses it before the settings do
        message = f"is not readable JSON: the number {number[0]} is not finite"
    else:
        message = f"{file}: {message}"
    with pytest.raises(RouterConfigError, match=f"{re.escape(message)}$") as caught:
        RouterConfig.from_file(file)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_a_file_that_is_not_json(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "router_config.json"
    file.write_bytes(content)
    with pytest.raises(RouterConfigError, match=re.escape(str(file))):
        RouterConfig.from_file(file)


def test_thresholds_by_budget() -> None:
    assert FULL.threshold_at(None) == -0.25
    assert FULL.threshold_at("0.25") == FULL.threshold_at(0.25) == 1.5
    assert FULL.threshold_at(1) == FULL.threshold_at("1") == EVERYTHING  # not calibrated
    with pytest.raises(
        RouterConfigError,
        match=r"^`budget`: got '0.3', this router is calibrated for: 0.5, 0.25. Choose one of these, or calibrate",
    ):
        FULL.threshold_at(0.3)
    with pytest.raises(RouterConfigError, match="is calibrated for: none"):
        RouterConfig().threshold_at("0.5")


def test_shares_of_inputs() -> None:
    assert FULL.share_at(0.3) == 0.3  # calibrated or not
    assert FULL.share_at(None) == 0.5
    assert FULL.at(0.25).share_at(None) == 0.25
    certified = RouterConfig(threshold=2.0, operating_points={"certified": 2.0})
    for config, budget, said in (
        (certified, None, "None"),
        (FULL, "0.5", "'0.5'"),
        (FULL, 0.0, "0.0"),
        (FULL, True, "T"),
    ):
        with pytest.raises(RouterConfigError, match=f"`budget`: got {said}.*Give a number in"):
            config.share_at(budget)


def test_one_more_operating_point() -> None:
    more = FULL.with_point(0.75, -1.0)
    assert more.operating_points == {**FULL.operating_points, "0.75": -1.0}
    assert more.threshold == FULL.threshold == -0.25
    assert "0.75" not in FULL.operating_points
    assert FULL.with_point("0.5", 2.0, default=True).at(0.25).operating_points["0.5"] == 2.0
    assert FULL.with_point("certified", 2.0, default=True).threshold == 2.0
    with pytest.raises(RouterConfigError, match=r"threshold '0\.75': got nan, expected a finite number"):
        FULL.with_point(0.75, float("nan"))


def test_settings_of_before_there_were_decision_points() -> None:
    old = {name: value for name, value in FULL.to_dict().items() if name != "decide_at"} | {"format_version": 1}
    assert RouterConfig.from_dict(old) == replace(FULL, decide_at=None)
    assert RouterConfig.from_dict({**FULL.to_dict(), "format_version": 2}) == FULL
    assert RouterConfig().decide_at == (0,)


def test_points_of_a_model() -> None:
    assert decision_points(None, 3) == (0, 1, 2)
    assert decision_points((0, 2), 3) == (0, 2)
    with pytest.raises(RouterConfigError, match=r"^`decide_at`: got \(0, 3\), the model has layers 0 to 2.$"):
        decision_points((0, 3), 3)
    with pytest.raises(RouterConfigError, match=r"`decide_at`: got \(0, 4\), the model has layers 0 to 3"):
        attach(build("llava"), RouterConfig(decide_at=(0, 4)))
