"""A finished run to go on from: its gates as a plan, and its LoRA."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skipit.router.checkpoint import load_router
from skipit.router.errors import CheckpointError, InputError
from skipit.theory.plan import LEFT_OUT, Plan, points_text

from .config import TrainConfig
from .data.used import RECORD, also_used
from .lora import read_settings
from .run_folder import ADAPTER, RUN_FILE, read_record

# What the weights of a run are for; everything else may be another run's.
KEPT = ("kv", "unit", "granularity", "lora_rank", "lora_alpha")
OFFERED = ("budget", "more_budgets", "latency")  # where nothing else is asked for


class Start(NamedTuple):
    """What a run begins with that goes on from another.

    Attributes:
        plan: the other's gates, with what it was made from.
        settings: of `TrainConfig`: those that must stay, and the budgets.
        adapter: the folder of its gates and LoRA.
    """

    plan: Plan
    settings: dict[str, Any]
    adapter: Path

    def check(self, config: TrainConfig) -> None:
        """Refuse settings under which the weights would mean something else.

        Raises:
            CheckpointError: names them.
        """
        now = config.to_dict()
        if changed := [name for name in KEPT if now[name] != self.settings[name]]:
            what = ", ".join(f"`{name}` is {self.settings[name]!r} there, {now[name]!r} here" for name in changed)
            raise CheckpointError(f"{self.adapter.parent} cannot be gone on from with other settings: {what}.")

    def leaving_out(self, plan: Plan) -> "Start":
        """Begin without the layers that a plan for a latency leaves out for all tokens, and hold its latency.

        The other gates stay the run's.

        Raises:
            CheckpointError: the plan is of another model, K/V policy or decision points.
            InputError: it is not for a latency, or leaves out no layer.
        """
        for name, there, here in (
            ("model", self.plan.model, plan.model),
            ("K/V policy", self.plan.kv, plan.kv),
            ("decision points", points_text(self.plan.decide_at), points_text(plan.decide_at)),
        ):
            if there != here:
                raise CheckpointError(
                    f"{self.adapter.parent} has {name} {there}, the plan {here}: they must be the same."
                )
        if plan.latency is None or not plan.left_out:
            raise InputError(
                "`plan`: to go on from a run, expected one for a latency that leaves out layers for all tokens; this "
                "one leaves out none. Make it by `skipit plan PROFILE --latency L`, with --answer-tokens."
            )
        used = plan.about.get(RECORD, {}).get("profiled")
        weight, bias = self.plan.weight.clone(), self.plan.bias.clone()
        weight[plan.left_out], bias[plan.left_out] = 0.0, LEFT_OUT
        about = {RECORD: also_used(self.plan.about, "profiled", used), "latency": plan.latency}
        begun = replace(self.plan, weight=weight, bias=bias, about=about)
        return self._replace(plan=begun, settings={**self.settings, "latency": plan.latency, "more_budgets": ()})


def start_from(run: str | Path) -> Start:
    """Read a finished run to go on from.

    Raises:
        CheckpointError: not a finished run, or something in it is damaged.
        RouterConfigError: its settings are malformed.
    """
    run = Path(run)
    record, (router, gates) = read_record(run), load_router(run)
    if not isinstance(record.get("config"), dict):
        raise CheckpointError(f"{run / RUN_FILE}: `config`: got none, expected the settings of the run.")
    config = TrainConfig.from_dict(record["config"])
    read_settings(run / ADAPTER)
    used = {kind: rows for kind, rows in (record.get(RECORD) or {"trained": None}).items() if kind != "calibrated"}
    latency = {} if config.latency is None else {"latency": config.latency}
    plan = Plan(
        weight=gates["weight"],
        bias=gates["bias"],
        budget=config.budget,
        kv=router.kv,
        init=record.get("init", "theory"),
        model=record["model"],
        run_rate=torch.full(gates["bias"].shape, torch.nan),
        about={RECORD: used, **latency},
        decide_at=router.decide_at,
    )
    settings = config.to_dict()
    return Start(plan, {name: settings[name] for name in (*KEPT, *OFFERED)}, run / ADAPTER)
