"""Sets of layers for the 2x2 experiment: high or low redundancy, much or little cross-attention, at equal compute.

The rule of Hartman et al., "Skip-It?" (arXiv 2509.25584), skips vision tokens where redundancy is high *and* text
hardly attends to them. To see what each of the two conditions is worth, both are split at their median over layers and
sets from all four quadrants are skipped. The split, and how sets are made equal in FLOPs, are ours.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from skipit.router import VISION, InputError
from skipit.router.config import KVPolicy
from skipit.theory.profile import Profile

BOTH, REDUNDANT, UNATTENDED, NEITHER = (
    "redundant, unattended",
    "redundant, attended",
    "not redundant, unattended",
    "not redundant, attended",
)
QUADRANTS = (BOTH, REDUNDANT, UNATTENDED, NEITHER)
# Random orders of a quadrant's layers tried for each set that is wanted: many give a set that is there already.
_TRIES = 20


def vision_tables(
    profile: Profile, kv: KVPolicy
) -> tuple[dict[str, Float[Tensor, " layers"]], Float[Tensor, " layers"], Float[Tensor, " layers"]]:
    """What the experiment needs of a profile, for vision tokens: redundancy, cross-attention, FLOPs that a skip saves.

    Args:
        profile: of the model.
        kv: K/V policy of the skips.

    Returns:
        "geometric" and "damage", small where redundant; VAR, the larger of that of the last prompt token and that of
        all text queries, as in `skipit.theory.modes.redundant_and_unattended`; FLOPs saved per row.
    """
    redundancy = {"geometric": profile.geometric[:, VISION].double(), "damage": profile.damage[kv].unit[:, VISION]}
    return redundancy, profile.attention, profile.unit_cost(kv)[:, VISION]


def split_quadrants(redundancy: ArrayLike, attention: ArrayLike) -> dict[str, tuple[int, ...]]:
    """The layers of each quadrant: both measures are split at their median, and small means redundant or unattended.

    A layer at a median (the middle one of an odd number, or several that are equal) belongs to no quadrant.

    Args:
        redundancy: of every layer, small where redundant; NaN layers belong to no quadrant.
        attention: VAR of every layer, in [0, 1]; NaN as above.

    Raises:
        InputError: the two have different shapes, or fewer than four layers have both values.

    Example:
        >>> split_quadrants([0.1, 0.2, 0.8, 0.9], [0.0, 0.6, 0.1, 0.7])["redundant, unattended"]
        (0,)
    """
    redundant, attended = np.asarray(redundancy, np.float64), np.asarray(attention, np.float64)
    there = np.isfinite(redundant) & np.isfinite(attended) if redundant.shape == attended.shape else np.zeros(0, bool)
    if redundant.ndim != 1 or there.sum() < len(QUADRANTS):
        raise InputError(
            f"`redundancy` and `attention`: got shapes {redundant.shape} and {attended.shape}, {int(there.sum())} "
            "layers with both values, expected [layers] with at least 4. Profile the model on rows with images."
        )
    of_redundancy, of_attention = (
        np.where(there, np.sign(values - np.median(values[there])), 0) for values in (redundant, attended)
    )
    signs = {BOTH: (-1, -1), REDUNDANT: (-1, 1), UNATTENDED: (1, -1), NEITHER: (1, 1)}
    return {
        name: tuple(int(layer) for layer in np.flatnonzero((of_redundancy == a) & (of_attention == b)))
        for name, (a, b) in signs.items()
    }


def equal_sets(
    quadrants: Mapping[str, Sequence[int]], cost: ArrayLike, draws: int = 4, seed: int = 0
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Sets of layers from each quadrant that save as many FLOPs as the whole of the smallest quadrant that has any.

    Where a quadrant has more, layers are taken in random order as long as they fit, several times, so that no one
    choice decides. Where layers differ in cost a set may save less than the smallest quadrant, never more.

    Args:
        quadrants: layers by name of the quadrant.
        cost: FLOPs that skipping a layer saves.
        draws: most sets of a quadrant.
        seed: of the random orders.

    Returns:
        Different sets of each quadrant, none for an empty one.

    Raises:
        InputError: `draws` is below 1.

    Example:
        >>> sets = equal_sets({"a": (0,), "b": (1, 2), "c": ()}, cost=[1.0, 1.0, 1.0])
        >>> sets["a"], sorted(sets["b"]), sets["c"]
        (((0,),), [(1,), (2,)], ())
    """
    if draws < 1:
        raise InputError(f"`draws`: got {draws}, expected how many sets of a quadrant to measure, at least 1.")
    saved = np.asarray(cost, np.float64)
    totals = [saved[list(layers)].sum() for layers in quadrants.values() if layers]
    common = min(totals, default=0.0) * (1 + 1e-9)
    rng = np.random.default_rng(seed)
    sets: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, layers in quadrants.items():
        different: dict[tuple[int, ...], None] = {}
        for _ in range(_TRIES * draws if layers else 0):
            different[_fill(rng.permutation(layers).tolist(), saved, common)] = None
            if len(different) == draws:
                break
        # A layer that costs more than all of the smallest quadrant fits into no set.
        sets[name] = tuple(chosen for chosen in different if chosen)
    return sets


def _fill(order: Sequence[int], cost: NDArray[np.float64], limit: float) -> tuple[int, ...]:
    chosen, spent = [], 0.0
    for layer in order:
        if spent + cost[layer] <= limit:
            chosen.append(layer)
            spent += float(cost[layer])
    return tuple(sorted(chosen))
