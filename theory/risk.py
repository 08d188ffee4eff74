"""Risk control: statement 12 of docs/theory.md. Which thresholds are certified, decided from counted errors alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import binom
from torch import Tensor

from skipit.router.errors import InputError, SkipItError

# Shares of the gates' decisions that are skips, from safe to fast. Testing in a fixed order needs no correction for
# many tests, so more of them cost time only; the first has to be safe, because nothing passes after a failure.
SKIPPED_SHARES = tuple(share / 100 for share in range(5, 85, 5))


class NotCertifiedError(SkipItError):
    """Not even the safest threshold can be certified."""


@dataclass(frozen=True)
class RiskCertificate:
    """What fixed-sequence testing certified."""

    index: int | None
    """The fastest certified threshold, or None if not even the safest one is."""
    p_values: Float[Tensor, " thresholds"]
    """Exact binomial p-values of "risk > eps", of the thresholds that were not reached too."""


def learn_then_test(errors: Sequence[int], trials: int, eps: float, delta: float) -> RiskCertificate:
    """Statement 12: pick the fastest threshold whose risk is at most eps, with confidence 1 - delta.

    Learn-then-Test (Angelopoulos et al., arXiv 2110.01052) by fixed-sequence testing: from safe to fast, reject "risk >
    eps" while P[Bin(n, eps) <= errors] <= delta, and stop at the first that is not rejected. No correction for many
    tests is needed.

    It assumes that the calibration samples are independent, drawn as the later data are, and that thresholds and their
    order were fixed without looking at them. The confidence is over the draw of the calibration set; the risk is the
    mean over new data.

    Args:
        errors: Wrong answers on the calibration set at each threshold, safest first. Zero-one losses only.
        trials: n, the calibration samples behind every count.
        eps: The risk to certify, in (0, 1).
        delta: The probability with which the certificate may be wrong, in (0, 1).

    Returns:
        The index of the last rejected threshold and all p-values.

    Raises:
        ValueError: If an argument is out of range or there is no sample.

    Example:
        >>> learn_then_test([0, 2, 9, 0], trials=300, eps=0.02, delta=0.05).index
        0
    """
    _check_probability("eps", eps)
    _check_probability("delta", delta)
    if trials < 1:
        raise ValueError(f"`trials` is {trials}, expected 1 or more. Calibrate on at least one sample.")
    wrong = [count for count in errors if not 0 <= count <= trials]
    if wrong:
        raise ValueError(
            f"`errors` holds {wrong[0]}, expected counts from 0 to `trials` = {trials}. Pass wrong answers, not rates."
        )
    p_values = torch.as_tensor(binom.cdf(np.asarray(errors, dtype=np.int64), trials, eps), dtype=torch.float64)
    certified = int((p_values <= delta).long().cumprod(0).sum())
    return RiskCertificate(certified - 1 if certified else None, p_values)


def samples_to_certify(eps: float, delta: float) -> int:
    """The fewest calibration samples with which anything can be certified: the smallest n with (1 - eps)^n <= delta.

    Args:
        eps: The risk to certify, in (0, 1).
        delta: The probability with which the certificate may be wrong, in (0, 1).

    Returns:
        n. With it, only a threshold without a single error passes.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> samples_to_certify(eps=0.02, delta=0.05)
        149
    """
    _check_probability("eps", eps)
    _check_probability("delta", delta)
    # The logarithms may round across an integer, so the last step is taken with the p-value that the test itself uses.
    samples = max(1, math.ceil(math.log(delta) / math.log1p(-eps)) - 1)
    while binom.cdf(0, samples, eps) > delta:
        samples += 1
    return samples


def certify(disagrees: Bool[Tensor, "thresholds rows"], risk: float, confidence: float) -> RiskCertificate:
    """Certify that a threshold changes at most a share `risk` of the answers to new rows.

    Args:
        disagrees: True where a threshold answers a row differently from the dense model; thresholds from safe to fast,
            fixed without looking at these rows, and rows independent of each other.
        risk: share of new rows that may be answered differently, in (0, 1).
        confidence: probability with which the certificate holds, over the draw of the rows, in (0, 1).

    Returns:
        The certificate.

    Raises:
        InputError: too few rows to certify anything.
        ValueError: `risk` or `confidence` is out of range.

    Example:
        >>> never, often = torch.zeros(60, dtype=torch.bool), torch.arange(60) % 3 == 0
        >>> certify(torch.stack([never, often]), risk=0.05, confidence=0.95).index
        0
    """
    check_rows(disagrees.shape[1], risk, confidence)
    return learn_then_test(disagrees.sum(1).tolist(), disagrees.shape[1], risk, 1 - confidence)


def check_rows(rows: int, risk: float, confidence: float) -> None:
    """Refuse to begin when no outcome could be certified.

    Raises:
        InputError: fewer rows than `samples_to_certify`.
        ValueError: `risk` or `confidence` is out of range.
    """
    _check_probability("risk", risk)
    _check_probability("confidence", confidence)
    needed = samples_to_certify(risk, 1 - confidence)
    if rows < needed:
        raise InputError(
            f"{max(rows, 0)} rows to certify with: a risk of {risk:g} with confidence {confidence:g} needs at least "
            f"{needed} (`samples_to_certify`), without a single disagreement. Give more rows, or ask for less."
        )


def allowed_errors(trials: int, eps: float, delta: float) -> int:
    """The most errors with which a threshold still passes; -1 if none does.

    Args:
        trials: n, the calibration samples.
        eps: the risk to certify, in (0, 1).
        delta: the probability with which the certificate may be wrong, in (0, 1).

    Example:
        >>> allowed_errors(936, eps=0.02, delta=0.05)
        11
    """
    _check_probability("eps", eps)
    _check_probability("delta", delta)
    below = binom.cdf(np.arange(trials + 1), trials, eps) <= delta
    return int(below.sum()) - 1


def threshold_grid(logits: Float[Tensor, " decisions"]) -> list[float]:
    """Thresholds from safe to fast: those at which growing shares of the gates' decisions are skips.

    The certificate is valid for every grid that does not depend on the rows it is tested on, so the logits must come
    from other rows. That skipping changes later logits makes the shares approximate and does no other harm.

    Args:
        logits: of any number of decisions, finite.

    Returns:
        Rising thresholds, each of them a logit; a decision equal to the threshold is a skip.

    Raises:
        InputError: there is no logit.

    Example:
        >>> threshold_grid(torch.arange(100.0))[:3]
        [4.0, 9.0, 14.0]
    """
    if logits.numel() == 0:
        raise InputError("no gate decided anything, so there is no threshold to choose. Give rows with tokens.")
    levels = np.quantile(logits.double().numpy(), SKIPPED_SHARES, method="inverted_cdf")
    return sorted(set(levels.tolist()))


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"`{name}` is {value:g}, expected a value in (0, 1). Pass a share strictly between 0 and 1.")
