"""Settings of a training run survive a file, and a wrong one is refused with its name."""

import re
from typing import Any

import pytest

from skipit.router import RouterConfigError
from skipit.train.config import TrainConfig


def test_round_trip() -> None:
    config = TrainConfig(budget=0.25, kv="evict", lora_rank=0, gate_learning_rate=1e-3)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict({}) == TrainConfig()


@pytest.mark.parametrize("budget", [0, 1.2, "half"])
def test_budget(budget: Any) -> None:
    with pytest.raises(ValueError, match=rf"`budget`: got {budget!r}, expected a number in \(0, 1\]"):
        TrainConfig(budget=budget)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 1, "epochs": 2}, "training config: unknown keys epochs, lr; known keys: accumulation, batch_size, "),
        ({"kv": "keep"}, "`kv`: got 'keep', expected one of retain, evict."),
        ({"steps": 0}, "`steps`: got 0, expected a whole number, at least 1."),
        ({"batch_size": 2.5}, "`batch_size`: got 2.5, expected a whole number, at least 1."),
        ({"accumulation": True}, "`accumulation`: got True, expected a whole number, at least 1."),
        ({"lora_rank": -1}, "`lora_rank`: got -1, expected a whole number, at least 0."),
        ({"learning_rate": "fast"}, "`learning_rate`: got 'fast', expected a number, at least 0."),
        ({"gate_learning_rate": float("nan")}, "`gate_learning_rate`: got nan, expected a number, at least 0."),
        ({"distillation": -1.0}, "`distillation`: got -1.0, expected a number, at least 0."),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RouterConfigError, match=f"^{re.escape(message)}"):
        TrainConfig.from_dict(values)
