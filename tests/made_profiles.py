"""Profiles made of numbers instead of a model."""

from typing import Any

import torch
from torch import Tensor

from skipit.router.config import KVPolicy
from skipit.theory.cost import CostModel, LayerCost
from skipit.theory.profile import Damage, Profile
from skipit.theory.ridge import RidgeFit


def made_profile(cost: LayerCost, damage: dict[KVPolicy, Tensor], dim: int = 1, **tables: Any) -> Profile:
    """A profile with these tables, ones in every other, and layers that all cost the same; nothing predicts a token."""
    ones = torch.ones_like(damage["retain"])
    nothing = RidgeFit(torch.zeros(*ones.shape, dim), *[torch.zeros(ones.shape)] * 4)
    typical = {kv: unit / tables.get("tokens_per_row", ones) for kv, unit in damage.items()}
    names = ("geometric", "update", "keys", "tokens_per_row")
    counts = {"count": ones.long(), "histogram": ones.long()[..., None]}
    var = dict.fromkeys(("var_text", "var_last"), ones[:, 0])
    return Profile(
        **{**dict.fromkeys(names, ones), **counts, **var, **tables},
        damage={kv: Damage(unit, unit, typical[kv], nothing) for kv, unit in damage.items()},
        costs=CostModel((cost,) * len(ones)),
        model="made",
        about={"rows": 8},
    )
