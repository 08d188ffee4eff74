"""The documents model's training: what the tower is told, packing, and a run that was killed."""

import json
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from tiny_decoder import tiny_documents_model
from torch import nn

from skipit.router import CheckpointError
from skipit.train.data.collate import Collator
from skipit.train.reference.documents.data import documents_dataset, draw_document
from skipit.train.reference.documents.model import (
    COLUMNS,
    HEIGHT,
    ROWS,
    WIDTH,
    build_model,
    build_processor,
)
from skipit.train.reference.documents.page import Cell, Line, set_page
from skipit.train.reference.documents.questions import TASKS
from skipit.train.reference.documents.weights import add_lora, our_weights
from studies import pretrain_documents
from studies.pretrain_documents import answering, sitting, tower
from studies.pretrain_documents.answering import (
    Packed,
    answer_logits,
    answer_loss,
    drawn,
    misread,
    pack,
    train_answers,
)
from studies.pretrain_documents.fonts import OWN, faces
from studies.pretrain_documents.sitting import Sitting
from studies.pretrain_documents.targets import Alphabet, letters_of, shown, tokens_of
from studies.pretrain_documents.tower import Reader, _grown, batch, loose_page, seen, train_tower
from studies.state import FILE, load_state, save_state


def test_the_tower_is_told_what_a_page_says() -> None:
    _, processor = tiny_documents_model()
    alphabet = Alphabet(processor.tokenizer)
    lines = [Line((Cell("to 12.50"), Cell("7", 1.0, "right"))), Line((Cell("to: to"),))]
    grid = tokens_of(set_page(lines, "DejaVuSansMono.ttf", np.random.default_rng(0)), alphabet)
    assert grid.shape == (ROWS, COLUMNS)
    assert (grid[:, -1] == alphabet.newline).all()
    first, second = (line.split() for line in shown(grid, alphabet).splitlines() if line.strip())
    assert (" ".join(first), " ".join(second)) == ("to 12.50 7", "to : to")
    assert set(grid.flatten().tolist()) <= set(alphabet.tokens)


def test_letters_stand_where_they_are_drawn() -> None:
    page = set_page([Line((Cell("Hi"),))], "DejaVuSansMono.ttf", np.random.default_rng(0))
    letters = letters_of(page)
    assert sorted(letters[letters > 0].tolist()) == sorted(ord(c) - 31 for c in "Hi")


def test_an_alphabet_has_every_token_of_every_split() -> None:
    _, processor = tiny_documents_model()
    alphabet = Alphabet(processor.tokenizer)
    for split in ("train", "calibration", "test"):
        for number in range(20):
            document = draw_document(split, "invoice", np.random.default_rng(number))  # type: ignore[arg-type]
            assert {i for word in document.page.words for i in alphabet.ids(word.text)} <= set(alphabet.tokens)


def test_the_nearest_token_is_the_one_that_is_said() -> None:
    model, processor = tiny_documents_model()
    alphabet = Alphabet(processor.tokenizer)
    reader = Reader(model, alphabet.tokens)
    pages = [loose_page(alphabet, np.random.default_rng(0))]
    _, tokens, _ = batch(pages, alphabet, processor)
    right = model.get_input_embeddings().weight[torch.tensor(alphabet.tokens)[tokens]].detach()
    assert (reader.distances(right).argmax(-1) == tokens).all()
    assert reader.spoken(right, tokens) < reader.spoken(right + 0.3, tokens)


def test_packed_answers_are_those_of_questions_asked_alone() -> None:
    """A question sees the page and itself: logits are those of the row as the collator writes it."""
    model, processor = tiny_documents_model()
    rows = list(documents_dataset("train", 2, kinds=["lookup"]))
    asked = [(row["prompt"][0]["content"][1]["text"], row["answer"]) for row in rows]
    page = Collator(processor)([rows[0]])["pixel_values"]
    packed = pack(processor.tokenizer, [asked])
    with torch.no_grad():
        logits, wanted = answer_logits(model, packed, Reader(model, [0])(page)[0])
        for number, row in enumerate(rows, start=1):
            alone = Collator(processor)([{**row, "images": rows[0]["images"]}])
            labels = alone.pop("labels")[:, 1:]
            expected = model(**alone).logits[0, :-1][labels[0] >= 0]
            mine = packed.questions == number
            assert wanted[mine].tolist() == labels[0][labels[0] >= 0][: mine.sum()].tolist()
            torch.testing.assert_close(logits[mine], expected[: mine.sum()], atol=1e-4, rtol=1e-4)


def test_a_batch_of_pages_has_the_loss_and_gradients_of_its_pages_alone() -> None:
    """Padding is inert, and pages do not see each other."""
    model, processor = tiny_documents_model()
    add_lora(model)
    model.double()
    lora = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for number, parameter in enumerate(lora.values()):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    reader, pages = (
        Reader(model, [0]).double(),
        [[("Sum?", "12")], [("What is the title?", "A long one"), ("Sum?", "7")] * 4],
    )
    pixels = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)).double()

    def learned(numbers: list[int]) -> tuple[Packed, torch.Tensor, dict[str, torch.Tensor]]:
        packed = pack(processor.tokenizer, [pages[number] for number in numbers])
        loss = answer_loss(*answer_logits(model, packed, reader(pixels[numbers])[0]), packed)
        return packed, loss.detach(), dict(zip(lora, torch.autograd.grad(loss, list(lora.values())), strict=True))

    alone, (packed, loss, gradients) = [learned([number]) for number in range(2)], learned([0, 1])
    assert alone[0][0].ids.shape[1] < packed.ids.shape[1]  # the first is padded
    share = [one.weights.sum() / packed.weights.sum() for one, _, _ in alone]
    torch.testing.assert_close(loss, sum(s * one for s, (_, one, _) in zip(share, alone, strict=True)))
    for name, gradient in gradients.items():
        expected = sum(s * one[name] for s, (_, _, one) in zip(share, alone, strict=True))
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_bytes_are_seen_as_the_processor_sees_the_page() -> None:
    _, processor = tiny_documents_model()
    alphabet = Alphabet(processor.tokenizer)
    page = loose_page(alphabet, np.random.default_rng(0))
    pixels, _, _ = batch([page], alphabet, processor)
    expected = processor.image_processor(images=[page.image], return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(seen(pixels), expected)


@pytest.mark.parametrize("light", [True, False])
def test_letters_grow_as_the_filters_of_pil_make_them(light: bool) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    expected = image.filter(ImageFilter.MaxFilter(3) if light else ImageFilter.MinFilter(3))
    assert np.array_equal(_grown(np.asarray(image), light), np.asarray(expected))


def test_every_kind_of_question_is_asked_and_the_weak_ones_most() -> None:
    asked = Counter(task for n in range(40) for task, _, _ in drawn("train", np.random.default_rng(n))[1])
    pages = Counter(drawn("train", np.random.default_rng(n))[0].kind for n in range(40))
    listing = 40 - pages["form"] - pages["sign"] - pages["paragraph"]
    assert set(asked) == set(TASKS)
    assert asked["read"] == 40
    assert min(asked["compare"], asked["sum"]) > 2 * listing
    assert asked["yesno"] > asked["lookup"] == 80


class Killed(Exception):
    pass


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints every step, and pages held out by the handful."""
    monkeypatch.setattr(sitting, "SAVE_AFTER", 0.0)
    monkeypatch.setattr(tower, "LOG_EVERY", 1)
    monkeypatch.setattr(answering, "LOG_EVERY", 1)
    monkeypatch.setattr(tower, "HELD_OUT", 1)
    monkeypatch.setattr(answering, "HELD_OUT", 1)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("stage", ["tower", "answers", "together", "both"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(stage: str, tmp_path: Path) -> None:
    learns = {"ideal": stage == "answers", "tower_peak": 1e-4 * (stage == "both")}
    train: Any = train_tower if stage == "tower" else partial(train_answers, **learns, cooldown=True)

    def run(folder: Path, steps: int, die_at: int | None = None, workers: int = 0) -> dict[str, torch.Tensor]:
        def log(line: str) -> None:
            if die_at is not None and f" {die_at + 1}/" in line:
                raise Killed

        model, processor = tiny_documents_model()
        add_lora(model)
        train(model, processor, folder, steps, size=1, workers=workers, log=log)
        return model.state_dict()

    whole = run(tmp_path / "whole", 3)
    with pytest.raises(Killed):
        run(tmp_path / "killed", 3, die_at=2)
    resumed = run(tmp_path / "killed", 3, workers=1)  # pages do not depend on who draws them
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    record = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 3
    assert not list(tmp_path.rglob("*.tmp"))
    assert (tmp_path / "whole" / FILE).is_file()


def test_a_stage_alone_writes_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain_documents.main(["--only", "tower", "--weights", "ours.safetensors"])
    assert "--weights needs every stage; leave out --only." in capsys.readouterr().err


def test_more_fonts_teach_letters_and_none_is_of_a_held_out_family(tmp_path: Path) -> None:
    import matplotlib

    shipped = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name in ("DejaVuSansDisplay.ttf", "STIXGeneralBolIta.ttf", "DejaVuSerif-BoldItalic.ttf"):
        (tmp_path / name).write_bytes((shipped / name).read_bytes())
    among = faces(tmp_path)  # the first has few characters, the second is of the test split's family
    assert among == (*OWN, str(tmp_path / "DejaVuSerif-BoldItalic.ttf"))
    _, processor = tiny_documents_model()
    alphabet = Alphabet(processor.tokenizer)
    pages = [loose_page(alphabet, np.random.default_rng(0), faces_) for faces_ in (among[-1:], OWN[:1])]
    assert [word.text for word in pages[0].words] != []
    assert pages[0].image.tobytes() != pages[1].image.tobytes()


def test_a_folder_without_fonts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no font that can be used, expected .ttf or .otf files with all of ASCII"):
        faces(tmp_path)


def test_an_ideal_tower_is_misread_now_and_then() -> None:
    tokens = torch.arange(1000) % 50
    said = misread(tokens, 50, step=3)
    changed = said != tokens
    assert 0 < changed.float().mean() < 2 * answering.MISREAD
    assert not changed[tokens <= 1].any()  # an empty place stays empty
    assert torch.equal(said, misread(tokens, 50, step=3))


def test_lora_is_trained_in_full_precision_on_a_bf16_decoder() -> None:
    model, _ = tiny_documents_model()
    model.model.language_model.to(torch.bfloat16)
    add_lora(model)
    kinds = {".lora_" in name: p.dtype for name, p in model.model.language_model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    first, second = torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)
    save_state(tmp_path, 1, {"map": first}, torch.optim.AdamW(first.parameters()))
    with pytest.raises(CheckpointError, match=r"`map/weight`: got \[3, 2\], expected \[4, 2\]: it is of another model"):
        load_state(tmp_path, {"map": second})


def test_training_the_tower_lowers_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "HELD_OUT", 1)
    lines: list[str] = []
    model, processor = tiny_documents_model()
    train_tower(model, processor, tmp_path, 25, size=1, log=lines.append)
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert record["loss"] < 15
    assert lines[0].startswith("tower 25/25 loss")


def test_a_rate_falls_with_the_root_of_the_step_or_to_zero_at_a_known_end() -> None:
    roots, ends = Sitting(100), Sitting(100, cooldown=True)
    assert [roots.rate(step, 1.0, warmup=10, flat=20) for step in (0, 9, 19, 79)] == [0.1, 1.0, 1.0, 0.5]
    assert [ends.rate(step, 1.0, warmup=10, flat=20) for step in (0, 79, 90, 100)] == pytest.approx([0.1, 1, 0.5, 0])
    now = time.monotonic()
    late = Sitting(100, deadline=now + 10, cooldown=True, began=now - 90)
    assert late.rate(20, 1.0, warmup=10, flat=20) == pytest.approx(0.5, abs=0.01)  # a tenth of the time is left
    assert not late.over(99)
    assert late.over(100)
    assert Sitting(100, deadline=now).over(0)


@pytest.mark.usefixtures("short")
def test_a_sitting_ends_in_time_and_writes_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with the tower of another file, which stays as it is."""
    from tiny_decoder import tiny_decoder, tiny_tokenizer

    monkeypatch.setattr(pretrain_documents, "load_decoder", lambda source: (tiny_decoder(), tiny_tokenizer()))
    start, out = tmp_path / "start.safetensors", tmp_path / "ours.safetensors"
    model = build_model(tiny_decoder(), build_processor(tiny_tokenizer()))
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias.fill_(0.5)
    add_lora(model)
    save_file(our_weights(model), start)
    steps = ["--tower-steps", "0", "--answer-steps", "0", "--steps", "9999", "--minutes", "0.01", "--cooldown"]
    pretrain_documents.main(["--out", str(tmp_path), *steps, "--start", str(start), "--weights", str(out)])
    before, after = load_file(start), load_file(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if ".lora_" not in name)


@pytest.mark.usefixtures("short")
def test_the_command_writes_what_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_decoder import tiny_decoder, tiny_tokenizer

    monkeypatch.setattr(pretrain_documents, "load_decoder", lambda source: (tiny_decoder(), tiny_tokenizer()))
    out = tmp_path / "ours.safetensors"
    steps = ["--tower-steps", "1", "--answer-steps", "1", "--steps", "1"]
    pretrain_documents.main(["--out", str(tmp_path), *steps, "--weights", str(out)])
    assert 0 < out.stat().st_size < 25_000_000
