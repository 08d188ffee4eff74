"""What can be set about a router. Frozen, JSON, and an unknown key is an error."""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from sys import float_info
from typing import Any, Literal, Self, get_args

from .errors import CheckpointError, RouterConfigError, short
from .strict_json import read_json

KVPolicy = Literal["retain", "evict"]
Unit = Literal["block", "attention", "mlp"]
Granularity = Literal["token", "sequence"]
BudgetPer = Literal["data", "input"]
EVERYTHING = -float_info.max  # a threshold below every logit, which is in fp32
# 1 had no decision points: every layer decided for itself. 1 and 2 had the gates at the top of the folder.
FORMAT_VERSION = 3


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Refuse a value that is not one of a `Literal`'s.

    Raises:
        RouterConfigError: names what is allowed.
    """
    if value not in get_args(kind):
        raise RouterConfigError(f"`{name}`: got {short(value)}, expected one of {', '.join(get_args(kind))}.")


def check_points(decide_at: Any) -> tuple[int, ...] | None:
    """Decision points as a tuple; None where every layer decides for itself.

    Raises:
        RouterConfigError: they are not ascending layers that begin with 0.
    """
    if decide_at is None:
        return None
    points = tuple(decide_at) if isinstance(decide_at, list | tuple) else ()
    whole = all(type(point) is int for point in points)
    if not points or not whole or points[0] != 0 or list(points) != sorted(set(points)):
        raise RouterConfigError(
            f"`decide_at`: got {short(decide_at)}, expected ascending layers that begin with 0, such as (0,) or "
            "(0, 1, 2), or None: every layer for itself."
        )
    return points


def decision_points(decide_at: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    """The decision points of a model, in order; every layer is one where each decides for itself.

    Raises:
        RouterConfigError: a point is not one of the layers.
    """
    if decide_at is None:
        return tuple(range(layers))
    if decide_at[-1] >= layers:
        raise RouterConfigError(f"`decide_at`: got {decide_at}, the model has layers 0 to {layers - 1}.")
    return decide_at


def check_per_input(decide_at: tuple[int, ...] | None, granularity: Granularity) -> None:
    """Refuse settings under which a prompt's logits are not all known before its tokens run, one by one.

    Raises:
        RouterConfigError: says which.
    """
    got = f"granularity={granularity!r}" if decide_at == (0,) else f"decide_at={decide_at}"
    if decide_at != (0,) or granularity != "token":
        raise RouterConfigError(
            f"`budget_per`: 'input' spends a budget by the logits of all layers and tokens at once, got {got}. "
            "Use decide_at=(0,) and granularity='token', or budget_per='data'."
        )


def check_capacity(capacity: Any, layers: int) -> tuple[float, ...]:
    """The share of a prompt's tokens that may run each layer.

    Args:
        capacity: one share for all layers, or one for each.
        layers: how many the model has.

    Raises:
        RouterConfigError: not numbers in (0, 1], or not as many as there are layers.
    """
    shares = tuple(capacity) if isinstance(capacity, list | tuple) else (capacity,) * layers
    numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares)
    if not numbers or len(shares) != layers or not all(0 < share <= 1 for share in shares):
        raise RouterConfigError(
            f"`capacity`: got {short(capacity)}, expected the share of a prompt's tokens that may run a layer, a "
            f"number in (0, 1], or one for each of the {layers} layers. No layer has room for less than one token."
        )
    return tuple(map(float, shares))


def point_name(budget: float | str) -> str:
    """The name of an operating point: a budget's number as one writes it, any other name as it is."""
    return f"{budget:g}" if isinstance(budget, int | float) else budget


@dataclass(frozen=True)
class RouterConfig:
    """Settings of the gates attached to a model.

    Args:
        kv: what happens to the keys and values of a token that skips a layer. `retain`: they are still computed
            and others may attend to them; `evict`: the token does not exist for that layer.
        unit: what a token skips: the whole layer (`block`), or the `attention` or the `mlp` inside it.
        granularity: `token`, each decides for itself; `sequence`, the prompt's tokens of a modality decide together,
            by the mean of their logits, for themselves and for all tokens that are generated.
        decide_at: the decision points, layers in ascending order that begin with 0. At each, all gates of the layers up
            to the next one read the state that enters it, and decide at once. None: every layer's gate reads its own.
        budget_per: what spends a budget. `data`: such inputs as it was calibrated on, in the mean, by one threshold;
            `input`: the prompt of each, by a threshold of its own, found from its logits: any number in (0, 1] will do.
        layers: dotted path of the decoder layers, such as "model.language_model.layers"; None finds them.
        threshold: a token runs a layer when its gate logit exceeds this; the default operating point.
        operating_points: named thresholds, such as {"0.5": -0.3} for half of the dense compute.
        format_version: version of this file format.
    """

    kv: KVPolicy = "retain"
    unit: Unit = "block"
    granularity: Granularity = "token"
    decide_at: tuple[int, ...] | None = (0,)
    budget_per: BudgetPer = "data"
    layers: str | None = None
    threshold: float = 0.0
    operating_points: dict[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            raise RouterConfigError(
                f"`format_version`: got {short(self.format_version)}, this skipit reads 1 to {FORMAT_VERSION}. "
                "Load the checkpoint with the skipit version that wrote it, or a newer one."
            )
        choices = {"kv": KVPolicy, "unit": Unit, "granularity": Granularity, "budget_per": BudgetPer}
        for name, kind in choices.items():
            check_choice(name, getattr(self, name), kind)
        object.__setattr__(self, "decide_at", check_points(self.decide_at))
        if self.budget_per == "input":
            check_per_input(self.decide_at, self.granularity)
        if self.layers is not None and not isinstance(self.layers, str):
            raise RouterConfigError(f"`layers`: got {short(self.layers)}, expected a dotted path or null.")
        if not isinstance(self.operating_points, dict):
            raise RouterConfigError(f"`operating_points`: got {short(self.operating_points)}, expected a mapping.")
        for name, value in {"threshold": self.threshold, **self.operating_points}.items():
            # NaN would silently skip everything, and JSON has no infinity.
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and -float_info.max <= value <= float_info.max):
                raise RouterConfigError(f"threshold {name!r}: got {short(value)}, expected a finite number.")
        # Gate logits are compared with them: torch cannot hold every Python integer, but every float.
        object.__setattr__(self, "threshold", float(self.threshold))
        points = {name: float(value) for name, value in self.operating_points.items()}
        object.__setattr__(self, "operating_points", points)

    def threshold_at(self, budget: float | str | None) -> float:
        """The threshold of a named operating point; None is the default one. At a budget of 1 nothing is skipped.

        Raises:
            RouterConfigError: no operating point has this name.
        """
        if budget is None:
            return self.threshold
        name = point_name(budget)
        if name == "1":
            return EVERYTHING
        if not isinstance(name, str) or name not in self.operating_points:
            known = ", ".join(self.operating_points) or "none"
            raise RouterConfigError(
                f"`budget`: got {short(name)}, this router is calibrated for: {known}. "
                "Choose one of these, or calibrate another with `skipit calibrate`."
            )
        return self.operating_points[name]

    def share_at(self, budget: float | str | None) -> float:
        """The share of FLOPs that a prompt spends where budgets are per input; None is the default operating point's.

        Raises:
            RouterConfigError: not a number in (0, 1].
        """
        if budget is None:
            default = (name for name, value in self.operating_points.items() if value == self.threshold)
            budget = next((float(name) for name in default if name.replace(".", "", 1).isdigit()), None)
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
            raise RouterConfigError(
                f"`budget`: got {short(budget)}, but with budget_per='input' each prompt spends a share of its FLOPs. "
                "Give a number in (0, 1]."
            )
        return float(budget)

    def at(self, budget: float | str | None) -> Self:
        """These settings with a named operating point as the default one.

        Raises:
            RouterConfigError: no operating point has this name.
        """
        return replace(self, threshold=self.threshold_at(budget))

    def with_point(self, budget: float | str, threshold: float, *, default: bool = False) -> Self:
        """These settings with one more operating point, which may become the default one too.

        Raises:
            RouterConfigError: the threshold is not a finite number.
        """
        points = {**self.operating_points, point_name(budget): threshold}
        return replace(self, operating_points=points, threshold=threshold if default else self.threshold)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a mapping.

        Raises:
            RouterConfigError: an unknown key or a bad value.
        """
        if not isinstance(values, dict):
            raise RouterConfigError(f"router config: got {type(values).__name__}, expected a JSON object.")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise RouterConfigError(
                f"router config: unknown keys {', '.join(unknown)}; known keys: {', '.join(sorted(known))}."
            )
        version = values.get("format_version")
        if type(version) is int and 1 <= version < FORMAT_VERSION:
            missing = {"decide_at": None} if version == 1 else {}
            values = {**missing, **values, "format_version": FORMAT_VERSION}
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a JSON file.

        Raises:
            RouterConfigError: the file is not JSON or not a router config; the message names the file.
        """
        try:
            return cls.from_dict(read_json(Path(path)))
        except CheckpointError as error:
            raise RouterConfigError(str(error)) from error  # which names the file
        except RouterConfigError as error:
            raise RouterConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return asdict(self)
