"""What a linear reader can learn about the answer before and after each layer: matched probes and V-information.

Functional redundancy by probes, and informational redundancy, of docs/theory.md: per layer and modality, held out.
V-information is that of Xu et al., "A Theory of Usable Information Under Computational Constraints" (2020, arXiv
2002.10689). Its family V is here the softmax-linear probes under one L2 penalty. Shannon information of a whole
sequence cannot grow with depth, since each layer's output is a function of its input. V-information can, because
computation makes information usable; and one token, or the mean of one modality, also receives information from other
tokens. To read means is a choice of ours: what differs between tokens and cancels in their mean is not seen.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from skipit.router.errors import InputError

from .pooling import SITES, PooledStates

FEWEST = 8  # rows that an answer must have to be told from the others, half of them to fit on
PENALTY = 1e-2  # on |W|^2 / 2, the same for every layer; docs/evidence.md says how much depends on it
SPLITS = 4  # in halves; one alone leaves more to chance than its standard error over rows says
TOLERANCE = 1e-5  # of the solver's gradient; leaves about 1e-4 nats


class Probe(NamedTuple):
    """A softmax-linear reader of directions: logits W x + b, for x of root mean square 1 or a mean of such.

    Attributes:
        weight: [classes, dim].
        bias: [classes].
        penalty: what was added to its mean loss when it was fitted, in nats.
    """

    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, " classes"]
    penalty: float

    def loss(self, x: Float[Tensor, "rows dim"], z: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Cross-entropy of every row in nats."""
        return F.cross_entropy(self.logits(x), z, reduction="none")

    def logits(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows classes"]:
        """In float64."""
        return x.double() @ self.weight.T + self.bias

    @property
    def norm(self) -> float:
        """B of statement 4: the spectral norm of W on unit directions."""
        return float(torch.linalg.matrix_norm(self.weight, ord=2)) * self.weight.shape[1] ** 0.5


def fit_probe(x: Float[Tensor, "rows dim"], z: Int[Tensor, " rows"], penalty: float = PENALTY) -> Probe:
    """Minimize mean cross-entropy + penalty / 2 |W|^2, which is convex: the same rows give the same probe.

    Args:
        x: Finite states.
        z: Classes 0 to K - 1, each there at least once.
        penalty: Weight of |W|^2 > 0; the bias is free. With two classes W is antisymmetric and pays twice as much.

    Raises:
        InputError: A state is not finite, a class is missing, or there is only one.
    """
    if bad := int((~x.isfinite().all(-1)).sum()):
        raise InputError(f"`x`: {bad} of {len(x)} states are not finite. Leave these rows out.")
    _check_classes(torch.bincount(z))
    # Both change nothing but the solver's time: the bias is free to undo a shift, and under the penalty W stays in the
    # span of the rows, so that a basis of it is enough where states are wide.
    mean = x.double().mean(0)
    centred = x.double() - mean
    basis = torch.linalg.qr(centred.T).Q
    model = LogisticRegression(C=1 / (penalty * len(x)), tol=TOLERANCE, max_iter=5000)
    model.fit((centred @ basis).numpy(), z.numpy())
    weight = torch.from_numpy(model.coef_) @ basis.T
    bias = torch.from_numpy(model.intercept_) - weight @ mean
    paid = penalty / 2 * float(weight.square().sum())
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return Probe(weight, bias, paid)


def _check_classes(counts: Tensor) -> None:
    if len(counts) < 2 or bool((counts == 0).any()):
        raise InputError(f"`z`: rows per class are {counts.tolist()}, expected two classes or more, none without rows.")


def halves(z: Int[Tensor, " rows"], seed: int = 0) -> Bool[Tensor, " rows"]:
    """Split rows in two halves, every class in equal parts."""
    split = StratifiedKFold(2, shuffle=True, random_state=seed)
    second = torch.zeros(len(z), dtype=torch.bool)
    second[torch.from_numpy(next(split.split(np.zeros(len(z)), z.numpy()))[1])] = True
    return second


class HeldOut(NamedTuple):
    """What probes make of rows that they were not fitted on.

    Attributes:
        loss: cross-entropy of each row in nats.
        right: whether the most likely class of each row is its class.
        norm: B of statement 4, the larger of the two probes'.
    """

    loss: Float[Tensor, " rows"]
    right: Bool[Tensor, " rows"]
    norm: float


def held_out(
    x: Float[Tensor, "rows dim"], z: Int[Tensor, " rows"], second: Bool[Tensor, " rows"], penalty: float = PENALTY
) -> HeldOut:
    """What the probe fitted on one half makes of each row of the other.

    Args:
        x: States.
        z: Classes, all of them in both halves.
        second: The half of each row; see `halves`.
        penalty: See `fit_probe`.

    Raises:
        InputError: See `fit_probe`.
    """
    norms = []
    loss, right = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.bool)
    for half in (second, ~second):
        _check_classes(torch.bincount(z[~half], minlength=int(z.max()) + 1))
        probe = fit_probe(x[~half], z[~half], penalty)
        loss[half] = probe.loss(x[half], z[half])
        right[half] = probe.logits(x[half]).argmax(-1) == z[half]
        norms.append(probe.norm)
    return HeldOut(loss, right, max(norms))


def prior_loss(z: Int[Tensor, " rows"], second: Bool[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """The same for the best probe that sees nothing: the class frequencies of the other half. Its mean is H_V(Z)."""
    loss = torch.zeros(len(z), dtype=torch.float64)
    for half in (second, ~second):
        loss[half] = -(torch.bincount(z[~half], minlength=int(z.max()) + 1).double() / int((~half).sum())).log()[
            z[half]
        ]
    return loss


def mean_and_error(
    values: Float[Tensor, "splits units rows"],
) -> tuple[Float[Tensor, " units"], Float[Tensor, " units"]]:
    """A mean over rows and splits, and its standard error (ours).

    The error has two parts, added as variances. Over rows: the bootstrap's, in closed form, what infinitely many
    resamples of rows with the fitted probes would give. Over splits: how much the mean depends on which rows the
    probes were fitted on, 0 for a single split, which cannot tell.

    Example:
        >>> mean, error = mean_and_error(torch.tensor([[[0.0, 2.0, 0.0, 2.0]]]))
        >>> mean.tolist(), error.tolist()
        ([1.0], [0.5])
    """
    values = values.double()
    rows = values.mean(0).var(-1, correction=0) / values.shape[-1]
    splits = values.mean(-1).var(0) / len(values) if len(values) > 1 else 0.0
    return values.mean((0, -1)), (rows + splits).sqrt()


@dataclass(frozen=True)
class Probes:
    """What matched probes know about the answer, in columns `SITES`; NaN where no row has such a token.

    Attributes:
        accuracy: [boundaries, sites] of the first answer token among the classes, held out.
        information: [boundaries, sites] V-information H_V(Z) - H_V(Z | x) in nats, held out; below 0 where the probe
            learnt nothing that holds on other rows.
        gain: [layers, sites] what the layer adds to it (informational gap). With the log loss its absolute value is
            the functional gap, since H_V(Z) is the same on both sides.
        gain_error: [layers, sites] its standard error over rows and splits.
        accuracy_gain: [layers, sites] the functional gap with the 0-1 loss, with its sign.
        accuracy_gain_error: [layers, sites] its standard error.
        norm: [boundaries, sites] B of statement 4, the largest of the probes'.
        entropy: [sites] H_V(Z) in nats, of the class frequencies alone.
        rows: [sites] measured.
        classes: [sites] answers told from each other.
        model: fingerprint of the model.
        about: settings, rows seen, rows left out for their states, and the fewest rows of an answer that is kept.
    """

    accuracy: Float[Tensor, "boundaries sites"]
    information: Float[Tensor, "boundaries sites"]
    gain: Float[Tensor, "layers sites"]
    gain_error: Float[Tensor, "layers sites"]
    accuracy_gain: Float[Tensor, "layers sites"]
    accuracy_gain_error: Float[Tensor, "layers sites"]
    norm: Float[Tensor, "boundaries sites"]
    entropy: Float[Tensor, " sites"]
    rows: Int[Tensor, " sites"]
    classes: Int[Tensor, " sites"]
    model: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields; tables as lists of rows."""
        tables = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return {"sites": SITES, **tables}


def probe_states(pooled: PooledStates, *, penalty: float = PENALTY, splits: int = SPLITS, seed: int = 0) -> Probes:
    """Fit matched probes before and after every layer: same rows, halves, classes, penalty and solver at a site.

    Args:
        pooled: what the probes read; see `pool_states`.
        penalty: of every probe.
        splits: in random halves, to average over.
        seed: of these.

    Raises:
        InputError: fewer than two answers have `FEWEST` rows, or a state is infinite.
    """
    sites = [_site(pooled, k, penalty, range(seed, seed + splits)) for k in range(len(SITES))]
    tables = {name: torch.stack([site[name] for site in sites], -1) for name in sites[0]}
    rows = {"rows": len(pooled.answer), "skipped_rows": pooled.skipped, "fewest": FEWEST}
    return Probes(**tables, model=pooled.model, about={**rows, "penalty": penalty, "splits": splits, "seed": seed})


def _site(pooled: PooledStates, k: int, penalty: float, seeds: range) -> dict[str, Tensor]:
    states = pooled.states[:, k]
    there = ~states[0].isnan().all(-1)
    if not bool(there.any()):
        return _nothing(len(states))
    kept, z = _classes(pooled.answer, there, SITES[k])
    splits = [halves(z, seed) for seed in seeds]
    readings = [[held_out(x, z, second, penalty) for x in states[:, kept]] for second in splits]
    loss = torch.stack([torch.stack([at.loss for at in split]) for split in readings])
    right = torch.stack([torch.stack([at.right for at in split]) for split in readings]).double()
    entropy = torch.stack([prior_loss(z, second) for second in splits]).mean()
    gain, gain_error = mean_and_error(loss[:, :-1] - loss[:, 1:])
    accuracy_gain, accuracy_gain_error = mean_and_error(right[:, 1:] - right[:, :-1])
    return {
        "accuracy": right.mean((0, -1)),
        "information": entropy - loss.mean((0, -1)),
        "gain": gain,
        "gain_error": gain_error,
        "accuracy_gain": accuracy_gain,
        "accuracy_gain_error": accuracy_gain_error,
        "norm": torch.tensor([[at.norm for at in split] for split in readings]).double().amax(0),
        "entropy": entropy,
        "rows": torch.tensor(len(z)),
        "classes": torch.tensor(int(z.max()) + 1),
    }


def _nothing(boundaries: int) -> dict[str, Tensor]:
    at = torch.full((boundaries,), torch.nan, dtype=torch.float64)
    gains = {name: at[1:] for name in ("gain", "gain_error", "accuracy_gain", "accuracy_gain_error")}
    none = {"entropy": at[0], "rows": torch.tensor(0), "classes": torch.tensor(0)}
    return {"accuracy": at, "information": at, "norm": at, **gains, **none}


def _classes(answer: Tensor, there: Tensor, site: str) -> tuple[Tensor, Tensor]:
    """Rows of the answers that enough rows have, and their answers as 0 to K - 1."""
    tokens, counts = torch.unique(answer[there], return_counts=True)
    often = tokens[counts >= FEWEST]
    if len(often) < 2:
        raise InputError(
            f"probes on `{site}`: of {int(there.sum())} rows with {len(tokens)} different first answer tokens, "
            f"{len(often)} of these occur {FEWEST} times or more; expected two or more, hence {2 * FEWEST} rows at "
            "least. Measure more rows (--samples), or rows whose answers are fewer, and differ in their first token."
        )
    kept = (there & torch.isin(answer, often)).nonzero()[:, 0]
    return kept, torch.searchsorted(often, answer[kept])
