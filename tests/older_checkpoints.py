"""Checkpoints of older formats: `checkpoint-2` holds what format version 2 wrote of a tiny LLaVA's router."""

import json
import shutil
from pathlib import Path

from families import build, processor
from safetensors.torch import load_file

from skipit.router import RouterConfig, attach, set_gates
from skipit.router.checkpoint import GATES_FILE, OLD_GATES_FILE, ROUTER_FILE, save_gated

OLD = Path(__file__).parent / "router" / "data" / "checkpoint-2"


def pair(folder: Path, version: int) -> tuple[Path, Path]:
    """A checkpoint of today's format, and the same one as it was written in format version 1 or 2."""
    new, old = folder / "new", folder / "old"
    settings = json.loads((OLD / ROUTER_FILE).read_text())
    if version == 1:
        del settings["decide_at"]  # every layer decided for itself
        settings["format_version"] = 1
    model = build("llava")
    attach(model, RouterConfig.from_dict(settings))
    set_gates(model, **load_file(OLD / OLD_GATES_FILE))
    save_gated(model, processor("llava"), new)
    shutil.copytree(new, old)
    shutil.rmtree((old / GATES_FILE).parent)
    shutil.copyfile(OLD / OLD_GATES_FILE, old / OLD_GATES_FILE)
    (old / ROUTER_FILE).write_text(json.dumps(settings))
    return new, old
