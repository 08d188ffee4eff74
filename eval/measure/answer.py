"""One question about some images, answered by a gated model, with what it executed."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from skipit.router import InputError, running
from skipit.train.data.collate import Collator
from skipit.train.data.rows import Row

from .traced import generate


def open_images(paths: list[Path]) -> list[Any]:
    """Open image files as RGB.

    Raises:
        InputError: a file is missing or no image; the message names it.
    """
    from PIL import Image, UnidentifiedImageError

    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"image {path} cannot be read: {error}") from error
    return images


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        prompt: the question.
        text: what was generated.
        compute: share of the dense decoder's FLOPs executed; None for a dense run.
        depth: layers executed per token; None for a dense run.
        images: that were asked about.
    """

    prompt: str
    text: str
    compute: float | None
    depth: Any
    images: list[Any]

    def draw(self, path: Path) -> None:
        """Save the depth map of the first image and the text.

        Raises:
            InputError: there was no image, or a dense run, which has no depth map.
        """
        from skipit.eval.plots import plot_depth_map

        if self.depth is None:
            raise InputError("a dense run executes every layer for every token: it has no depth map.")
        if not self.images:
            raise InputError("a depth map needs an image, and there was none.")
        depth = self.depth
        question, reply = (shorten(part, 90, placeholder=" ...") for part in (self.prompt, self.text))
        title = f"{question}\n\N{RIGHTWARDS ARROW} {reply}"
        plot_depth_map(
            path, self.images[0], depth.patches.numpy(), depth.tokens, depth.token_depth, depth.layers, title
        )


def answer(
    model: Any,
    processor: Any,
    images: list[Any],
    prompt: str,
    *,
    budget: float | str | None = None,
    dense: bool = False,
    max_new_tokens: int = 64,
) -> Reply:
    """Ask a gated model about images.

    Args:
        model: gated.
        processor: with a chat template.
        images: pictures, in the order of the conversation.
        prompt: the question.
        budget: a calibrated operating point, by its number or its name; None is the default one.
        dense: run every layer for every token.
        max_new_tokens: longest answer.

    Raises:
        RouterConfigError: not a calibrated budget.
        InputError: the processor cannot take the question.
    """
    from .depth import answer_depth

    row = Row({"images": images, "prompt": prompt}, "the question")
    batch = Collator(processor, with_completion=False)([row])
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    settings = {**inputs, "max_new_tokens": max_new_tokens, "do_sample": False}
    if dense:
        with running(mode="dense"):
            ids, trace = model.generate(**settings), None
    else:
        ids, trace = generate(model, return_trace=True, budget=budget, **settings)
    reply = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if trace is None:
        return Reply(prompt, reply, None, None, images)
    depth = answer_depth(trace.trace.steps, ids[0], processor.tokenizer, images=len(images))
    return Reply(prompt, reply, trace.share, depth, images)
