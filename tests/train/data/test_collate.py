"""Rows become batches whose labels cover the completion and nothing else; errors name the row."""

import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from skipit.router import InputError
from skipit.train.data.collate import Collator, batches, forgiving
from skipit.train.data.rows import Broken, Row, Rows
from skipit.train.reference.data import reference_dataset
from studies.architecture import IMAGE_TOKENS, build_processor


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module")
def rows() -> Any:
    return reference_dataset("train", 6)


def picture(mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (48, 48))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    """A row of the simplest form: plain text."""
    plain = {"images": [picture()], "prompt": "read the top row .", "completion": "1 2 3"}
    return {k: v for k, v in (plain | changes).items() if v is not ...}


def unpadded(batch: dict[str, Tensor], row: int) -> list[int]:
    return batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()


def test_labels_cover_the_completion(processor: Any, rows: Any) -> None:
    batch = Collator(processor)(list(rows))
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    for number, item in enumerate(rows):
        labels = batch["labels"][number]
        answer = processor.tokenizer.decode(labels[labels != -100])
        assert answer.replace("</s>", "").strip() == item["answer"]
        assert answer.endswith("</s>")  # the model learns to stop
        assert torch.equal(labels[labels != -100], batch["input_ids"][number][labels != -100])
        length = int(batch["attention_mask"][number].sum())
        assert batch["attention_mask"][number, :length].all()  # padded on the right
        assert (labels[length:] == -100).all()
        assert (batch["input_ids"][number] == processor.image_token_id).sum() == IMAGE_TOKENS


def test_prompts_alone_are_the_beginning(processor: Any, rows: Any) -> None:
    full, prompts = Collator(processor)(list(rows)), Collator(processor, with_completion=False)(list(rows))
    assert "labels" not in prompts
    assert prompts["attention_mask"][:, -1].all()  # padded on the left
    for number in range(len(rows)):
        start = unpadded(prompts, number)
        assert unpadded(full, number)[: len(start)] == start
        assert (full["labels"][number, : len(start)] == -100).all()
        assert full["labels"][number, len(start)] != -100
    assert torch.equal(full["pixel_values"], prompts["pixel_values"])


def test_a_row_does_not_depend_on_its_batch(processor: Any, rows: Any) -> None:
    together = Collator(processor)(list(rows))
    for number, item in enumerate(rows):
        alone = Collator(processor)([item])
        assert unpadded(together, number) == unpadded(alone, 0)
        assert torch.equal(together["pixel_values"][number], alone["pixel_values"][0])


def test_forms_of_a_row_mean_the_same(processor: Any) -> None:
    image = picture()
    parts = [{"type": "image"}, {"type": "text", "text": "read the top row ."}]
    with_gaps = [{"type": "image", "text": None}, {"type": "text", "text": "read the top row ."}]
    forms = [
        row(images=[image]),
        row(
            prompt=[{"role": "user", "content": "read the top row ."}],
            completion=[{"role": "assistant", "content": "1 2 3"}],
        ),
        row(prompt=[{"role": "user", "content": parts}]),
        row(prompt=[{"role": "user", "content": with_gaps}]),
        row(images=[{"bytes": png(image), "path": None}]),
        row(images=[image.convert("L")]),
        row(images=[image.convert("P")], other="column"),
    ]
    batch = Collator(processor)(forms)
    for tensor in batch.values():
        assert all(torch.equal(tensor[0], one) for one in tensor)


def test_a_conversation_is_asked_about_its_last_answer(processor: Any) -> None:
    said = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "read the top row ."}]},
        {"role": "assistant", "content": "1 2 3"},
        {"role": "user", "content": "count 3 ."},
        {"role": "assistant", "content": "1"},
    ]
    whole = {"images": [picture()], "messages": said}
    apart = {"images": [picture()], "prompt": said[:3], "completion": said[3:]}
    ours, theirs = (next(batches([one], Collator(processor), 1)) for one in (whole, apart))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    labels = ours["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]).replace("</s>", "").strip() == "1"
    for bad in (said[:3], said[3:], "read it", [{}, "1"]):
        with pytest.raises(
            InputError, match=r"row 0: no column prompt, completion; found: images, messages\. .* the assistant has"
        ):
            list(batches([{**whole, "messages": bad}], Collator(processor), 1))


def test_files(processor: Any, tmp_path: Any) -> None:
    (tmp_path / "a.png").write_bytes(png(picture()))
    path = str(tmp_path / "a.png")
    batch = Collator(processor)([row(images=[path]), row(images=[{"path": path, "bytes": None}]), row()])
    assert all(torch.equal(batch["pixel_values"][0], one) for one in batch["pixel_values"])


def test_several_images_and_none(processor: Any) -> None:
    batch = Collator(processor)([row(images=[picture()] * 2), row(images=[]), row(images=None), row()])
    counts = (batch["input_ids"] == processor.image_token_id).sum(-1) // IMAGE_TOKENS
    assert counts.tolist() == [2, 0, 0, 1]
    assert len(batch["pixel_values"]) == 3
    assert "pixel_values" not in Collator(processor)([row(images=[])])


CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]}]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            row(images=...),
            "no column images; found: prompt, completion. Rows need images or videos, prompt and completion",
        ),
        (row(prompt=..., completion=...), "no column prompt, completion; found: images. Rows need"),
        (row(images=[{"bytes": b"no picture", "path": None}]), "image 0 cannot be read: cannot identify image file"),
        (row(images=[picture(), "/no/such/file.png"]), r"image 1 cannot be read: .*No such file"),
        (row(images=[{"bytes": png(picture())[:60], "path": None}]), "image 0 cannot be read"),
        (row(prompt=CHAT), "its prompt has 2 image parts, its `images` 1. Each image needs one part"),
        (row(prompt=3), "`prompt` is not a text or a list of messages with role and content: 3"),
        (row(completion=[{"content": "x"}]), "`completion` is not a text or a list of messages with role and content"),
        (row(prompt=[{"role": "user", "content": [3]}]), "`prompt` is not a text or a list of messages"),
        (row(prompt="an <image> ?"), "2 image tokens, 1 images. Its text must not hold `<image>` itself"),
        (row(images=["x".join], prompt="?"), "the processor cannot take it"),
    ],
)
def test_bad_rows_are_named(processor: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^row 1 of the batch: .*{message}"):
        Collator(processor)([row(), bad])
    # Read through a data set, a row has its number there.
    with pytest.raises(InputError, match=f"^row 2: .*{message}"):
        list(batches([row(), row(), bad], Collator(processor), 2))
    with pytest.raises(InputError, match=f"^row 2: .*{message}"):
        Collator(processor)([Rows([row(), row(), bad])[2]])


def test_generation_needs_no_completion(processor: Any) -> None:
    batch = Collator(processor, with_completion=False)([row(completion=...)])
    assert len(batch["input_ids"]) == 1


def test_a_template_that_refuses(processor: Any) -> None:
    class Strict:
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise RuntimeError("roles must alternate")

    message = "^row 0 of the batch: the processor's chat template refuses its messages: roles must alternate"
    with pytest.raises(InputError, match=message):
        Collator(Strict())([row()])


def test_rows_that_fit_alone_but_not_together(processor: Any) -> None:
    class Picky:
        image_token = None
        apply_chat_template = processor.apply_chat_template

        def __call__(self, images: Any, text: list[str], **options: Any) -> Any:
            if len(text) > 1:
                raise ValueError("not of one size")
            return processor(images=images, text=text, **options)

    with pytest.raises(
        InputError, match="row 0 of the batch to row 1 of the batch cannot be processed together: not of"
    ):
        Collator(Picky())([row(), row()])


def test_batches(processor: Any, rows: Any) -> None:
    sizes = [len(batch["input_ids"]) for batch in batches(rows, Collator(processor), 4)]
    assert sizes == [4, 2]
    with pytest.raises(InputError, match="the data set is empty; expected at least one row"):
        list(batches([], Collator(processor), 4))


def test_rows_that_cannot_be_decoded() -> None:
    class Broken:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 1:
                raise OSError("truncated")
            if index > 1:
                raise IndexError
            return row()

    data = Rows(Broken())
    assert len(data) == 2
    assert data[0].where == "row 0"
    with pytest.raises(InputError, match="row 1 cannot be read: truncated"):
        data[1]
    with pytest.raises(IndexError):
        data[2]
    with pytest.raises(InputError, match="row 1 cannot be read: truncated"):
        list(batches(Broken(), Collator(build_processor()), 4))


def test_others_stand_for_rows_that_only_the_processor_refuses() -> None:
    seen: list[list[str]] = []

    def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
        seen.append([row.where for row in rows])
        if bad := next((row.where for row in rows if row["bad"]), None):
            raise InputError(f"{bad}: the processor cannot take it")
        return {"input_ids": torch.tensor([[int(row.where[-1])] for row in rows])}

    told: list[str] = []
    broken = Broken(1, told.append)
    rows = [Row({"bad": number == 1}, f"row {number}") for number in range(4)]
    together = forgiving(collate, broken)
    assert together(rows)["input_ids"].flatten().tolist() == [0, 2, 3, 0]
    assert together(rows)["input_ids"].shape == (4, 1), "met again it is not counted again"
    assert told == ["skipped: row 1: the processor cannot take it"]
    del seen[:]
    together(rows[2:])
    assert seen == [["row 2", "row 3"]], "what is whole is processed once"
    with pytest.raises(InputError, match="row 1: the processor cannot take it"):
        together(rows[1:2])
    with pytest.raises(InputError, match="more than 1 rows cannot be read"):
        together([Row({"bad": True}, "row 9"), *rows])
    with pytest.raises(InputError, match="row 1: the processor cannot take it"):
        forgiving(collate, Broken())(rows)
