"""Controlled skipping of an evaluation: every unit alone, growing sets and the 2x2 experiment, on the dense model."""

from collections.abc import Callable
from typing import Any

from skipit.eval.measure.runner import completed
from skipit.router import InputError, RouterConfig, attach, detach
from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel
from skipit.theory.inputs import to_model
from skipit.theory.profile import Profile
from skipit.train.data.collate import Collator, batches
from skipit.train.display import note, progress

from .growing import growing_plans, measure_growing, unit_orders
from .quadrant_effects import measure_quadrants
from .quadrants import equal_sets, split_quadrants, vision_tables
from .single_units import measure_units

DRAWS = 4  # sets of a quadrant


def controlled_skipping(
    dense: Any,
    processor: Any,
    rows: Any,
    profile: Profile,
    kv: KVPolicy,
    batch_size: int = 16,
    keep: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]] = lambda name, measure: measure(),
) -> dict[str, Any]:
    """Every unit left out alone, growing sets, and the 2x2 experiment, on the dense model.

    Args:
        dense: without gates; it has none afterwards either.
        processor: of it.
        rows: with completions: they are teacher-forced.
        profile: of the dense model.
        kv: K/V policy of skipped tokens.
        batch_size: rows of a batch.
        keep: gives an experiment's figures by its name, from where they are kept or by measuring.

    Returns:
        `units`, `growing` and `quadrants` as JSON has them, the last only where there are enough layers and images.
    """
    complete = [completed(row, number) for number, row in enumerate(rows)]
    read = [to_model(batch, dense) for batch in batches(complete, Collator(processor), batch_size)]
    damage, cost, costs = profile.damage[kv].unit, profile.unit_cost(kv), CostModel.of(dense)
    layers = len(damage)

    def units() -> dict[str, Any]:
        with progress("units", (2 * layers + 1) * len(read)) as advance:
            return measure_units(dense, read, damage, kv, progress=advance).to_json()

    def growing() -> dict[str, Any]:
        # At most 24 sets per order, however deep the model is.
        step = max(1, layers // 12)
        orders = unit_orders(damage, cost)
        plans = [plan for order in orders.values() for plan in growing_plans(order, layers, step)]
        with progress("sets", len({tuple(plan.flatten().tolist()) for plan in plans}) * len(read)) as advance:
            return measure_growing(dense, read, damage, cost, kv, costs=costs, step=step, progress=advance).to_json()

    def quadrants() -> dict[str, Any]:
        redundancy, attention, saved = vision_tables(profile, kv)
        cells = [equal_sets(split_quadrants(of, attention), saved, DRAWS) for of in redundancy.values()]
        sets = {s for by in cells for several in by.values() for s in several}
        with progress("2x2", (len(sets) + 1) * len(read)) as advance:
            by_notion = measure_quadrants(
                dense, read, redundancy, attention, saved, kv, costs=costs, draws=DRAWS, progress=advance
            )
        return {notion: of.to_json() for notion, of in by_notion.items()}

    attach(dense, RouterConfig(kv=kv))
    try:
        measured = {"units": keep("units", units), "growing": keep("growing", growing)}
        try:
            measured["quadrants"] = keep("quadrants", quadrants)
        except InputError as error:  # a shallow model, or rows without images: the other experiments stand
            note(f"the 2x2 experiment is left out: {error}")
    finally:
        detach(dense)
    return measured
