"""From rows in the conversational vision format to batches of a model, with labels on the completion only."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipit.router import InputError

IGNORE = -100
REQUIRED = ("images", "prompt", "completion")


@dataclass(frozen=True)
class Collator:
    """Turns rows with `images`, `prompt` and `completion` (TRL's conversational vision format) into a batch.

    Args:
        processor: the model's processor, with a chat template.
        with_completion: True for training and profiling: the completion follows the prompt and has labels.
            False for generation: prompts only, padded on the left.
    """

    processor: Any
    with_completion: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows.

        Raises:
            InputError: a column is missing, an image cannot be read, or images and placeholders do not match; the
                message names the row.
        """
        prompts = [self._prompt(row, number) for number, row in enumerate(rows)]
        images = [list(row["images"]) for row in rows]
        texts = [self._template([*p, *_turns(r["completion"])], False) for p, r in zip(prompts, rows, strict=True)]
        starts = [self._template(prompt, True) for prompt in prompts]
        if not self.with_completion:
            return self._process(starts, images, "left")
        batch = self._process(texts, images, "right")
        # The prompt alone, expanded the same way, says where the completion begins.
        lengths = self._process(starts, images, "right")["attention_mask"].sum(-1)
        place = torch.arange(batch["input_ids"].shape[1])
        inside = (place >= lengths[:, None]) & batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~inside, IGNORE)
        return batch

    def _prompt(self, row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        if missing := [name for name in REQUIRED if name not in row]:
            raise InputError(
                f"row {number}: no column {', '.join(missing)}; found: {', '.join(row)}. "
                "Rows need images, prompt and completion (TRL's conversational vision format)."
            )
        return _turns(row["prompt"])

    def _template(self, turns: list[dict[str, Any]], generation: bool) -> str:
        text: str = self.processor.apply_chat_template(turns, add_generation_prompt=generation, tokenize=False)
        return text

    def _process(self, texts: list[str], images: list[list[Any]], side: str) -> dict[str, Tensor]:
        given = images if any(images) else None
        try:
            batch = self.processor(
                images=given, text=texts, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt"
            )
        except (ValueError, TypeError, OSError) as error:
            raise InputError(f"a batch of {len(texts)} rows cannot be processed: {error}") from error
        return dict(batch)


def _turns(messages: Any) -> list[dict[str, Any]]:
    """Messages as chat templates want them: a data set fills keys a part lacks with None."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    turns = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{key: value for key, value in part.items() if value is not None} for part in content]
        turns.append({"role": message["role"], "content": content})
    return turns


def batches(rows: Any, collate: Collator, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of consecutive rows of a data set, the last one possibly smaller.

    Raises:
        InputError: the data set is empty.
    """
    held: list[Mapping[str, Any]] = []
    empty = True
    for row in rows:
        empty = False
        held.append(row)
        if len(held) == batch_size:
            yield collate(held)
            held = []
    if held:
        yield collate(held)
    if empty:
        raise InputError("the data set is empty; expected at least one row.")
