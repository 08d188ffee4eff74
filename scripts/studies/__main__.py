"""Run one study by its name: scripts/study NAME [options]."""

import sys
from importlib import import_module
from pathlib import Path

STUDIES = {
    "ablation": "does the theory's initialization help? accuracy at equal steps, seeds and executed FLOPs",
    "budget": "does a run spend the budget it was asked for? 48 short trainings",
    "peers": "ours against what peers do, on our engine, at equal measured FLOPs",
    "prediction": "does the theory predict what skipping does? profile against controlled skipping",
    "pretrain": "make the reference VLM's weights from random ones (about an hour on 2 cores)",
    "profile-cost": "what a profile costs in dense forward + backward passes, and in memory",
    "reference": "accuracy, executed FLOPs and milliseconds at several budgets on the reference",
    "speed": "speed of gated execution on a LLaVA-shaped model with random weights",
    "stability": "does the skippable set stay where it is while a model is fine-tuned?",
    "training-cost": "what training gates costs beside plain LoRA fine-tuning, in time and memory",
    "transfer": "does a router hold on kinds of question and images that it was not trained on?",
}


def main(argv: list[str]) -> int:
    """Run a study; returns the exit status."""
    if not argv or argv[0] not in STUDIES:
        if argv and argv[0] not in ("-h", "--help"):
            print(f"scripts/study: got {argv[0]!r}, expected the name of a study:", file=sys.stderr)
        for name, what in STUDIES.items():
            print(f"  {name:14} {what}")
        return 0 if not argv or argv[0] in ("-h", "--help") else 2
    sys.argv = [f"{Path(sys.argv[0]).parent.parent / 'study'} {argv[0]}", *argv[1:]]
    import_module(f"studies.{argv[0].replace('-', '_')}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
