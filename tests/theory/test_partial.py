"""A profile that is stopped and goes on is the profile that was never stopped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from skipit.router.errors import CheckpointError, InputError
from skipit.router.folders import load_json, load_tensors, save_tensors
from skipit.theory.artefact import profile_tables
from skipit.theory.partial import RECORD, SUMS, Partial
from skipit.theory.profile import Profile, profile


def _batch(seed: int) -> dict[str, Tensor]:
    rows: list[list[int | str]] = [[5 + seed, "image", 6, 7, 8, 9], [10, 11, 12 + seed, 13]]
    batch = tiny_models.inputs("llava", rows, "left", seed)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    return {**batch, "labels": labels}


BATCHES = [_batch(seed) for seed in range(5)]
BATCHES[1]["pixel_values"][:] = torch.nan


class Killed(Exception):
    """Stands for a process that ends."""


def _until(count: int) -> Iterator[dict[str, Tensor]]:
    yield from BATCHES[:count]
    raise Killed


def _killed(folder: Path, count: int, **options: Any) -> None:
    with pytest.raises(Killed):
        profile(tiny_models.build("llava"), _until(count), partial=Partial(folder, every=2, **options))


def _same(a: Profile, b: Profile) -> None:
    assert (a.about, a.model, a.costs) == (b.about, b.model, b.costs)
    others = profile_tables(b)
    for name, table in profile_tables(a).items():
        assert torch.equal(table.nan_to_num(-1), others[name].nan_to_num(-1)), name


@pytest.fixture(scope="module")
def whole() -> Profile:
    return profile(tiny_models.build("llava"), BATCHES)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_going_on_gives_the_same_bits(whole: Profile, tmp_path: Path, count: int) -> None:
    _killed(tmp_path / "p", count)
    assert load_json(tmp_path / "p" / RECORD)["seed"] == 0
    partial = Partial(tmp_path / "p", every=2, resume=True)
    _same(profile(tiny_models.build("llava"), BATCHES, partial=partial), whole)
    assert whole.about["skipped_row_numbers"] == [2]
    partial.remove()
    assert not list(tmp_path.iterdir())


def test_saving_changes_nothing_and_twice_stopped_is_no_worse(whole: Profile, tmp_path: Path) -> None:
    _same(profile(tiny_models.build("llava"), BATCHES, partial=Partial(tmp_path / "a", every=1)), whole)
    _killed(tmp_path / "b", 2)
    _killed(tmp_path / "b", 4, resume=True)
    assert int(load_tensors(tmp_path / "b" / SUMS)["batches"]) == 4
    _same(profile(tiny_models.build("llava"), BATCHES, partial=Partial(tmp_path / "b", resume=True)), whole)


def test_all_measured_but_not_written(whole: Profile, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    _killed(tmp_path / "p", 4)
    found = profile(tiny_models.build("llava"), BATCHES[:4], partial=Partial(tmp_path / "p", resume=True))
    _same(found, profile(tiny_models.build("llava"), BATCHES[:4]))
    assert not [str(warning.message) for warning in recwarn if "metric" in str(warning.message)]


def test_what_differs_is_named(tmp_path: Path) -> None:
    _killed(tmp_path / "p", 2, of={"data": "a.jsonl", "batch_size": 2})

    def go_on(data: str = "a.jsonl", batch_size: int = 2, model: int = 0, **options: Any) -> None:
        partial = Partial(tmp_path / "p", resume=True, of={"data": data, "batch_size": batch_size})
        profile(tiny_models.build("llava", model), BATCHES, partial=partial, **options)

    with pytest.raises(CheckpointError, match=r"cannot be resumed, what is measured differs: seed was 0, is 1\. Give"):
        go_on(seed=1)
    with pytest.raises(CheckpointError, match=r"batch_size was 2, is 4; draws was 2, is 3\."):
        go_on(batch_size=4, draws=3)
    with pytest.raises(CheckpointError, match=r"differs: decide_at was \[0\], is \[0, 2\]\."):
        go_on(decide_at=(0, 2))
    with pytest.raises(CheckpointError, match=r"data was 'a.jsonl', is 'b.jsonl'"):
        go_on(data="b.jsonl")
    with pytest.raises(CheckpointError, match=r"model was '\w{16}', is '\w{16}'"):
        go_on(model=1)
    go_on()


@pytest.mark.parametrize("others", [[BATCHES[0], BATCHES[2], BATCHES[3]], BATCHES[:1]], ids=["changed", "shorter"])
def test_other_rows_under_the_same_name_are_refused(tmp_path: Path, others: list[dict[str, Tensor]]) -> None:
    _killed(tmp_path / "p", 2)
    with pytest.raises(CheckpointError, match="the first 2 batches of the data are not those that were measured"):
        profile(tiny_models.build("llava"), others, partial=Partial(tmp_path / "p", resume=True))


def test_what_is_there_is_not_lost_and_what_is_not_there_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"p does not hold an unfinished profile\. Start without --resume"):
        Partial(tmp_path / "p", resume=True)
    _killed(tmp_path / "p", 1)  # before the first save
    assert not list(tmp_path.iterdir())
    _killed(tmp_path / "p", 2)
    with pytest.raises(
        CheckpointError, match=r"holds an unfinished profile\. Go on with --resume, or pass --overwrite"
    ):
        Partial(tmp_path / "p")
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"other exists and is no unfinished profile\. Delete it yourself"):
        Partial(tmp_path / "other", overwrite=True)
    with pytest.raises(InputError, match="`every` is 0, expected a number of batches, at least 1"):
        Partial(tmp_path / "q", every=0)
    _killed(tmp_path / "p", 4, overwrite=True)
    assert int(load_tensors(tmp_path / "p" / SUMS)["batches"]) == 4


def test_damage_is_told(tmp_path: Path) -> None:
    _killed(tmp_path / "p", 2)
    sums = load_tensors(tmp_path / "p" / SUMS)

    def refuse(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            profile(tiny_models.build("llava"), BATCHES, partial=Partial(tmp_path / "p", resume=True))

    save_tensors(tmp_path / "p" / SUMS, {name: value for name, value in sums.items() if name != "var"})
    refuse("p is damaged, or of another version: 'var'")
    save_tensors(tmp_path / "p" / SUMS, {name: value for name, value in sums.items() if name != "digest"})
    refuse("is damaged: it has no 'digest'")
    (tmp_path / "p" / SUMS).write_bytes(b"half")
    refuse("is not a readable safetensors file")
