import doctest
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, spearmanr
from sklearn.metrics import jaccard_score, roc_auc_score

from skipit.eval.claims import tracking
from skipit.eval.claims.tracking import SCOPES, Given, auroc, overlap, spearman, track
from skipit.eval.statistics import Resampling

FEW = Resampling(resamples=99)
LAYERS = 12
DEPTH = np.linspace(0, 1, LAYERS)[:, None]

Table = NDArray[np.float64]


def rates_from(values: Table) -> Table:
    """Skip rates in (0, 1) that rank units as the values do."""
    return 1 / (1 + np.exp(-values))


def noise(rng: np.random.Generator, scale: float = 1.0) -> Table:
    return scale * rng.normal(size=(LAYERS, 2))


def smooth(rng: np.random.Generator, length: float = 2.0) -> Table:
    """A random profile per modality whose neighbouring layers are alike."""
    layer = np.arange(LAYERS)
    covariance = np.exp(-((layer[:, None] - layer) ** 2) / (2 * length**2)) + 1e-6 * np.eye(LAYERS)
    return np.linalg.cholesky(covariance) @ rng.normal(size=(LAYERS, 2))


def test_the_numbers_in_docstrings() -> None:
    failed, attempted = doctest.testmod(tracking)
    assert failed == 0
    assert attempted > 8


# --- the values, against other implementations

tables = arrays(np.float64, (6, 2), elements=st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))


@settings(deadline=None, max_examples=50)
@given(tables, tables, st.sampled_from(SCOPES))
def test_spearman_is_that_of_scipy(rates: Table, table: Table, scope: str) -> None:
    columns = slice(None) if scope == "all" else slice(0, 1) if scope == "text" else slice(1, 2)
    estimate = spearman(rates, table, scope, resampling=FEW)
    if estimate.reason:
        assert "for all" in estimate.reason
    else:
        assert estimate.value == pytest.approx(
            spearmanr(rates[:, columns].ravel(), table[:, columns].ravel()).statistic
        )


@settings(deadline=None, max_examples=50)
@given(tables, arrays(np.bool_, (6, 2)))
def test_auroc_is_that_of_scikit_learn(rates: Table, theory_set: NDArray[np.bool_]) -> None:
    estimate = auroc(rates, theory_set, resampling=FEW)
    if not estimate.reason:
        assert estimate.value == pytest.approx(roc_auc_score(theory_set.ravel(), rates.ravel()))


def test_exact_p_values_are_those_of_the_published_tests() -> None:
    rng = np.random.default_rng(1)
    rates, table = rng.random((7, 2)), rng.random((7, 2))
    inside = np.arange(7)[:, None] % 2 == np.array([[0, 1]])
    estimate = auroc(rates, inside, "text")
    text, members = rates[:, 0], inside[:, 0]
    assert estimate.p_exact
    assert estimate.p == pytest.approx(mannwhitneyu(text[members], text[~members], method="exact").pvalue)
    # Spearman 1 - 6 * 6 / (7 * 48) of 7 units: 62 of the 5,040 orders are as far from 0.
    rates[:, 0] = np.sort(text)
    table[:, 0] = [2, 1, 4, 3, 6, 5, 7]
    estimate = spearman(rates, table, "text")
    assert estimate.value == pytest.approx(1 - 36 / 336)
    assert estimate.p == pytest.approx(62 / 5040)


def test_partial_correlation_is_the_textbook_formula() -> None:
    rng = np.random.default_rng(2)
    rates, table = rates_from(noise(rng) + DEPTH), noise(rng) - 2 * DEPTH
    layer = np.repeat(np.arange(LAYERS), 2)
    xy, xz, yz = (
        spearmanr(a, b).statistic
        for a, b in [(rates.ravel(), table.ravel()), (rates.ravel(), layer), (table.ravel(), layer)]
    )
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert spearman(rates, table, given="depth").value == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 5, 11])
def test_overlap_of_distinct_values_is_the_jaccard_index(k: int) -> None:
    rng = np.random.default_rng(3)
    rates, table = rng.random((LAYERS, 2)), noise(rng)
    ours = np.zeros(LAYERS, dtype=int)
    theirs = np.zeros(LAYERS, dtype=int)
    ours[np.argsort(-rates[:, 1])[:k]] = 1
    theirs[np.argsort(table[:, 1])[:k]] = 1
    assert overlap(rates, table, "vision", k=k).value == pytest.approx(jaccard_score(ours, theirs))


def test_ties_share_the_last_places() -> None:
    rates = np.zeros((4, 2))
    rates[1] = 1
    table = np.array([[0.0, 3.0], [1.0, 3.0], [1.0, 3.0], [1.0, 3.0]])
    # Two of four: unit 1 and a third of each other one, against unit 0 and a third of each other one.
    assert overlap(rates, table, "text", k=2).value == pytest.approx((4 / 3) / (8 / 3))


def test_the_default_k_is_what_the_router_skips() -> None:
    rng = np.random.default_rng(4)
    rates = np.full((LAYERS, 2), 0.1) + 0.001 * rng.random((LAYERS, 2))
    rates[:5, 1] = 0.9
    table = noise(rng)
    assert overlap(rates, table, "vision") == overlap(rates, table, "vision", k=round(rates[:, 1].sum()))


# --- what the statistics must be able to tell


@pytest.mark.parametrize("scope", SCOPES)
def test_a_router_that_follows_the_theory_is_recognized(scope: str) -> None:
    rng = np.random.default_rng(5)
    table = noise(rng)
    rates = rates_from(-table + noise(rng, 0.2))
    follows = spearman(rates, table, scope)
    assert -1 <= follows.low <= follows.value <= follows.high < -0.5
    assert follows.p < 0.01
    assert follows.p_shift < 0.05
    assert spearman(rates, table, scope, given="depth_curve").value < -0.8
    separates = auroc(rates, table < np.median(table, axis=0), scope)
    assert separates.value > 0.85
    assert separates.low > 0.6
    assert separates.p < 0.05
    shares = overlap(rates, table, scope)
    assert shares.value > 1.5 * shares.chance
    assert shares.p < 0.1  # few units: the weakest of the three


@pytest.mark.parametrize("correlation", [0.0, -0.5, -0.9])
def test_a_known_correlation_is_recovered_inside_its_interval(correlation: float) -> None:
    """A normal pair with Pearson r has Spearman 6/pi asin(r/2); nine in ten 90 % intervals must hold it."""
    rng = np.random.default_rng(6)
    truth = 6 / math.pi * math.asin(correlation / 2)
    estimates = []
    for _ in range(120):
        table = noise(rng)
        rates = rates_from(correlation * table + math.sqrt(1 - correlation**2) * noise(rng))
        estimates.append(spearman(rates, table, resampling=Resampling(confidence=0.9, resamples=299)))
    assert np.mean([estimate.value for estimate in estimates]) == pytest.approx(truth, abs=0.05)
    assert 0.83 <= np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]) <= 0.98


def rejections(
    make: Callable[[np.random.Generator], tuple[Table, Table]], p: str, control: Given | None = None
) -> float:
    """How often a p-value is at most 0.05 over 150 random pairs of tables, over the vision units."""
    rng = np.random.default_rng(7)
    resampling = Resampling(resamples=99)
    pairs = (make(rng) for _ in range(150))
    estimates = [spearman(rates_from(a), b, "vision", given=control, resampling=resampling) for a, b in pairs]
    return float(np.mean([getattr(estimate, p) <= 0.05 for estimate in estimates]))


@pytest.mark.parametrize("control", [None, "depth", "depth_curve"])
def test_unrelated_tables_are_rejected_at_the_nominal_rate(control: Given | None) -> None:
    assert 0.01 <= rejections(lambda rng: (noise(rng), noise(rng)), "p", control) <= 0.09


def test_shifting_survives_smooth_profiles_where_permuting_does_not() -> None:
    def unrelated(rng: np.random.Generator) -> tuple[Table, Table]:
        return smooth(rng), smooth(rng)

    assert rejections(unrelated, "p") > 0.2
    assert rejections(unrelated, "p_shift") <= 0.11


def test_a_pure_depth_confounder_is_removed() -> None:
    def monotone(rng: np.random.Generator) -> tuple[Table, Table]:
        return 3 * DEPTH + noise(rng, 0.5), np.exp(3 * DEPTH + noise(rng, 0.5))

    assert rejections(monotone, "p") > 0.8
    assert rejections(monotone, "p", "depth") <= 0.1


def test_an_early_and_late_pattern_needs_the_curve() -> None:
    def both_ends(rng: np.random.Generator) -> tuple[Table, Table]:
        ends = 12 * (DEPTH - 0.5) ** 2
        return ends + noise(rng, 0.5), ends + noise(rng, 0.5)

    assert rejections(both_ends, "p", "depth") > 0.8
    assert rejections(both_ends, "p", "depth_curve") <= 0.15


def test_modality_alone_is_removed_over_all_units() -> None:
    rng = np.random.default_rng(8)
    offset = np.array([[0.0, 4.0]])
    values = [
        [
            spearman(rates_from(offset + noise(rng)), -offset + noise(rng), given=control, resampling=FEW).value
            for _ in range(40)
        ]
        for control in (None, "depth_modality")
    ]
    assert np.mean(values[0]) < -0.6
    assert abs(np.mean(values[1])) < 0.12


def test_equal_seeds_give_equal_numbers() -> None:
    rng = np.random.default_rng(9)
    rates, table = rates_from(noise(rng)), noise(rng)
    first, again, other = (spearman(rates, table, resampling=Resampling(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.value == other.value
    assert first.low != other.low


# --- nothing to estimate: NaN and a reason


@pytest.mark.parametrize(
    ("rates", "table", "scope", "reason"),
    [
        (np.full((6, 2), 0.5), np.random.default_rng(0).random((6, 2)), "all", "`skip_rate` is 0.5 for all 12 units"),
        (np.random.default_rng(0).random((6, 2)), np.zeros((6, 2)), "text", "`table` is 0 for all 6 units"),
        (
            np.random.default_rng(0).random((3, 2)),
            np.random.default_rng(1).random((3, 2)),
            "text",
            "3 units have a value",
        ),
        (np.full((6, 2), np.nan), np.random.default_rng(0).random((6, 2)), "all", "0 units have a value, at least 4"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "all", "0 units have a value"),
        (np.random.default_rng(0).random((6, 2)), np.full((6, 2), np.inf), "all", "`table` is inf for all 12 units"),
    ],
)
def test_degenerate_input_gives_nan_and_a_reason(rates: Table, table: Table, scope: str, reason: str) -> None:
    for estimate in (spearman(rates, table, scope), overlap(rates, table, scope)):
        assert reason in estimate.reason
        assert all(math.isnan(x) for x in (estimate.value, estimate.low, estimate.high, estimate.p, estimate.p_shift))


def test_more_reasons() -> None:
    rng = np.random.default_rng(10)
    rates = rng.random((6, 2))
    depth = np.repeat(np.arange(6.0), 2).reshape(6, 2)
    assert spearman(rates, depth, given="depth").reason == "`table` is a function of depth alone"
    assert spearman(rates[:5], depth[:5], "text", given="depth_curve").reason.startswith(
        "5 units have a value, at least 6"
    )
    assert auroc(rates, np.ones((6, 2), dtype=bool)).reason == "`theory_set` is 1 for all 12 units"
    assert overlap(rates, depth, k=12).reason == "k = 12 of 12 units leaves nothing to choose"


def test_units_without_tokens_do_not_count() -> None:
    rng = np.random.default_rng(11)
    rates, table = rng.random((LAYERS, 2)), noise(rng)
    rates[2:4, 1] = np.nan
    table[5, 1] = np.nan
    estimate = spearman(rates, table, "vision")
    there = ~np.isnan(rates[:, 1]) & ~np.isnan(table[:, 1])
    assert estimate.units == there.sum() == 9
    assert estimate.value == pytest.approx(spearmanr(rates[there, 1], table[there, 1]).statistic)
    assert math.isnan(estimate.p_shift)
    assert not math.isnan(estimate.p)


def test_skip_rates_that_are_mostly_zero_keep_an_interval() -> None:
    rates = np.zeros((LAYERS, 2))
    rates[7, 1] = 0.5
    estimate = spearman(rates, noise(np.random.default_rng(12)), "vision")
    assert -1 <= estimate.low <= estimate.high <= 1


# --- everything at once


def test_track_covers_tables_scopes_and_confounders() -> None:
    rng = np.random.default_rng(13)
    rates = rng.random((LAYERS, 2))
    cross_attention = noise(rng)
    cross_attention[:, 0] = np.nan
    result = track(
        rates, {"damage": noise(rng), "var": cross_attention}, rates > 0.5, resampling=Resampling(resamples=50, seed=3)
    )
    assert set(result.tables) == {"damage", "var"}
    assert tuple(result.theory_set) == SCOPES
    assert set(result.tables["damage"]["vision"].given) == {"depth", "depth_curve"}
    assert set(result.tables["damage"]["all"].given) == {"depth", "depth_curve", "depth_modality"}
    assert result.tables["var"]["text"].spearman.reason
    assert not result.tables["var"]["vision"].spearman.reason
    parsed = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert parsed["tables"]["var"]["text"]["spearman"]["value"] is None
    assert parsed["tables"]["damage"]["all"]["given"]["depth"]["units"] == 24
    assert parsed["theory_set"]["all"]["value"] == 1.0
    assert parsed["resampling"] == {"confidence": 0.95, "resamples": 50, "seed": 3}


def test_no_theory_set_no_separation() -> None:
    rates = np.random.default_rng(14).random((LAYERS, 2))
    assert track(rates, {"damage": 1 - rates}, resampling=FEW).theory_set == {}


# --- errors

GOOD = np.random.default_rng(15).random((6, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: spearman(GOOD, GOOD[:5]),
            r"`skip_rate` has shape \(6, 2\) and the table \(5, 2\), expected \[layers, 2\]",
        ),
        (lambda: spearman(GOOD.T, GOOD.T), r"`skip_rate` has shape \(2, 6\)"),
        (lambda: overlap(100 * GOOD, GOOD), r"`skip_rate` goes from .* to .*, expected shares in \[0, 1\]"),
        (lambda: spearman(GOOD, GOOD, "audio"), r"`scope` is 'audio', expected one of \['text', 'vision', 'all'\]"),
        (lambda: spearman(GOOD, GOOD, given="colour"), r"`given` is 'colour', expected one of \['depth', .* or None"),
        (
            lambda: auroc(GOOD, GOOD),
            r"`theory_set` holds \[.*\], expected True \(skipped\) or False. Threshold the table",
        ),
        (lambda: overlap(GOOD, GOOD, k=0), r"`k` is 0, expected a positive number of units"),
        (lambda: Resampling(confidence=95), r"`confidence` is 95 and `resamples` 5000, expected a level in \(0, 1\)"),
        (lambda: Resampling(resamples=0), r"`resamples` 0, expected a level in \(0, 1\) and at least 1"),
    ],
)
def test_errors_say_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
