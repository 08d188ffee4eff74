"""Lossless decoding: the gated model drafts tokens, the dense model verifies several of them in one pass.

Both are the same weights and share one cache. What a draft leaves there was made from states that skips have changed:
it is forgotten before the dense model runs the last token of the answer and all drafted ones, which leaves its own
keys and values and says how many of the drafted tokens it would have made itself. The loop around it, with the
rule by which samples keep their distribution, is transformers' own.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.candidate_generator import CandidateGenerator

from .cache import SkipCache, take_over
from .drafts import Drafts
from .errors import InputError, short
from .running import Router, _Running, within

AT_FIRST = 5  # tokens that are drafted before anything is known of how many will be accepted
# What a generation must be set to, where transformers' loop of drafts and verifications has no room for anything else,
# or would answer otherwise than without drafts.
_ONLY: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "guidance_scale": 1,
    **dict.fromkeys(
        (
            *("budget", "inputs_embeds", "past_key_values", "cache_implementation", "custom_generate"),
            *("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "assistant_ensemble_weight"),
        )
    ),
}


class Drafter(CandidateGenerator):
    """Stands in the place of an assistant model: the model that it assists, with its gates.

    Args:
        model: gated, with a router.
        options: that hold.
        draft_budget: the operating point at which it drafts; None is that of the options.
        draft_tokens: most that are drafted before they are verified; None is one more than were accepted the last time.
        stopping_criteria: of the caller.
    """

    requires_model_outputs = True  # which also hands over the model's arguments as they are by then
    model_kwargs_overrides: dict[str, Any] = {}  # noqa: RUF012 (as transformers declares it)

    def __init__(
        self,
        model: Any,
        options: _Running,
        draft_budget: float | str | None,
        draft_tokens: int | None,
        stopping_criteria: StoppingCriteriaList | None,
    ) -> None:
        options = replace(options, mode="gathered", budget=options.budget if draft_budget is None else draft_budget)
        if draft_tokens is not None and (type(draft_tokens) is not int or draft_tokens < 1):
            raise InputError(f"`draft_tokens`: got {short(draft_tokens)}, expected a number of tokens, at least 1.")
        self.router = next(hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Router))
        if options.policy is None:
            if (options.budget_per or self.router.config.budget_per) == "input":
                raise InputError(
                    "`lossless`: got budget_per='input', but the dense model runs the prompt, in which no threshold is "
                    "found then. Use budget_per='data', with a calibrated `draft_budget`."
                )
            self.router.config.threshold_at(options.budget)
        self.model, self.config = model, model.config
        self.options, self.fixed, self.most = options, draft_tokens, draft_tokens or AT_FIRST
        self.drafts = options.drafts or Drafts()
        self.own_criteria = stopping_criteria or StoppingCriteriaList()

    def begin(
        self,
        generation_config: Any,
        logits_processor: Any,
        model_kwargs: dict[str, Any],
        target_tokenizer: Any = None,
        **more: Any,
    ) -> "Drafter":
        """Draft for one generation, whose settings transformers has completed by now."""
        if generation_config.do_sample and (self.own_criteria or generation_config.stop_strings):
            raise InputError(
                "`lossless`: with `do_sample`, drafts could run past what `stop_strings` or `stopping_criteria` end. "
                "Leave these out, or decode greedily: do_sample=False."
            )
        take_over(model_kwargs["past_key_values"], self.router.num_layers, self.router.image_layers)
        self.generation_config, self.processor = generation_config, logits_processor
        self.stopping = self.model._get_stopping_criteria(
            generation_config=generation_config, stopping_criteria=self.own_criteria, tokenizer=target_tokenizer
        )
        return self

    def get_candidates(  # type: ignore[override]
        self, input_ids: Int[Tensor, "1 seq"], *, model_kwargs: dict[str, Any], is_first_iteration: bool, **more: Any
    ) -> tuple[Int[Tensor, "1 all"], Float[Tensor, "1 drafted vocabulary"] | None]:
        """The answer so far with the tokens that are drafted after it, and when sampling what they were drawn from."""
        # The dense model runs the prompt; and it adds a token of its own to those that it accepts.
        most = 0 if is_first_iteration else min(self.most, self.generation_config.max_length - input_ids.shape[1] - 1)
        self.drafts.verifications += not is_first_iteration
        cache: SkipCache = model_kwargs["past_key_values"]
        tokens, scores = input_ids, []
        with within(self.options), cache.undone():
            kwargs = dict(model_kwargs)
            for _ in range(most):
                inputs = self.model.prepare_inputs_for_generation(
                    tokens, next_sequence_length=1, is_first_iteration=False, **kwargs
                )
                outputs = self.model(**inputs)
                kwargs = self.model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
                scores.append(self.processor(tokens, outputs.logits[:, -1].float()))
                tokens, ended = self._with_next(tokens, scores[-1])
                if ended:
                    break
        self.drafts.drafted += tokens.shape[1] - input_ids.shape[1]
        return tokens, torch.stack(scores, dim=1) if scores and self.generation_config.do_sample else None

    def _with_next(
        self, tokens: Int[Tensor, "1 seq"], scores: Float[Tensor, "1 vocabulary"]
    ) -> tuple[Int[Tensor, "1 more"], bool]:
        """The tokens with the next one, and whether no other is to be drafted after it."""
        if self.generation_config.do_sample:
            new = torch.multinomial(scores.softmax(-1), 1)
        else:
            new = scores.argmax(-1, keepdim=True)
        longer = torch.cat([tokens, new], dim=1)
        if not self.stopping(longer, None).any():
            return longer, False
        # What ends an answer is left to the dense model, which stops there; a sample that depends on what was drawn
        # would be another distribution's, and there the loop itself ends at the token.
        return (longer if self.generation_config.do_sample else tokens), True

    def update_candidate_strategy(self, input_ids: Int[Tensor, "1 seq"], scores: Any, num_matches: Any) -> None:
        """Count what the dense model has accepted, and expect as many again."""
        self.drafts.accepted += int(num_matches)
        if self.fixed is None and scores.shape[1] > 1:  # something was drafted
            self.most = int(num_matches) + 1


def check_settings(asked: dict[str, Any], rows: int) -> None:
    """Refuse what cannot be drafted for.

    Args:
        asked: settings that have a value.
        rows: of the prompt.

    Raises:
        InputError: names the setting.
    """
    if rows > 1:
        raise InputError(
            f"`lossless`: got {rows} rows, each of which would have another number of drafted tokens accepted. Give "
            "one row at a time, or leave out `lossless`."
        )
    for name, expected in _ONLY.items():
        value = asked.get(name, expected)
        if not isinstance(value, int | float | str | None):
            value = type(value).__name__
        if value != expected:
            raise InputError(
                f"`lossless`: got {name}={short(value)}, expected {expected}: the dense model runs one prompt, and "
                f"verifies what its own gates draft after it, at `draft_budget`. Leave out `{name}`, or `lossless`."
            )
