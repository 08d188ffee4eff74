"""Profiles from rows: of a whole vision-language model, or of one part alone, its vision tower or a bare encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from skipit.router.checkpoint import load_dense
from skipit.router.errors import CheckpointError
from skipit.router.files import check_files
from skipit.router.paths import check_there, is_path
from skipit.theory.backbone import Backbone, profile_backbone
from skipit.theory.profile import Profile, profile
from skipit.train.data.collate import Collator, batches
from skipit.train.data.rows import Broken, Row, check_columns, pictures, training_rows, turns_of
from skipit.train.data.sources import resolve_model
from skipit.train.data.used import RECORD, Noted


def profile_model(model: Any, processor: Any, rows: Any, *, batch_size: int = 16, **options: Any) -> Profile:
    """Measure a dense model on rows in the conversational vision format; options as of `profile`."""
    collate, noted = Collator(processor), Noted()
    read = training_rows(rows, noted.noting(collate.checked), Broken())
    measured = profile(model, batches(read, collate, batch_size), **options)
    measured.about[RECORD] = {"profiled": noted.packed()}
    return measured


@dataclass(frozen=True)
class Pictures:
    """Reads the images of rows as a vision encoder wants them; rows without images give an empty batch."""

    processor: Any

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """A batch of all their images.

        Raises:
            InputError: a row has no column `images`, or one that cannot be read; the message names the row.
        """
        for row in rows:
            check_columns(row, row.where, "images")
        images = [image for row in rows for image in pictures(row, row.where)]
        batch = self.processor(images=images, return_tensors="pt") if images else {}
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Texts:
    """Reads the words of rows, prompt and completion, as a text encoder wants them."""

    tokenizer: Any

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """A batch of one text per row, padded.

        Raises:
            InputError: a row has no column `prompt` or `completion`, or no messages in it; the message names the row.
        """
        texts = []
        for row in rows:
            check_columns(row, row.where, "prompt", "completion")
            turns = [*turns_of(row, "prompt", "user", row.where), *turns_of(row, "completion", "assistant", row.where)]
            texts.append(" ".join(_words(turn["content"]) for turn in turns))
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        return dict(self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))


def _words(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def load_part(source: str, part: str) -> tuple[Any, Pictures | Texts]:
    """A vision-language model or a bare encoder, and what reads rows for one part of it.

    Args:
        source: `reference`, a folder, or a Hub id.
        part: "vision" or "text".

    Raises:
        CheckpointError: the model, or what prepares its inputs, cannot be loaded.
    """
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    source = resolve_model(source)
    if is_path(source):
        check_there(Path(source))
    if Path(source).is_dir():
        check_files(Path(source))  # what `load_dense` refuses to read must not be read below either
    try:
        model = load_dense(source)[0]
    except CheckpointError:
        try:
            model = AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"model {source!r} cannot be loaded: {error}") from error
    try:
        if part == "vision":
            return model, Pictures(AutoImageProcessor.from_pretrained(source, trust_remote_code=False))
        return model, Texts(AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        what = "image processor (preprocessor_config.json)" if part == "vision" else "tokenizer"
        raise CheckpointError(
            f"model {source!r} has no {what} that can be loaded: {error}\nSave it beside the weights: "
            "`processor.save_pretrained(FOLDER)`."
        ) from error


def profile_part(
    model: Any, read: Pictures | Texts, rows: Any, *, batch_size: int = 16, layers: str | None = None
) -> Backbone:
    """Measure the redundancy of a part of a model on rows in the conversational vision format.

    Args:
        model: from `load_part`.
        read: from `load_part`; decides which part.
        rows: `images` are read for a vision tower, `prompt` and `completion` for a text encoder.
        batch_size: rows per batch.
        layers: dotted path of the part's layers, where they are not found.

    Raises:
        InputError: no rows, or no image in them.
        DecoderNotFoundError: the layers are not found; the message lists what there is.
    """
    modality = "vision" if isinstance(read, Pictures) else "text"
    return profile_backbone(model, batches(rows, read, batch_size), modality, layers=layers)
