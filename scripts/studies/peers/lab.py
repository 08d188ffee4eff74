"""What every method of the comparison with peers works with: what was measured on the dense model, and budgets met."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from skipit.router import Gated, Step
from skipit.router.config import KVPolicy
from skipit.theory.calibrate import calibrate
from skipit.theory.cost import Costs
from skipit.theory.plan import make_plan
from skipit.train.data.sources import load_model
from skipit.train.gating import attach_plan
from studies.answers import Options, always, answers
from studies.contribution import layer_contribution
from studies.study import Study, digest

from .choices import Static, at_budget, static_choices
from .silence import Operator, noticed, quietest
from .similarities import similarities
from .training import fit

LC_ROWS = 40  # as many as ShortV uses


@dataclass(frozen=True)
class System:
    """A model and how to run it.

    Attributes:
        model: in eval mode.
        options: of `running`, for a batch.
        costs: of its layers, with those of the method's own gates.
        timed: False where the options need the whole input, so that nothing can be generated.
        chosen: what was found on calibration rows, to be kept with the figures.
    """

    model: Any
    options: Options
    costs: Costs
    timed: bool = True
    chosen: Mapping[str, Any] = field(default_factory=dict)


Systems = Mapping[str, list[System]]


class Lab(Study):
    """A study whose methods are the peers' and ours: what was measured on the dense model for all of them."""

    @cached_property
    def steps_of_all(self) -> list[Step]:
        """The held-out rows' tokens."""
        return answers(self.gated, self.held_out, always({})).steps

    @cached_property
    def static(self) -> dict[str, list[Static]]:
        """The peers' static choices."""
        contribution = layer_contribution(self.gated, self.read("calibration", LC_ROWS))
        return static_choices(similarities(self.gated, self.held_out), contribution, self.seed)

    @cached_property
    def quiet(self) -> list[Operator]:
        """All operators by how little answers notice of them."""
        return quietest(noticed(self.gated, self.read("calibration", LC_ROWS)), self.costs)

    def meet(
        self,
        model: Any,
        costs: Costs,
        budget: float,
        make: Callable[[float], Mapping[str, Any]],
        *,
        low: float = 0.0,
        high: float = 1.0,
    ) -> Mapping[str, Any]:
        """The options of `running` that spend the budget on the held-out rows: `make` between `low` and `high`."""

        def share(x: float) -> float:
            return answers(model, self.held_out, always(make(x))).share(costs)

        return make(at_budget(share, budget, low=low, high=high))

    def fit(self, budget: float, options: Mapping[str, Any], **more: Any) -> Any:
        """Train as `training.fit` does, with gates biased to run: the peers' practice."""
        config = self.config(budget, options.get("kv", "retain"), unit=options.get("unit", "block"))
        model, processor = load_model(self.model)
        plan = make_plan(self.profile, budget, config.kv, "run")
        rows = self.rows("train", config.steps * config.batch_size)
        return fit(model, processor, rows, plan, config, options, **more)

    def planned(self, budget: float, kv: KVPolicy) -> Any:
        """A model with our plan's gates, not trained."""
        model = self.load()
        attach_plan(model, make_plan(self.profile, budget, kv))
        return model

    def learned(self, budget: float, kv: KVPolicy) -> Any:
        """A model with our plan's gates, trained, LoRA merged; where there is a folder, it is trained once."""
        config = self.config(budget, kv)
        if self.out is None:
            with tempfile.TemporaryDirectory() as folder:
                return self.trained(config, Path(folder) / "run", calibrated=False)[0]
        settings = {**self.settings(), "budget": budget, "kv": kv}
        place = self.out / "trainings" / f"{kv}_{budget:g}_{self.seed}_{digest(settings)}"
        return self.trained(config, place, calibrated=False)[0]

    def calibrated(self, model: Any, budget: float, kv: KVPolicy) -> System:
        """A model's gates with the threshold at which they spend the budget."""
        threshold, _ = calibrate(model, self.held_out, self.costs, budget, kv)
        return System(model, always({"policy": Gated(threshold), "kv": kv}), self.costs)
