"""What can be set about a training run: one dial, `budget`; everything else has a default."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from skipit.router import RouterConfigError
from skipit.router.config import Granularity, KVPolicy, Unit, check_choice, point_name
from skipit.router.errors import short
from skipit.theory.plan import check_budget
from skipit.theory.time_model import point_of

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Args:
        budget: share of the dense decoder's FLOPs to spend, in (0, 1].
        latency: share of the dense layers' time for a prompt to spend instead, as `skipit bench` measured it on this
            machine.
        more_budgets: further budgets that the same gates are trained for, in turn with `budget`, one per step.
        kv: K/V policy of skipped tokens, `retain` or `evict`.
        unit: what a token skips, `block`, `attention` or `mlp`.
        granularity: `token`, or `sequence`: a prompt's tokens of a modality decide together.
        steps: optimizer steps.
        batch_size: rows per device and step.
        accumulation: batches per optimizer step.
        learning_rate: of LoRA.
        gate_learning_rate: of the gates; None is 0.5 over the width of the states that they read, so that no step
            moves a logit by more than about 0.5; 0.1 over it under ZeRO-3 where gates decide at several points.
        lora_rank: rank of LoRA on the decoder's linear maps; 0 trains the gates alone.
        lora_alpha: LoRA's scale is alpha / rank.
        distillation: weight of KL(full model || gated model).
        seed: of data order, LoRA and sampling.
        save_steps: steps between resumable checkpoints.
        precision: of the arithmetic, `fp32` or `bf16` (autocast; under DeepSpeed LoRA and gates are bf16 too). What
            `skipit train` loads is loaded in it, however it is stored.
        gradient_checkpointing: compute layers again in the backward pass instead of keeping what is inside them.
        deepspeed: `zero1`, `zero2`, `zero3`, `zero2-offload`, `zero3-offload`, or a JSON file; None is without.
        max_broken_rows: rows of the training data that may be unreadable; they are named, counted and skipped.
    """

    budget: float = 0.5
    latency: float | None = None
    more_budgets: tuple[float, ...] = ()
    kv: KVPolicy = "retain"
    unit: Unit = "block"
    granularity: Granularity = "token"
    steps: int = 250
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-3
    gate_learning_rate: float | None = None
    lora_rank: int = 8
    lora_alpha: int = 16
    distillation: float = 1.0
    seed: int = 0
    save_steps: int = 100
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    deepspeed: str | None = None
    max_broken_rows: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "more_budgets", tuple(self.more_budgets))  # JSON has lists
        for budget in (self.budget, *self.more_budgets):
            check_budget(budget)
        if self.latency is not None:
            check_budget(self.latency, "latency")
            if self.more_budgets:
                raise RouterConfigError(
                    "`latency`: got it with `more_budgets`, which are FLOPs. Leave one of them out."
                )
        choices = {"kv": KVPolicy, "unit": Unit, "granularity": Granularity, "precision": Precision}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        if self.deepspeed is not None and not isinstance(self.deepspeed, str):
            raise RouterConfigError(f"`deepspeed`: got {short(self.deepspeed)}, expected a name, a file, or null.")
        for name, default in self.__dataclass_fields__.items():
            value, kind = getattr(self, name), type(default.default)
            if name == "gate_learning_rate" and value is not None:
                kind = float
            if kind is int:
                least = 0 if name in ("lora_rank", "seed", "max_broken_rows") else 1
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise RouterConfigError(f"`{name}`: got {short(value)}, expected a whole number, at least {least}.")
            elif kind is float and (not isinstance(value, int | float) or not 0 <= value < float("inf")):
                raise RouterConfigError(f"`{name}`: got {short(value)}, expected a number, at least 0.")
            elif kind is bool and not isinstance(value, bool):
                raise RouterConfigError(f"`{name}`: got {short(value)}, expected true or false.")

    @property
    def points(self) -> dict[str, float]:
        """What to spend by the name of its operating point, the default first: of time under `latency`, or of FLOPs."""
        if self.latency is not None:
            return {point_of(self.latency): self.latency}
        return {point_name(budget): budget for budget in (self.budget, *self.more_budgets)}

    @property
    def counted(self) -> str:
        """What the budget is a share of, in a word."""
        return "compute" if self.latency is None else "time"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a mapping.

        Raises:
            RouterConfigError: an unknown key or a bad value.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise RouterConfigError(
                f"training config: unknown keys {', '.join(unknown)}; known keys: {', '.join(sorted(known))}."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return asdict(self)
