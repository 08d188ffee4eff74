"""The `generate` of a gated model: transformers' own, with two settings more, `budget` and `budget_per`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationMixin

from .config import BudgetPer
from .running import OptionsOfAccess, current, within
from .subclass import Mixin, mix_in, take_out

if TYPE_CHECKING:
    _Model = GenerationMixin
else:
    _Model = object


_PROMPTS = ("input_ids", "inputs_embeds")


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
        **kwargs: Any,
    ) -> Any:
        """`generate` at an operating point, for this call alone.

        Args:
            inputs: as transformers has it.
            generation_config: the same; may have attributes `budget` and `budget_per`, which is how a request to a
                server names them.
            *args: as transformers has them.
            budget: a calibrated operating point, by its number or its name. None is that of `generation_config`, or
                else what `running` says, or else the default one.
            budget_per: "data", or "input": each row's prompt spends the budget, any number in (0, 1], exactly. None is
                found as for `budget`.
            **kwargs: as transformers has them.

        Raises:
            RouterConfigError: not a calibrated budget, or with "input" no number in (0, 1].
        """
        given: dict[str, Any] = {"budget": budget, "budget_per": budget_per}
        given = {name: getattr(generation_config, name, None) if it is None else it for name, it in given.items()}
        options = replace(current(), **{name: it for name, it in given.items() if it is not None})
        prompt = next((given for given in (inputs, *map(kwargs.get, _PROMPTS)) if given is not None), None)
        asked = (kwargs, {} if generation_config is None else vars(generation_config), vars(self.generation_config))
        guidance = next((one["guidance_scale"] for one in asked if one.get("guidance_scale") is not None), 1)
        length = None if prompt is None else prompt.shape[1]
        with within(replace(options, prompt_length=length, guided=guidance != 1, held={})):
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]


def add_budget_argument(model: nn.Module) -> None:
    """Give a model's `generate` a `budget`; a model that does not generate is left as it is."""
    if isinstance(model, GenerationMixin):
        mix_in(model, BudgetedModel)


def remove_budget_argument(model: nn.Module) -> None:
    """Undo `add_budget_argument`."""
    if isinstance(model, BudgetedModel):
        take_out(model)
