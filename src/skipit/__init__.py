"""skipit: learn which decoder layers a vision-language model may skip for which token, and really skip them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipit.eval.measure.traced import generate as generate
    from skipit.router import Drafts as Drafts
    from skipit.router import Gated as Gated
    from skipit.router import RouterConfig as RouterConfig
    from skipit.router import SkipItError as SkipItError
    from skipit.router import Trace as Trace
    from skipit.router import attach as attach
    from skipit.router import compile as compile
    from skipit.router import detach as detach
    from skipit.router import running as running
    from skipit.router import set_gates as set_gates
    from skipit.router.checkpoint import save_gated as save_gated
    from skipit.theory.calibrate import calibrate as calibrate
    from skipit.theory.calibrate import measure_capacity as measure_capacity
    from skipit.theory.plan import make_plan as make_plan
    from skipit.theory.profile import profile as profile
    from skipit.train.adapter import load as load
    from skipit.train.config import TrainConfig as TrainConfig
    from skipit.train.data.collate import Collator as Collator
    from skipit.train.data.collate import batches as batches

# Where each public name lives. They are imported when first used: `import skipit` itself loads neither torch
# nor transformers. A name of a folder, such as `train`, cannot be one: it is the folder as soon as that is imported.
_PUBLIC = {
    "Collator": "skipit.train.data.collate",
    "Drafts": "skipit.router",
    "Gated": "skipit.router",
    "RouterConfig": "skipit.router",
    "SkipItError": "skipit.router",
    "Trace": "skipit.router",
    "TrainConfig": "skipit.train.config",
    "attach": "skipit.router",
    "batches": "skipit.train.data.collate",
    "calibrate": "skipit.theory.calibrate",
    "compile": "skipit.router",
    "detach": "skipit.router",
    "generate": "skipit.eval.measure.traced",
    "load": "skipit.train.adapter",
    "make_plan": "skipit.theory.plan",
    "measure_capacity": "skipit.theory.calibrate",
    "profile": "skipit.theory.profile",
    "running": "skipit.router",
    "save_gated": "skipit.router.checkpoint",
    "set_gates": "skipit.router",
}
__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'skipit' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
