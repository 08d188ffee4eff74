"""The documents model's training: what the tower is told, packing, and a run that was killed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoder import tiny_documents_model

from skipit.router import CheckpointError
from skipit.train.data.collate import Collator
from skipit.train.reference.documents.data import documents_dataset, draw_document
from skipit.train.reference.documents.model import COLUMNS, ROWS
from skipit.train.reference.documents.page import Cell, Line, set_page
from skipit.train.reference.documents.weights import add_lora
from studies import pretrain_documents
from studies.pretrain_documents import answering, tower
from studies.pretrain_documents.answering import answer_logits, misread, pack, train_answers
from studies.pretrain_documents.fonts import OWN, faces
from studies.pretrain_documents.targets import Alphabet, letters_of, shown, tokens_of
from studies.pretrain_documents.tower import Reader, batch, loose_page, train_tower
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
    packed = pack(processor.tokenizer, asked)
    with torch.no_grad():
        logits, wanted = answer_logits(model, packed, Reader(model, [0])(page)[0])
        for number, row in enumerate(rows, start=1):
            alone = Collator(processor)([{**row, "images": rows[0]["images"]}])
            labels = alone.pop("labels")[:, 1:]
            expected = model(**alone).logits[0, :-1][labels[0] >= 0]
            mine = packed.questions == number
            assert wanted[mine].tolist() == labels[0][labels[0] >= 0][: mine.sum()].tolist()
            torch.testing.assert_close(logits[mine], expected[: mine.sum()], atol=1e-4, rtol=1e-4)


class Killed(Exception):
    pass


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints every step, and pages held out by the handful."""
    monkeypatch.setattr(tower, "SAVE_EVERY", 1)
    monkeypatch.setattr(answering, "SAVE_EVERY", 1)
    monkeypatch.setattr(tower, "HELD_OUT", 1)
    monkeypatch.setattr(answering, "HELD_OUT", 1)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("stage", ["tower", "answers", "together"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(stage: str, tmp_path: Path) -> None:
    train: Any = train_tower if stage == "tower" else partial(train_answers, ideal=stage == "answers")

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


@pytest.mark.usefixtures("short")
def test_the_command_writes_what_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_decoder import tiny_decoder, tiny_tokenizer

    monkeypatch.setattr(pretrain_documents, "load_decoder", lambda source: (tiny_decoder(), tiny_tokenizer()))
    out = tmp_path / "ours.safetensors"
    steps = ["--tower-steps", "1", "--answer-steps", "1", "--steps", "1"]
    pretrain_documents.main(["--out", str(tmp_path), *steps, "--weights", str(out)])
    assert 0 < out.stat().st_size < 25_000_000
