"""An OpenAI-compatible server that answers with one gated checkpoint, whatever a request names, and runs no code of it.

    python -m skipit.router.server CHECKPOINT --host 127.0.0.1 --port 8000

This is `transformers serve` with another way to load. Its own way to the gated model is `--trust-remote-code`, which
holds for every folder and repository that a client names; naming a model on its command line pins some endpoints only.
"""

import sys
from typing import Any

from .checkpoint import load


def main(arguments: list[str]) -> None:
    """Serve a checkpoint until interrupted.

    Args:
        arguments: the checkpoint's folder or Hub id, and options of `transformers serve`.
    """
    if not arguments or arguments[0].startswith("-"):
        sys.exit("name a checkpoint first: python -m skipit.router.server CHECKPOINT [options of `transformers serve`]")
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import app

    model_manager.ModelManager = _pinned(model_manager.ModelManager)  # type: ignore[misc]
    app(["serve", *arguments])


def _pinned(manager: Any) -> Any:
    """The class by which transformers loads what requests name, for one checkpoint only."""

    class Pinned(manager):
        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **options: Any) -> Any:
            if model_id_and_revision != self.process_model_name(self.force_model):
                raise ValueError(f"this server answers with {self.force_model!r} only")
            return super().load_model_and_processor(model_id_and_revision, *args, **options)

        def _load_processor(self, *_: Any, **__: Any) -> Any:
            wishes = {
                "device_map": self.device,
                "dtype": self.dtype,
                "attn_implementation": self.attn_implementation,
                "quantization_config": self.get_quantization_config(),
            }
            self._model, processor = load(self.force_model, **{k: v for k, v in wishes.items() if v is not None})
            return processor

        def _load_model(self, *_: Any, **__: Any) -> Any:
            return self._model  # transformers asks for the processor first

    return Pinned


if __name__ == "__main__":
    main(sys.argv[1:])
