"""A plugin for vLLM: a gated checkpoint that is served runs gated; see docs/serving.md.

vLLM finds `register` under the entry point group `vllm.general_plugins` and calls it in each of its processes.
"""

from typing import Any


def register() -> None:
    """Teach vLLM gated checkpoints; other models are served as before.

    Raises:
        ImportError: this version of vLLM lacks a hook that is needed.
    """
    from .hooks import install

    install()


def executed(model: Any) -> dict[str, Any]:
    """What the requests of a served model have executed, by request id: `llm.apply_model(skipit.vllm.executed)`.

    Args:
        model: that vLLM runs, in the process that runs it.

    Returns:
        A `Spent` of each of the last 1,024 requests.
    """
    return {name: row.spent for name, row in model.decisions.rows.items()}
