"""A question about some images, answered by a gated model, with what it executed; and examples of a data set."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

from skipit.eval.metrics.vqa import answer_scores
from skipit.router import Drafts, InputError, running
from skipit.router.config import BudgetPer
from skipit.theory.inputs import to_model
from skipit.train.data.collate import Collator
from skipit.train.data.pictures import read_picture
from skipit.train.data.rows import Row, pictures

from .depth import Depth, answer_depth
from .patches import picture_views
from .runner import RIGHT, right_answer, right_answers
from .traced import ONE_PASS, generate

EXAMPLES = 3


def open_images(paths: list[Path]) -> list[Any]:
    """Open image files as those of rows are.

    Raises:
        InputError: a file is missing or no image; the message names it.
    """
    images = []
    for path in paths:
        try:
            images.append(read_picture(path))
        except InputError as error:
            raise InputError(f"image {path} cannot be read: {error}") from error
    return images


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        prompt: the question.
        text: what was generated.
        compute: share of the dense decoder's FLOPs executed; None for a dense run or a lossless one.
        images: that were asked about, open.
        lay_out: makes `depth` of what ran; None as above.
        drafts: what a lossless run has drafted; None for any other.
    """

    prompt: str
    text: str
    compute: float | None
    images: list[Any]
    lay_out: Callable[[], Depth] | None = None
    drafts: Drafts | None = None

    @cached_property
    def depth(self) -> Any:
        """Layers executed per token, a `Depth`; None for a dense run or a lossless one.

        Raises:
            InputError: where its patches lie in the picture is not known.
        """
        return None if self.lay_out is None else self.lay_out()

    @property
    def seen(self) -> Any:
        """The first image as the model's processor received it: without what it crops, with what it pads."""
        left, top, right, bottom = self.depth.area
        return self.images[0].crop((round(left), round(top), round(right), round(bottom)))

    def draw(self, path: Path) -> None:
        """Save the depth map of the first image and the text.

        Raises:
            InputError: there was no image, a dense run, which has no depth map, or a processor whose patches are not
                known to lie anywhere.
        """
        from skipit.eval.plots import plot_depth_map

        try:
            depth = self.depth
        except InputError as error:
            raise InputError(f"{error} A depth map cannot be drawn for it; leave out `--depth-map`.") from error
        if depth is None:
            raise InputError("a dense run executes every layer for every token: it has no depth map.")
        if not self.images:
            raise InputError("a depth map needs an image, and there was none.")
        question, reply = (shorten(part, 90, placeholder=" ...") for part in (self.prompt, self.text))
        title = f"{question}\n\N{RIGHTWARDS ARROW} {reply}"
        plot_depth_map(path, self.seen, depth.patches.numpy(), depth.tokens, depth.token_depth, depth.layers, title)


def answer(
    model: Any,
    processor: Any,
    images: list[Any],
    prompt: str,
    *,
    budget: float | str | None = None,
    budget_per: BudgetPer | None = None,
    dense: bool = False,
    lossless: bool = False,
    draft_budget: float | str | None = None,
    draft_tokens: int | None = None,
    max_new_tokens: int = 64,
) -> Reply:
    """Ask a gated model about images.

    Args:
        model: gated.
        processor: with a chat template.
        images: pictures, in the order of the conversation.
        prompt: the question.
        budget: a calibrated operating point, by its number or its name; None is the default one.
        budget_per: as of `model.generate`.
        dense: run every layer for every token.
        lossless: the dense model's answer, drafted by the gated one; as of `model.generate`.
        draft_budget: the same.
        draft_tokens: the same.
        max_new_tokens: longest answer.

    Raises:
        RouterConfigError: not a calibrated budget.
        InputError: the processor cannot take the question.
    """
    images = pictures({"images": images}, "the question")
    row = Row({"images": images, "prompt": prompt}, "the question")
    batch = Collator(processor, with_completion=False)([row])
    inputs = to_model(batch, model)
    settings = {**inputs, **ONE_PASS, "max_new_tokens": max_new_tokens, "do_sample": False}
    trace = drafts = None
    if dense:
        with running(mode="dense"):
            ids = model.generate(**settings)
    elif lossless:
        drafting = {"draft_budget": draft_budget, "draft_tokens": draft_tokens}
        ids, drafts = generate(model, return_trace=True, lossless=True, **drafting, **settings)  # type: ignore[arg-type]
    else:
        ids, trace = generate(model, return_trace=True, budget=budget, budget_per=budget_per, **settings)
    reply = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if trace is None:
        return Reply(prompt, reply, None, images, drafts=drafts)

    def lay_out() -> Depth:
        views = picture_views(model, processor, row) if images else []
        return answer_depth(trace.trace.steps, ids[0], processor.tokenizer, views)

    return Reply(prompt, reply, trace.share, images, lay_out)


def depth_examples(
    model: Any, processor: Any, rows: Any, budget: float | str | None, number: int = EXAMPLES
) -> tuple[list[dict[str, Any]], list[Any], str]:
    """Answers of a gated model to a few rows of different kinds, with the depth of every patch and word.

    Returns:
        What the report shows of each, the images as the processor received them, and why there is none, if there is.
    """
    examples: list[dict[str, Any]] = []
    seen: list[Any] = []
    kinds = set()
    for number_of_row, row in enumerate(rows):
        kind, prompt = str(row.get("kind", number_of_row)), _text(row["prompt"])
        if len(examples) == number or kind in kinds or prompt is None:
            continue
        images = pictures(row, f"row {number_of_row}")
        if not images:
            continue
        kinds.add(kind)
        reply = answer(model, processor, images, prompt, budget=budget)
        try:
            depth = reply.depth
        except InputError as error:  # it is not known where its patches lie
            return examples, seen, str(error)
        wanted = right_answer(row, number_of_row)
        right = answer_scores([reply.text], [right_answers(row, number_of_row)])[0] >= RIGHT
        examples.append(
            {
                "prompt": prompt,
                "answer": reply.text,
                "wanted": wanted,
                "right": bool(right),
                "compute": reply.compute,
                "patches": depth.patches.tolist(),
                "tokens": [shorten(token, 40) for token in depth.tokens],
                "token_depth": list(depth.token_depth),
                "layers": depth.layers,
            }
        )
        seen.append(reply.seen)
    return examples, seen, "" if examples else "no row has an image and a question of one turn."


def _text(prompt: Any) -> str | None:
    """The question of a row of one turn; None for a longer conversation, which cannot be asked again as one prompt."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) != 1:
        return None
    content = prompt[0]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("text")) or None
