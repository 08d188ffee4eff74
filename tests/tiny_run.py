"""Everything that skipit writes about one tiny model: its base, a profile, a plan, a run, a checkpoint, an adapter."""

from pathlib import Path
from typing import NamedTuple

from families import build, processor
from families.family import picture

from skipit.theory.artefact import save_plan, save_profile
from skipit.theory.plan import make_plan
from skipit.train.adapter import export_adapter
from skipit.train.config import TrainConfig
from skipit.train.export import export
from skipit.train.profiling import profile_model
from skipit.train.run import train

DECIDE_AT = (0, 2)  # another than a router has by itself


class Made(NamedTuple):
    base: Path
    run: Path
    merged: Path
    adapter: Path
    profile: Path
    plan: Path
    size: int


def make_all(folder: Path) -> Made:
    """Train a tiny LLaVA for two steps; `size` is the adapter's, in bytes."""
    base, run, merged, adapter, profiled, planned = (
        folder / name for name in ("base", "run", "merged", "adapter", "profile", "plan")
    )
    model = build("llava")
    model.save_pretrained(base)
    processor("llava").save_pretrained(base)
    parts = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    rows = [
        {
            "images": [picture(number, 0)],
            "prompt": [{"role": "user", "content": parts}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": f"a cat t{number + 5}"}]}],
        }
        for number in range(4)
    ]
    profile = profile_model(model, processor("llava"), rows, draws=1, decide_at=DECIDE_AT)
    plan = make_plan(profile, budget=0.6)
    save_profile(profile, profiled)
    save_plan(plan, planned)
    settings = TrainConfig(budget=0.6, steps=2, batch_size=2, accumulation=1, lora_rank=2)
    train(model, processor("llava"), rows, plan, settings, run, calibration=rows, base=str(base))
    export(run, merged)
    return Made(base, run, merged, adapter, profiled, planned, export_adapter(run, adapter))
