"""The `generate` of a gated model: transformers' own, with settings more: budgets, and decoding without loss."""

from collections import ChainMap
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationMixin

from .config import BudgetPer
from .errors import InputError
from .lossless import Drafter, check_settings
from .running import OptionsOfAccess, current, within
from .subclass import Mixin, mix_in, take_out

if TYPE_CHECKING:
    _Model = GenerationMixin
else:
    _Model = object


_PROMPTS = ("input_ids", "inputs_embeds")
_ARGUMENTS = tuple(signature(GenerationMixin.generate).parameters)[3:]  # after those that are named below


class BudgetedModel(Mixin, _Model):
    """Mixin put before the own class of a model that generates."""

    @OptionsOfAccess
    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *args: Any,
        budget: float | str | None = None,
        budget_per: BudgetPer | None = None,
        lossless: bool | None = None,
        draft_budget: float | str | None = None,
        draft_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """`generate` at an operating point, or as the dense model answers, for this call alone.

        Args:
            inputs: as transformers has it.
            generation_config: the same; may have attributes of the names of the following five, which is how a request
                to a server names them.
            *args: as transformers has them.
            budget: a calibrated operating point, by its number or its name. None is that of `generation_config`, or
                else what `running` says, or else the default one.
            budget_per: "data", or "input": each row's prompt spends the budget, any number in (0, 1], exactly. None is
                found as for `budget`.
            lossless: answer as the dense model does, token by token; when sampling, from its distribution. The gated
                model drafts tokens, and the dense model verifies several in one pass. One row at a time.
            draft_budget: the operating point at which tokens are drafted. None is that of `running`, or else the
                default one.
            draft_tokens: how many are drafted at most before they are verified. None is 5 at first, then one more than
                were accepted the last time.
            **kwargs: as transformers has them.

        Raises:
            RouterConfigError: not a calibrated budget, or with "input" no number in (0, 1].
            InputError: a setting that has no place beside `lossless`, or has none without it.
        """
        given: dict[str, Any] = {
            "budget": budget,
            "budget_per": budget_per,
            "lossless": lossless,
            "draft_budget": draft_budget,
            "draft_tokens": draft_tokens,
        }
        given = {name: getattr(generation_config, name, None) if it is None else it for name, it in given.items()}
        drafting = {name: given.pop(name) for name in ("lossless", "draft_budget", "draft_tokens")}
        options = replace(current(), **{name: it for name, it in given.items() if it is not None})
        prompt = next((given for given in (inputs, *map(kwargs.get, _PROMPTS)) if given is not None), None)
        asked = ChainMap(*map(_said, (kwargs, generation_config, self.generation_config)))
        length = None if prompt is None else prompt.shape[1]
        options = replace(options, prompt_length=length, guided=asked.get("guidance_scale", 1) != 1, held={})
        if drafting.pop("lossless"):
            kwargs = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
            args = ()
            check_settings({**asked, **_said(kwargs), **_said(given)}, 1 if prompt is None else len(prompt))
            drafter = Drafter(self, options, **drafting, stopping_criteria=kwargs.get("stopping_criteria"))
            kwargs["assistant_model"] = drafter
            options = replace(options, mode="dense")
        elif named := _said(drafting):
            raise InputError(f"`{min(named)}`: nothing is drafted without `lossless=True`. Say so, or leave it out.")
        with within(options):
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(self, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        """What drafts for transformers' assisted generation; see there."""
        if isinstance(assistant_model, Drafter):
            return assistant_model.begin(**kwargs)
        return super()._get_candidate_generator(*args, assistant_model=assistant_model, **kwargs)  # type: ignore[misc]


def _said(settings: Any) -> dict[str, Any]:
    """The settings, of a dictionary or an object, that have a value."""
    settings = settings if isinstance(settings, dict) else {} if settings is None else vars(settings)
    return {name: value for name, value in settings.items() if value is not None}


def add_budget_argument(model: nn.Module) -> None:
    """Give a model's `generate` a `budget`; a model that does not generate is left as it is."""
    if isinstance(model, GenerationMixin):
        mix_in(model, BudgetedModel)


def remove_budget_argument(model: nn.Module) -> None:
    """Undo `add_budget_argument`."""
    if isinstance(model, BudgetedModel):
        take_out(model)
