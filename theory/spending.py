"""What a plan's gates may save and what they then spend: FLOPs by formulas, or time as measured on this machine."""

from dataclasses import dataclass
from math import exp

import torch
from jaxtyping import Float
from torch import Tensor

from skipit.router.config import KVPolicy

from .damage import EXPONENT
from .layer_times import LayerTimes
from .profile import Profile


@dataclass(frozen=True)
class Flops:
    """FLOPs of a row of a profile."""

    profile: Profile
    kv: KVPolicy

    def saving(self) -> Float[Tensor, "layers modality"]:
        """FLOPs of a token."""
        return self.profile.saving(self.kv)

    def share(self, rate: Float[Tensor, "layers modality"]) -> float:
        """Of the dense decoder's FLOPs."""
        spent = self.profile.floor(self.kv) + float((rate * self.profile.unit_cost(self.kv)).sum())
        return spent / self.profile.total


@dataclass(frozen=True)
class Latency:
    """Time of the decoder's layers, taken to be alike, for the prompt of a row of a profile and for an answer.

    Attributes:
        profile: of the model.
        kv: K/V policy.
        times: of its layers on this machine.
        answer_tokens: that are decoded after the prompt, one at a time. They are taken to enter every layer that is not
            left out for all tokens.
    """

    profile: Profile
    kv: KVPolicy
    times: LayerTimes
    answer_tokens: int = 0

    def saving(self) -> Float[Tensor, "layers modality"]:
        """Share of a layer's time, of a token of the prompt when its unit alone is skipped by all."""
        tokens = self.profile.tokens
        saved = self._relative(torch.zeros_like(tokens)) - self._relative(tokens)
        return self._prompt_part * torch.where(tokens > 0, saved / tokens.clamp(min=1e-9), 0.0).clamp(min=0.0)

    def share(self, rate: Float[Tensor, "layers modality"]) -> float:
        """Of the untouched layers' time."""
        return float(self._layers(rate).mean())

    def prompt_share(self, rate: Float[Tensor, "layers modality"]) -> float:
        """Of their time for the prompt alone."""
        return float(self._prompt(rate).mean())

    def _layers(self, rate: Float[Tensor, "layers modality"]) -> Float[Tensor, " layers"]:
        step, part = self.times.step(self._tokens), self._prompt_part
        decoded = torch.where((rate > 0).any(-1), step.entered, step.left_out)
        return part * self._prompt(rate) + (1 - part) * decoded

    def _prompt(self, rate: Float[Tensor, "layers modality"]) -> Float[Tensor, " layers"]:
        return self._relative(((1 - rate) * self.profile.tokens).sum(-1, keepdim=True))[:, 0]

    @property
    def _prompt_part(self) -> float:
        """The prompt's share of an untouched layer's time."""
        prompt, answer = self.times.ms(self._tokens), self.answer_tokens * self.times.step(self._tokens).ms
        return prompt / (prompt + answer)

    @property
    def _tokens(self) -> float:
        """Of the prompt."""
        return float(self.profile.tokens.sum(-1).max())

    def without_layers(
        self,
        rate: Float[Tensor, "layers modality"],
        score: Float[Tensor, "layers modality"],
        spread: Float[Tensor, "layers modality"],
        log_price: float,
    ) -> Float[Tensor, "layers modality"]:
        """Shares that run, when layers are left out for all tokens where the time that this saves is worth its damage.

        A layer that nobody runs is not entered, which on a small model, and in decoding, is the only thing that saves
        time.

        Args:
            rate: shares that gates would run, token by token.
            score: mean log of the damage per share of a layer's time that a token saves.
            spread: of that over tokens, which is about normal.
            log_price: of a layer's time, in damage.
        """
        damage = self.profile.damage[self.kv]
        # What all tokens lose, one by one, on the scale that gates compare: of log-normals around typical tokens. The
        # unit's own damage has the scale of the mean, which the few rows make that a skip hurts most.
        of_tokens = damage.typical * self.profile.tokens_per_row * ((1 - EXPONENT) * spread.square() / 2).exp()
        of_unit = damage.unit * of_tokens / damage.tokens.clamp(min=1e-30)
        # Of a log-normal damage, the part below the price is that of a normal shifted by its variance.
        skipped = torch.special.ndtr((log_price - score - spread.square()) / spread)
        lost = torch.where(rate < 1, skipped, 0.0) * of_tokens.nan_to_num(0.0)
        more = of_unit.nan_to_num(0.0).sum(-1) - lost.sum(-1)
        faster = self._layers(rate) - self._layers(torch.zeros_like(rate))
        return torch.where((more < exp(log_price) * faster)[:, None], 0.0, rate)

    def least(self) -> float:
        """The share when all tokens skip all layers."""
        return self.share(torch.zeros_like(self.profile.tokens).double())

    def _relative(self, skipped: Float[Tensor, "layers any"]) -> Float[Tensor, "layers any"]:
        """Time of layers that so many tokens skip, dense is 1."""
        share = skipped / self.profile.tokens.sum(-1).clamp(min=1e-9)[:, None]
        return self.times.relative(self.kv, self._tokens, share.clamp(0, 1))
