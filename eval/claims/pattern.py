"""Late entry and early exit, found or not: in a model's measures, and in what a router has learned to skip.

Hartman et al., "Skip-It?" (arXiv 2509.25584), report that early and late vision tokens are redundant and fusion happens
in between. Here that is a question to each model: how long are the first and the last stretch of layers that their rule
allows vision to skip, how long are those that the router does skip, and does vision skip the first and the last third
of the layers more than the middle one? Every verdict is computed; the rule behind it is stated with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from skipit.eval.measure.recorded import STRATA, Record
from skipit.eval.statistics import LEVEL, ROUNDING, USUAL, Figures, Floats, Interval, Resampling, row_interval
from skipit.router import VISION, InputError
from skipit.theory.modes import redundant_and_unattended, span_of
from skipit.theory.profile import Profile
from skipit.train.display import note

Verdict = Literal["found", "not found", "not shown"]
ENTRY, EXIT, BOTH = "late entry", "early exit", "both"


@dataclass(frozen=True)
class Stretch(Figures):
    """The layers at one end of the decoder that a router skips without a gap.

    Attributes:
        length: in layers, with its interval over rows.
        p: probability of one as long or longer if as many skipped layers lay anywhere: with k of L layers skipped and a
            stretch of n it is C(L - n, k - n) / C(L, k). It takes neighbouring layers for independent.
    """

    length: Interval
    p: float


@dataclass(frozen=True)
class Outer(Figures):
    """How much more vision skips an outer third of the layers than the middle third.

    Attributes:
        difference: of mean skip rates, with its interval over rows.
        p: one-sided, against random orders of the layers; it takes neighbouring layers for independent.
        p_shift: one-sided, against all cyclic shifts of the layers, which keep neighbours; at least 1 / layers.
    """

    difference: Interval
    p: float
    p_shift: float


@dataclass(frozen=True)
class Pattern(Figures):
    """The pattern in a profile and in a router's skips.

    Attributes:
        eps: layers qualify with a geometric redundancy of vision of at most this ...
        nu: ... and a share of text's attention to vision of at most this.
        geometric: of vision tokens, by layer.
        attention: VAR by layer, the larger of that of the last prompt token and of all text queries.
        qualifying: by layer.
        entry: length of the longest qualifying stretch at the start.
        exit: length of the longest qualifying stretch at the end.
        rates: share of vision tokens that skip, by layer, mean over rows.
        thirds: mean skip rate of the "first", "middle" and "last" third of the layers, with intervals over rows.
        early: the first third against the middle.
        late: the last third against the middle.
        most: layers count as skipped by the router where its rate is at least this.
        learned_entry: the skipped layers at the start.
        learned_exit: the skipped layers at the end.
        rows: with vision tokens; 0 where only rates by layer were given, and intervals are NaN.
    """

    derived = ("theory", "learned", "outer")

    eps: float
    nu: float
    geometric: tuple[float, ...]
    attention: tuple[float, ...]
    qualifying: tuple[bool, ...]
    entry: int
    exit: int
    rates: tuple[float, ...]
    thirds: Mapping[str, Interval]
    early: Outer
    late: Outer
    most: float
    learned_entry: Stretch
    learned_exit: Stretch
    rows: int

    @property
    def theory(self) -> dict[str, Verdict]:
        """By the paper's rule: a stretch is found where it has a layer and leaves one; both, where both do.

        One that is as long by chance, if as many layers lay anywhere, is not shown.
        """
        return _stretches(self.entry, self.exit, sum(self.qualifying), len(self.qualifying))

    @property
    def learned(self) -> dict[str, Verdict]:
        """By the router's skips, in the same way; a stretch must have a layer at the low end of its interval, too."""
        ends = (self.learned_entry.length, self.learned_exit.length)
        first, last = (0 if length.low < 1 else int(length.value) for length in ends)
        return _stretches(first, last, sum(rate >= self.most for rate in self.rates), len(self.rates))

    @property
    def outer(self) -> dict[str, Verdict]:
        """Are the "first third" and the "last third" skipped more than the middle?

        Beyond interval and p, and p_shift as far as so few layers allow: on smooth rates p alone is small by chance.
        """
        shift = max(LEVEL, 1 / len(self.rates) + ROUNDING)
        words: dict[str, Verdict] = {}
        for name, o in (("first third", self.early), ("last third", self.late)):
            value, low, high = o.difference.value, o.difference.low, o.difference.high  # NaN without rows
            if value > 0 and not low <= 0 and o.p <= LEVEL and o.p_shift <= shift:
                words[name] = "found"
            else:
                words[name] = "not found" if value <= 0 and not high > 0 else "not shown"
        return words


def row_skip_rates(records: Sequence[Record]) -> Float[Tensor, "rows layers"]:
    """The share of each row's vision tokens that skipped each layer; NaN for rows without any.

    Args:
        records: of all batches, in order.
    """
    rates = []
    for record in records:
        vision = record.real & (record.stratum == STRATA.index("vision"))
        rates.append((~record.run & vision).sum(-1).T.double() / vision.sum(-1, keepdim=True))
    return torch.cat(rates)


def find_pattern(
    profile: Profile,
    rates: ArrayLike,
    *,
    eps: float | None = None,
    nu: float | None = None,
    most: float = 0.5,
    resampling: Resampling = USUAL,
) -> Pattern:
    """Look for late entry and early exit in a profile, by the paper's rule, and in a router's skips of vision tokens.

    Args:
        profile: of the dense model.
        rates: skip rates of vision, [rows, layers] in [0, 1] (`row_skip_rates`), or [layers] without rows.
        eps: threshold of redundancy, in [0, 2]; by default this model's median over layers (ours: the paper leaves both
            thresholds to the user).
        nu: threshold of cross-attention, in [0, 1]; by default this model's median over layers.
        most: rate from which the router counts as skipping a layer.
        resampling: of rows and layers.

    Raises:
        InputError: thresholds or rates are out of range, rates are of another number of layers or fewer than three, no
            row has vision tokens, or the profile has none.
    """
    attention, geometric = profile.attention, profile.geometric[:, VISION]
    eps, nu = (
        float(np.nanmedian(values.double().numpy())) if limit is None else limit
        for limit, values in ((eps, geometric), (nu, attention))
    )
    qualifying = redundant_and_unattended(profile, eps, nu)
    layers = len(qualifying)
    by_row, rows = _checked(rates, layers)
    mean = by_row.mean(0)
    third = layers // 3
    parts = {"first": slice(0, third), "middle": slice(third, layers - third), "last": slice(layers - third, layers)}
    columns = np.stack([by_row[:, part].mean(1) for part in parts.values()], -1)

    def outer(at: int) -> Outer:
        difference = row_interval(columns, lambda means: means[..., at] - means[..., 1], resampling)
        part = list(parts.values())[at]
        return Outer(difference, *_p_values(mean, part, parts["middle"], resampling))

    def stretch(way: slice) -> Stretch:
        def length(means: Floats) -> Floats:
            return np.asarray((means[..., way] >= most).cumprod(-1).sum(-1), np.float64)

        interval, skipped = row_interval(by_row, length, resampling), int((mean >= most).sum())
        return Stretch(interval, _p_stretch(int(interval.value), skipped, layers))

    return Pattern(
        eps,
        nu,
        tuple(geometric.tolist()),
        tuple(attention.tolist()),
        tuple(qualifying.tolist()),
        span_of(profile, qualifying, "late-entry").entry,
        layers - span_of(profile, qualifying, "early-exit").exit,
        tuple(mean.tolist()),
        {name: row_interval(columns[:, at], None, resampling) for at, name in enumerate(parts)},
        outer(0),
        outer(2),
        most,
        stretch(slice(None)),
        stretch(slice(None, None, -1)),
        rows,
    )


def outer_layers(profile: Profile, rates: ArrayLike) -> dict[str, Any] | None:
    """Late entry and early exit of vision tokens as JSON has them; None where there are too few layers or images."""
    try:
        if not bool(profile.var_text.isfinite().any()):
            raise InputError("the profile was measured on rows without images.")
        return find_pattern(profile, rates).to_json()
    except InputError as error:
        note(f"late entry and early exit are left out: {error}")
        return None


def _checked(rates: ArrayLike, layers: int) -> tuple[Floats, int]:
    """Rates of the rows that have vision tokens, and how many; rates by layer alone become one row."""
    table = np.asarray(rates, dtype=np.float64)
    alone = table.ndim == 1
    table = table[None] if alone else table
    if table.ndim != 2 or table.shape[1] != layers or layers < 3:
        raise InputError(
            f"`rates`: got shape {np.shape(rates)} for a profile of {layers} layers, expected [rows, layers] or "
            "[layers] with at least 3 layers. Pass the vision column of skip rates, of the same model as the profile."
        )
    table = table[np.isfinite(table).all(1)]
    if not len(table) or table.min() < 0 or table.max() > 1:
        between = f"values from {table.min():g} to {table.max():g}" if len(table) else "no row with vision tokens"
        raise InputError(f"`rates`: got {between}, expected shares in [0, 1] of at least one row with an image.")
    return table, 0 if alone else len(table)


def _p_values(rates: Floats, part: slice, middle: slice, resampling: Resampling) -> tuple[float, float]:
    """How often layers in another order show as large a difference: in random orders, and in shifted ones."""

    def difference(order: Floats) -> Floats:
        return np.asarray(order[:, part].mean(1) - order[:, middle].mean(1))

    rng = np.random.default_rng(resampling.seed)
    orders = rng.permuted(np.tile(rates, (resampling.resamples, 1)), axis=1)
    # The order itself is one of all (Phipson and Smyth 2010); the margin makes values equal that are but for rounding.
    observed = float(difference(rates[None])[0]) - 1e-12
    p = (1 + float((difference(orders) >= observed).sum())) / (1 + resampling.resamples)
    shifted = np.stack([np.roll(rates, by) for by in range(len(rates))])
    return p, float((difference(shifted) >= observed).mean())


def _p_stretch(length: int, skipped: int, layers: int) -> float:
    """See `Stretch.p`; of stretches at both ends, with the sum of their lengths."""
    return math.comb(layers - length, skipped - length) / math.comb(layers, skipped)


def _stretches(first: int, last: int, skipped: int, layers: int) -> dict[str, Verdict]:
    words: dict[str, Verdict] = {}
    for name, lengths in ((ENTRY, (first,)), (EXIT, (last,)), (BOTH, (first, last))):
        if not all(lengths) or sum(lengths) >= layers:
            words[name] = "not found"
        else:
            words[name] = "found" if _p_stretch(sum(lengths), skipped, layers) < LEVEL else "not shown"
    return words
