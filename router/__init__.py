"""Gates inside a model: attaching them, deciding with them, and executing only what they let run."""

from .attach import attach, detach, find_router, gate_state, gated_layers, set_gates
from .cache import SkipCache
from .call import Decision, Policy, Step, Trace
from .config import RouterConfig
from .errors import (
    CheckpointError,
    DecoderNotFoundError,
    InputError,
    RouterConfigError,
    SkipItError,
    UnsupportedModelError,
)
from .modality import MODALITIES, TEXT, VISION, token_modality
from .policies import FixedUnits, Gated
from .running import Router, running

__all__ = [
    "MODALITIES",
    "TEXT",
    "VISION",
    "CheckpointError",
    "Decision",
    "DecoderNotFoundError",
    "FixedUnits",
    "Gated",
    "InputError",
    "Policy",
    "Router",
    "RouterConfig",
    "RouterConfigError",
    "SkipCache",
    "SkipItError",
    "Step",
    "Trace",
    "UnsupportedModelError",
    "attach",
    "detach",
    "find_router",
    "gate_state",
    "gated_layers",
    "running",
    "set_gates",
    "token_modality",
]
