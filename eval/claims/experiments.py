"""Experiments of an evaluation beyond answering rows: controlled skipping, spending by input, examples of depth."""

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from numpy.typing import ArrayLike
from torch import Tensor

from skipit.eval.measure.answer import answer
from skipit.eval.measure.runner import right_answer
from skipit.router import InputError, RouterConfig, attach, detach
from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel
from skipit.theory.profile import Profile
from skipit.train.data.collate import Collator, batches
from skipit.train.display import note, progress

from .growing import growing_plans, measure_growing, unit_orders
from .pattern import find_pattern
from .quadrant_effects import measure_quadrants
from .quadrants import equal_sets, split_quadrants, vision_tables
from .single_units import measure_units
from .spending import Spending, measure_spending

EXAMPLES = 3
DRAWS = 4  # sets of a quadrant


def controlled_skipping(
    dense: Any, processor: Any, rows: Any, profile: Profile, kv: KVPolicy, batch_size: int = 16
) -> dict[str, Any]:
    """Every unit left out alone, growing sets, and the 2x2 experiment, on the dense model.

    Args:
        dense: without gates; it has none afterwards either.
        processor: of it.
        rows: with completions: they are teacher-forced.
        profile: of the dense model.
        kv: K/V policy of skipped tokens.
        batch_size: rows of a batch.

    Returns:
        `units`, `growing` and `quadrants` as JSON has them, the last only where there are enough layers and images.
    """
    device = next(dense.parameters()).device
    complete = [_completed(row, number) for number, row in enumerate(rows)]
    read: list[dict[str, Tensor]] = list(batches(complete, Collator(processor), batch_size))
    read = [{name: value.to(device) for name, value in batch.items()} for batch in read]
    damage, cost, costs = profile.damage[kv].unit, profile.unit_cost(kv), CostModel.of(dense)
    layers = len(damage)
    found: dict[str, Any] = {}
    attach(dense, RouterConfig(kv=kv))
    try:
        with progress("units", (2 * layers + 1) * len(read)) as advance:
            found["units"] = measure_units(dense, read, damage, kv, progress=advance).to_json()
        # At most 24 sets per order, however deep the model is.
        step = max(1, layers // 12)
        orders = unit_orders(damage, cost)
        plans = [plan for order in orders.values() for plan in growing_plans(order, layers, step)]
        with progress("sets", len({tuple(plan.flatten().tolist()) for plan in plans}) * len(read)) as advance:
            growing = measure_growing(dense, read, damage, cost, kv, costs=costs, step=step, progress=advance)
        found["growing"] = growing.to_json()
        try:
            redundancy, attention, saved = vision_tables(profile, kv)
            cells = [equal_sets(split_quadrants(of, attention), saved, DRAWS) for of in redundancy.values()]
            sets = {s for by in cells for several in by.values() for s in several}
            with progress("2x2", (len(sets) + 1) * len(read)) as advance:
                by_notion = measure_quadrants(
                    dense, read, redundancy, attention, saved, kv, costs=costs, draws=DRAWS, progress=advance
                )
            found["quadrants"] = {notion: of.to_json() for notion, of in by_notion.items()}
        except InputError as error:  # a shallow model, or rows without images: the other experiments stand
            note(f"the 2x2 experiment is left out: {error}")
    finally:
        detach(dense)
    return found


def spending_by_input(dense: Any, gated: Any, processor: Any, rows: Any) -> Spending:
    """What a router spends on which rows and tokens, and whether its confidence still matches its accuracy.

    Args:
        dense: without gates.
        gated: at the operating point that is its default.
        processor: of both.
        rows: answered by both, one after the other.
    """
    complete = [_completed(row, number) for number, row in enumerate(rows)]
    with progress("spending", 2 * len(complete)) as advance:
        return measure_spending(dense, gated, processor, complete, progress=advance)


def outer_layers(profile: Profile, rates: ArrayLike) -> dict[str, Any] | None:
    """Late entry and early exit of vision tokens as JSON has them; None where there are too few layers or images."""
    try:
        if not bool(profile.var_text.isfinite().any()):
            raise InputError("the profile was measured on rows without images.")
        return find_pattern(profile, rates).to_json()
    except InputError as error:
        note(f"late entry and early exit are left out: {error}")
        return None


def depth_examples(
    model: Any, processor: Any, rows: Any, budget: float | str | None, number: int = EXAMPLES
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Answers of a gated model to a few rows of different kinds, with the depth of every patch and word.

    Returns:
        What the report shows of each, and the images.
    """
    found: list[dict[str, Any]] = []
    pictures: list[Any] = []
    kinds = set()
    for number_of_row, row in enumerate(rows):
        images, kind = list(row.get("images") or ()), str(row.get("kind", number_of_row))
        prompt = _text(row["prompt"])
        if len(found) == number or not images or kind in kinds or prompt is None:
            continue
        kinds.add(kind)
        reply = answer(model, processor, images, prompt, budget=budget)
        wanted = right_answer(row, number_of_row)
        found.append(
            {
                "prompt": prompt,
                "answer": reply.text,
                "wanted": wanted,
                "right": reply.text == wanted,
                "compute": reply.compute,
                "patches": reply.depth.patches.tolist(),
                "tokens": [shorten(token, 40) for token in reply.depth.tokens],
                "token_depth": list(reply.depth.token_depth),
                "layers": reply.depth.layers,
            }
        )
        pictures.append(images[0])
    return found, pictures


def _completed(row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """A row with its completion, which is its answer if it has none."""
    if row.get("completion") is not None:
        return row
    said = [{"type": "text", "text": right_answer(row, number)}]
    return {**row, "completion": [{"role": "assistant", "content": said}]}


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
