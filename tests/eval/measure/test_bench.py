"""Times of layers: every case is run as it is called, by a small decoder like the model's."""

import pytest
import torch
from families import build

from skipit.eval.measure.bench import SHARES, measure_layers, small_decoder
from skipit.router import layer

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2.5-vl", "mllama"])
def test_small_decoder(family: str) -> None:
    model = build(family)
    decoder = small_decoder(model, None, torch.bfloat16, CPU)
    layers = list(decoder.layers)
    assert 1 <= len(layers) <= model.config.get_text_config().num_hidden_layers
    assert next(decoder.parameters()).dtype == torch.bfloat16
    assert decoder.config.hidden_size == model.config.get_text_config().hidden_size
    times = measure_layers(model, dtype=torch.float32, device=CPU, tokens=[12], seconds=0)
    assert all(row.ms > 0 and row.relative > 0 for row in times.rows)


def test_large_layers_are_timed_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipit.eval.measure.bench.PARAMETERS", 1)
    assert len(list(small_decoder(build("llava"), None, torch.float32, CPU).layers)) == 2


def test_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, set[int]] = {"whole": set(), "execute": set()}
    for name, seen in ran.items():

        def spy(*given: object, seen: set[int] = seen, original: object = getattr(layer, name)) -> object:
            seen.add(next(x.count for x in given if hasattr(x, "count") and hasattr(x, "stretch")))
            return original(*given)  # type: ignore[operator]

        monkeypatch.setattr(layer, name, spy)
    times = measure_layers(build("llava"), dtype=torch.float32, device=CPU, tokens=[8, 16], seconds=0)
    assert times.clock == "processor time of one thread"
    assert set(times.dense) == {8, 16}
    assert ran["whole"] == {6, 4, 2, 12, 8, 1}, "of 8 and of 16 tokens, three shares and one token, by whole attention"
    assert ran["execute"] >= {6, 4, 2, 12, 8, 1, 0}
    assert len(times.rows) == 2 * (4 + 3 * (len(SHARES) + 1))
    assert set(times.steps) == {8, 16}


def test_a_step_after_a_prompt_enters_every_layer_or_none() -> None:
    """Whole models in order: what no layer is entered for is faster than what all are."""
    times = measure_layers(build("llava"), dtype=torch.float32, device=CPU, tokens=[16], seconds=1)
    step = times.steps[16]
    assert 0 < step.left_out < step.entered
    assert step.ms > 0
