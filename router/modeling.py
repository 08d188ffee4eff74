"""What transformers runs when the code inside a gated checkpoint is trusted: the ordinary model with its gates."""

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

from .attach import attach
from .checkpoint import attach_from, load_router, local_folder
from .config import FORMAT_VERSION


class GatedModel:
    """The name in a gated checkpoint's `auto_map`; what it gives is an object of the family's own class.

    It is no subclass of that class: one that is made outside transformers loses the conversion of weight names and
    leaves weights random without a word.
    """

    @classmethod
    def from_pretrained(cls, source: str | Path, *args: Any, budget: float | str | None = None, **options: Any) -> Any:
        """Load the dense model from a gated checkpoint and attach its gates.

        Args:
            source: a folder made by `save_gated`, or the Hub id of one.
            *args: passed to transformers' `from_pretrained`.
            budget: a calibrated operating point, which becomes the model's default one.
            **options: the same.

        Raises:
            CheckpointError: the gates or the router's settings are missing or damaged.
            RouterConfigError: not a calibrated budget.
        """
        folder = local_folder(source, **options)
        _shared(load_router)(folder)[0].threshold_at(budget)  # before the weights
        options["trust_remote_code"] = False  # the class that transformers itself has
        loaded = AutoModelForImageTextToText.from_pretrained(source, *args, **options)
        # A tuple with `output_loading_info`.
        _shared(attach_from)(loaded[0] if isinstance(loaded, tuple) else loaded, folder, budget)
        return loaded

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        """A model without weights of its own, with new gates, which let everything run."""
        model = AutoModelForImageTextToText.from_config(config, **{**options, "trust_remote_code": False})
        _shared(attach)(model)
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to note: transformers calls this on every class that it finds through `auto_map`."""


def _shared(function: Any) -> Any:
    """A function as the installed skipit has it, if it reads this format; else the copy inside the checkpoint.

    A copy has a context of its own: where skipit is installed, `skipit.running(...)` would not reach its models, and
    would not say so.
    """
    try:
        if import_module("skipit.router.config").FORMAT_VERSION >= FORMAT_VERSION:
            return getattr(import_module("skipit.router.checkpoint"), function.__name__)
    except ImportError:
        pass
    return function
