"""Every inequality of the theory holds on every sample measured on the reference model."""

from typing import Any

import pytest
import torch

from skipit.router.checkpoint import load_dense
from skipit.theory.profile import profile
from skipit.theory.tightness import Tightness, from_model, from_profile, show
from skipit.train.data.collate import Collator, batches
from skipit.train.reference import WEIGHTS
from skipit.train.reference.data import reference_dataset

# float32 forward passes; the skips and the walk along their paths run the model again.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def reference() -> tuple[Any, list[Any]]:
    model, processor = load_dense(str(WEIGHTS))
    return model, list(batches(reference_dataset("test", 3, 0), Collator(processor), 3))


@pytest.fixture(scope="module")
def found(reference: tuple[Any, list[Any]]) -> list[Tightness]:
    return from_model(*reference)


def test_every_inequality_holds_on_every_sample(found: list[Tightness]) -> None:
    broken = {line.claim: line.largest for line in found if len(line.ratios) and line.largest > 1 + TOLERANCE}
    assert broken == {}


def test_all_statements_that_tensors_can_show_are_there(found: list[Tightness]) -> None:
    assert {line.statement for line in found if len(line.ratios)} == set(range(1, 12))


def test_identities_are_exact(found: list[Tightness]) -> None:
    (line,) = [line for line in found if line.statement == 2]
    assert line.ratios.min() > 1 - TOLERANCE


def test_a_profile_alone_shows_the_statements_about_distributions(reference: tuple[Any, list[Any]]) -> None:
    found = from_profile(profile(*reference))
    assert {line.statement for line in found} == {1}
    assert all(line.largest <= 1 + 1e-9 for line in found)


def test_the_model_is_left_as_it_was(reference: tuple[Any, list[Any]], found: list[Tightness]) -> None:
    model, _ = reference
    assert not model._forward_pre_hooks
    assert not any("layer_gate" in name for name, _ in model.named_parameters())


def test_table_says_nan_where_nothing_could_be_evaluated() -> None:
    lines: list[str] = []
    show([Tightness(11, "nothing changed", torch.zeros(0))], lines.append)
    assert lines[1].split() == ["11", "nothing", "changed", "nan", "nan", "0"]
