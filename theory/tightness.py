"""How tight the statements of docs/theory.md are on a real model: measured / bound, for every one that can be measured.

A ratio of 1 means that the statement says exactly what happens, a ratio of 0.01 that a hundred times more could happen
as far as the statement knows, and a ratio above 1 that it is false. Identities have the ratio 1.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipit.router import MODALITIES, FixedUnits, running
from skipit.router.attach import find_router
from skipit.router.attention import OBSERVER_KWARG
from skipit.router.decoder import find_decoder

from .answers import TeacherForced, teacher_forced
from .bounds import (
    answer_kl_radius,
    block_angle_bound,
    block_geometric_bound,
    combine_damages,
    entropy_change_bound,
    eviction_output_change,
    fano_entropy_bound,
    fisher_damage,
    fisher_damage_joint,
    geometric_from_proximal,
    neighbour_counts,
    path_identity,
    pinsker_risk_gap,
    probe_gap_bound,
    probe_gap_bound_from_proximal,
    proximal_from_geometric,
    total_variation_from_kl,
    update_norm_from_cosine,
)
from .damage import draw_choice
from .labels import token_kinds
from .measures import attention_scores, block_angles, cosine_distance, eviction_term, relative_update
from .measuring import evaluating, routed
from .pooling import Pool, PooledStates, join
from .probes import fit_probe
from .profile import Profile
from .redundancy import prox_bounds
from .states import recorded

THRESHOLDS = (0.01, 0.1, 1.0)
CODES = 24  # size of the alphabet that statements 5 and 6 quantize states to
NODES = 8  # of the quadrature of statement 7
# What is measured below this is rounding, and so is its ratio to a bound of that size.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Tightness:
    """Measured / bound of one inequality over everything it was evaluated on.

    Attributes:
        statement: its number in docs/theory.md.
        claim: the inequality in words.
        ratios: finite, one per sample; empty if nothing could be evaluated.
    """

    statement: int
    claim: str
    ratios: Tensor

    @property
    def median(self) -> float:
        """Of the ratios; NaN without any."""
        return float(self.ratios.median()) if len(self.ratios) else float("nan")

    @property
    def largest(self) -> float:
        """Of the ratios; above 1 the statement would be false."""
        return float(self.ratios.max()) if len(self.ratios) else float("nan")


class _Ratios:
    """Collects ratios by statement and claim, in order; `generator` is of the draws behind some of them."""

    def __init__(self, seed: int = 0) -> None:
        self.held: dict[tuple[int, str], list[Tensor]] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, statement: int, claim: str, measured: Any, bound: Any) -> None:
        top = torch.as_tensor(measured).detach().double().flatten().cpu()
        under = torch.as_tensor(bound).detach().double().flatten().cpu()
        top, under = torch.broadcast_tensors(top, under)
        kept = top.isfinite() & under.isfinite() & ((top.abs() > ROUNDING) | (under > ROUNDING))
        self.held.setdefault((statement, claim), []).append(top[kept] / under[kept])

    def list(self) -> list[Tightness]:
        return [Tightness(number, claim, torch.cat(parts)) for (number, claim), parts in sorted(self.held.items())]


@dataclass(frozen=True)
class _Passed:
    """A batch that has passed through a dense model.

    Attributes:
        model: with a router, which is not asked.
        layers: of its decoder.
        batch: what it was given and is asked.
        kinds: the modality of every token, -1 for pads.
        chain: states at every layer boundary.
        full: log probabilities at the answer tokens.
    """

    model: Any
    layers: nn.ModuleList
    batch: TeacherForced
    kinds: Tensor
    chain: list[Tensor]
    full: Tensor


def from_profile(profile: Profile) -> list[Tightness]:
    """What a profile alone can tell: the statements about means and distributions of its units."""
    ratios, here = _Ratios(), profile.geometric.isfinite()
    _proximal(profile.geometric[here], lambda t: prox_bounds(profile.histogram, t)[1][here], "unit", ratios)
    return ratios.list()


def from_model(model: nn.Module, batches: Iterable[dict[str, Tensor]], *, seed: int = 0) -> list[Tightness]:
    """Every statement on the tensors of a model: states, attention, gradients, and real skips.

    Statement 7 walks along every skip and dominates the time: 2 x layers x 8 gradients per batch. A few rows will do.

    Args:
        model: with or without gates, which are not asked.
        batches: with labels.
        seed: of the codebooks, probes and draws.

    Raises:
        InputError: no batch, or a row without an answer token.
    """
    ratios = _Ratios(seed)
    with routed(model), evaluating(model):
        pools = [_evaluate(model, batch, ratios) for batch in teacher_forced(model, batches)]
    _fitted_probes(join(pools), ratios)
    return ratios.list()


def _evaluate(model: Any, batch: TeacherForced, ratios: _Ratios) -> Pool:
    kinds, router = token_kinds(model.config, batch.inputs), find_router(model)[1]
    _, _, layers = find_decoder(model, router.config.layers)
    observer = {OBSERVER_KWARG: partial(_eviction, kinds, router.image_layers, ratios)}
    with torch.enable_grad(), running(mode="dense"), recorded(layers) as runs:
        logits = model(**batch.inputs, use_cache=False, **observer).logits[:, :-1]
    margin = draw_choice(logits, batch.answer, 1.0, torch.rand(len(logits), 2, generator=ratios.generator)).margin
    grads = torch.autograd.grad(margin.sum(), [run.left for run in runs])
    for grad, run in zip(grads, runs, strict=True):
        _sums(grad, (run.left - run.entered).detach(), kinds, ratios)
    chain = [runs[0].entered.detach(), *(run.left.detach() for run in runs)]
    with torch.no_grad():
        with running(mode="dense"):
            passed = _Passed(model, layers, batch, kinds, chain, _log_p(model, batch))
        for x, y in pairwise(chain):
            _states(x, y, kinds, ratios)
            _probes(passed, x[:, :-1], y[:, :-1], ratios)
            _information(passed, x[:, :-1], y[:, :-1], ratios)
        _blocks(passed, ratios)
    for index, m in product(range(len(layers)), range(len(MODALITIES))):
        if bool((kinds == m).any()):
            _skip(passed, index, m, ratios)
    pool = Pool(kinds, batch.labels)
    for boundary in chain:
        pool.add(boundary)
    return pool


def _log_p(model: Any, batch: TeacherForced) -> Tensor:
    return batch.logits(model).double().log_softmax(-1)


def _proximal(geometric: Tensor, prox: Callable[[float], Tensor], per: str, ratios: _Ratios) -> None:
    """Statement 1, both ways, at every threshold."""
    for t in THRESHOLDS:
        share = prox(t)
        ratios.add(1, f"prox(t) <= geo / t, per {per}", share, proximal_from_geometric(geometric, t))
        bound = geometric_from_proximal(share, t)
        ratios.add(1, f"geo <= (1 - prox) t + 2 prox, per {per}", geometric, bound)


def _far(distance: Tensor, t: float) -> Tensor:
    """prox(t) of some tokens."""
    return (distance >= t).double().mean()


def _states(x: Tensor, y: Tensor, kinds: Tensor, ratios: _Ratios) -> None:
    """Statements 1 and 2: per token, and per row and modality."""
    distance, real = cosine_distance(x, y).double(), kinds >= 0
    norm = (y.double().norm(dim=-1) / x.double().norm(dim=-1))[real]
    bound = update_norm_from_cosine(norm, distance[real])
    ratios.add(2, "|F| / |x| = sqrt((1 - r)^2 + 2 r d), per token", relative_update(x, y)[real], bound)
    for row, m in product(range(len(kinds)), range(len(MODALITIES))):
        moved = distance[row, kinds[row] == m]
        if len(moved):
            _proximal(moved.mean(), partial(_far, moved), "row", ratios)


def _blocks(passed: _Passed, ratios: _Ratios) -> None:
    """Statement 3, for blocks of 2 layers, of 4 and so on, and of all."""
    states, layers = torch.stack([state[passed.kinds >= 0] for state in passed.chain]), len(passed.layers)
    angles = block_angles(states, 1).T
    geos = cosine_distance(states[:-1], states[1:]).double().mean(-1)
    for length in {2, 4, layers} & set(range(2, layers + 1)):
        for start, turned in enumerate(block_angles(states, length)):
            block = slice(start, start + length)
            bound = block_angle_bound(angles[:, block])
            ratios.add(3, "angle of a block <= sum of its layers', per token", turned, bound)
            across = cosine_distance(states[start], states[start + length]).double().mean()
            ratios.add(3, "geo of a block <= (sum of sqrt geo)^2, mean", across, block_geometric_bound(geos[block]))


def _probes(passed: _Passed, x: Tensor, y: Tensor, ratios: _Ratios) -> None:
    """Statement 4, with the model's own output embedding as the probe, on directions scaled as RMSNorm scales them."""
    head, answer, wanted = passed.model.get_output_embeddings(), passed.batch.answer, passed.batch.wanted
    if head is None or len(wanted) == 0:
        return
    weight = head.weight.float() * x.shape[-1] ** 0.5
    norm = float(torch.linalg.matrix_norm(weight, ord=2))
    losses = [F.cross_entropy(F.normalize(s[answer].float(), dim=-1) @ weight.T, wanted) for s in (x, y)]
    gap = (losses[1] - losses[0]).abs()
    distance = cosine_distance(x, y)[answer].double()
    ratios.add(4, "probe's loss gap <= 2 B sqrt(geo), per layer", gap, probe_gap_bound(distance.mean(), norm))
    for t in THRESHOLDS:
        bound = probe_gap_bound_from_proximal(_far(distance, t), t, 2**0.5 * norm)
        ratios.add(4, "probe's loss gap <= alpha ((1 - prox) sqrt(2t) + 2 prox)", gap, bound)


def _fitted_probes(pooled: PooledStates, ratios: _Ratios) -> None:
    """Statement 4 for probes fitted on each layer's input: what changes when they are given its output instead."""
    for (x, y), distance in zip(pairwise(pooled.states), pooled.distance, strict=True):
        for k, moved in enumerate(distance):
            there = moved.isfinite()
            _, z = torch.unique(pooled.answer[there], return_inverse=True)
            if len(z) == 0 or int(z.max()) == 0:
                continue
            probe = fit_probe(x[k, there], z)
            gap = (probe.loss(y[k, there], z) - probe.loss(x[k, there], z)).mean().abs()
            bound = probe_gap_bound(moved[there].double().mean(), probe.norm)
            ratios.add(4, "fitted probe's loss gap <= 2 B sqrt(geo), per layer and modality", gap, bound)


def _information(passed: _Passed, x: Tensor, y: Tensor, ratios: _Ratios) -> None:
    """Statements 5 and 6 for states quantized to a few codes: drawn states of either side, nearest by distance."""
    for m in range(len(MODALITIES)):
        chosen = passed.kinds[:, :-1] == m
        if int(chosen.sum()) < CODES:
            continue
        pool = torch.cat([x[chosen], y[chosen]]).float()
        codes = pool[torch.randperm(len(pool), generator=ratios.generator)[:CODES].to(pool.device)]
        near = [_nearest(states[chosen].float(), codes) for states in (x, y)]
        distances = cosine_distance(codes[:, None].expand(-1, CODES, -1), codes[None].expand(CODES, -1, -1))
        distances.fill_diagonal_(0)
        moved = distances[near[0], near[1]]
        entropy = _entropy(near[0] * CODES + near[1]) - _entropy(near[0])
        for t in THRESHOLDS:
            fano = fano_entropy_bound(_far(moved, t), CODES, *neighbour_counts(distances, t))
            ratios.add(5, "H(x'|x) <= Fano's bound, quantized states", entropy, fano)
        asked = passed.batch.answer[chosen]
        if bool(asked.any()):
            _risk(near[0][asked], near[1][asked], passed.batch.labels[:, 1:][chosen][asked], ratios)


def _risk(before: Tensor, after: Tensor, z: Tensor, ratios: _Ratios) -> None:
    """Statement 6 for the 0-1 loss, on the empirical law of two codes and the answer."""
    both = before * CODES + after
    size = int(z.max()) + 1
    information = (_entropy(both) - _entropy(before)) - (_entropy(both * size + z) - _entropy(before * size + z))
    gap = _risk_of(before, z) - _risk_of(after, z)
    claim = "risk gap <= M sqrt(dI / 2), quantized states"
    ratios.add(6, claim, gap.clamp(min=0), pinsker_risk_gap(information.clamp(min=0), 1.0))


def _risk_of(seen: Tensor, z: Tensor) -> Tensor:
    table = torch.zeros(int(seen.max()) + 1, int(z.max()) + 1, dtype=torch.float64, device=z.device)
    table.index_put_((seen, z), table.new_ones(len(z)), accumulate=True)
    return 1 - table.amax(-1).sum() / len(z)


def _nearest(states: Tensor, codes: Tensor) -> Tensor:
    return (F.normalize(states, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(-1)


def _entropy(symbols: Tensor) -> Tensor:
    p = torch.unique(symbols, return_counts=True)[1].double() / len(symbols)
    return -(p * p.log()).sum()


def _eviction(
    kinds: Tensor,
    of_images: frozenset[int],
    ratios: _Ratios,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
) -> Tensor | None:
    """Statement 9, per head and text query, when the vision keys of a layer are evicted: observes its attention."""
    if getattr(module, "layer_idx", None) in of_images:  # of whose keys no token evicts one
        return mask
    with torch.no_grad():
        weights = torch.softmax(attention_scores(query, key, mask, scaling).double(), dim=-1)
        vision = kinds == 1
        change = eviction_term(weights, value.double(), vision).norm(dim=-1)
        mass = (weights * vision[:, None, None]).sum(-1).clamp(0, 1)
        norms = value.double().norm(dim=-1).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        seen = torch.where(weights > 0, norms[:, :, None, :], 0.0).amax(-1)
        text = ((kinds == 0) & vision.any(-1)[:, None])[:, None].expand_as(mass) & (mass < 1 - ROUNDING)
        bound = eviction_output_change(mass[text], seen[text])
    ratios.add(9, "|o - o'| <= 2 a max|v|, per head and text query", change[text], bound)
    return mask


def _sums(grad: Tensor, update: Tensor, kinds: Tensor, ratios: _Ratios) -> None:
    """Statement 10: the tokens of a unit together against one by one."""
    single = fisher_damage(grad, update).double()
    for m in range(len(MODALITIES)):
        together = fisher_damage_joint(grad.double(), update.double(), kinds == m)
        bound = combine_damages(torch.where(kinds == m, single, 0.0))
        ratios.add(10, "D of a unit <= (sum of sqrt D of its tokens)^2, per row", together, bound)


def _skip(passed: _Passed, index: int, m: int, ratios: _Ratios) -> None:
    """Statements 7, 8 and 11 on one real skip, of a layer by a modality: along its path, and at its end."""
    model, layers, batch, full = passed.model, passed.layers, passed.batch, passed.full
    runs = torch.ones(len(layers), len(MODALITIES), dtype=torch.bool)
    runs[index, m] = False
    with torch.no_grad(), running(policy=FixedUnits(runs), kv="retain", mode="masked"):
        skipped = _log_p(model, batch)
    kl = (full.exp() * (full - skipped)).sum(-1).clamp(min=0)

    def rest(states: Tensor) -> Tensor:
        with running(mode="dense"), _replaced(layers[index], states):
            return (full.exp() * (full - _log_p(model, batch))).sum()

    before, after = passed.chain[index : index + 2]
    path = path_identity(rest, after, (after - before) * (passed.kinds == m)[..., None], NODES)
    ratios.add(7, "|loss change| <= |u| max|gradient|, per skip", kl.sum(), path.bound)
    _outputs(full, skipped, kl, ratios)


@contextmanager
def _replaced(layer: nn.Module, states: Tensor) -> Iterator[None]:
    """Within the block other states stand in for a layer's output."""

    def replace(layer: nn.Module, args: Any, output: Any) -> Any:
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with layer.register_forward_hook(replace):
        yield


def _outputs(full: Tensor, skipped: Tensor, kl: Tensor, ratios: _Ratios) -> None:
    """Statement 11 per answer token, and the reduction to one choice behind statement 8's damage."""
    p, q = full.exp(), skipped.exp()
    variation, bound = (p - q).abs().sum(-1) / 2, total_variation_from_kl(kl)
    ratios.add(11, "TV <= min(sqrt(KL / 2), sqrt(1 - exp(-KL))), per answer token", variation, bound)
    change = ((p * full).sum(-1) - (q * skipped).sum(-1)).abs()
    bound = entropy_change_bound(variation.clamp(max=1), p.shape[-1])
    ratios.add(11, "entropy change <= TV log(K - 1) + h2(TV)", change, bound)
    top, first = p.topk(2)
    moved = q.argmax(-1) != first[:, 0]
    radius = answer_kl_radius(top[moved, 0], top[moved, 1])
    ratios.add(11, "KL of a changed answer >= its radius (radius / KL)", radius, kl[moved])
    pair_p, pair_q = p.gather(-1, first), q.gather(-1, first)
    mass = pair_p.sum(-1)
    inner = (pair_p * ((pair_p / mass[:, None]).log() - (pair_q / pair_q.sum(-1, keepdim=True)).log())).sum(-1)
    ratios.add(8, "KL of the choice between the two first answers <= KL", inner.clamp(min=0), kl)


def show(lines: list[Tightness], write: Callable[[str], None] = print) -> None:
    """Write the table, one line per inequality."""
    width = max((len(line.claim) for line in lines), default=0)
    write(f"{'':>3} {'measured / bound':{width}} {'median':>9} {'max':>9} {'samples':>9}")
    for line in lines:
        write(f"{line.statement:>3} {line.claim:{width}} {line.median:9.2g} {line.largest:9.2g} {len(line.ratios):9}")
