"""How hard a row is for the dense model, before any router had a say: its loss and its entropy on the answer."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from skipit.router import InputError, running
from skipit.theory.answers import teacher_forced


@torch.no_grad()
def row_difficulty(model: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, Float[Tensor, " rows"]]:
    """Teacher-forced loss and entropy of every row, mean over its answer's tokens, in nats, with every layer run.

    Args:
        model: dense, or gated: its gates are not asked.
        batches: with labels.

    Returns:
        "loss", the cross-entropy of the right answer, and "entropy", that of the model's own predictions, which needs
        no answer to be known. Both fp64, at least 0.

    Raises:
        InputError: there is no row, or a row has no answer.
    """
    losses: list[Tensor] = []
    entropies: list[Tensor] = []
    for batch in teacher_forced(model, batches):
        tokens = batch.answer.sum(-1)
        if not bool((tokens > 0).all()):
            empty = int((tokens == 0).nonzero()[0])
            raise InputError(
                f"`batches`: row {empty} of a batch has no label, expected an answer. Give it a completion."
            )
        with running(mode="dense"):
            log_p = batch.logits(model).log_softmax(-1).double()
        loss = -log_p.gather(-1, batch.wanted[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        losses.append((batch.row_sums(loss) / tokens).cpu())
        entropies.append((batch.row_sums(entropy) / tokens).cpu())
    return {"loss": torch.cat(losses), "entropy": torch.cat(entropies)}
