# ruff: noqa: E501 - the card is prose
"""Make the reference VLM's weights: scripts/study pretrain --out runs/pretrain [--steps N].

Pretrains (resuming when --out holds a checkpoint), then writes weights/, the folder that is shipped: model, processor
and a card with the accuracy on held-out scans.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from skipit.router import FixedUnits, attach, detach, running
from skipit.router.folders import new_directory
from skipit.theory.cost import CostModel
from skipit.theory.profile import profile
from skipit.train.data.collate import Collator, batches
from skipit.train.reference import WEIGHTS
from skipit.train.reference.data import reference_dataset
from skipit.train.reference.questions import KINDS
from studies.architecture import build_processor
from studies.study import command, markdown

from .training import PretrainConfig, exact_match, pretrain

IMAGES = 1000


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain and publish."""
    parser = command(__name__, __doc__, out=Path("runs/pretrain"), steps=PretrainConfig.steps, seed=0)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the finished model goes")
    arguments = parser.parse_args(argv)
    config = replace(PretrainConfig(), steps=arguments.steps, seed=arguments.seed)
    model = pretrain(config, arguments.out, log=lambda line: print(line, flush=True))
    publish(model, config, arguments.weights)


def publish(model: Any, config: PretrainConfig, weights: Path) -> None:
    """Measure a trained model on held-out scans and write it, its processor and its card to a folder."""
    accuracy = exact_match(model, "test", images=IMAGES, seed=2)
    dropped = layer_dropping(model)
    print(json.dumps({"test": accuracy, "dropped": dropped}, indent=2))
    with new_directory(weights, overwrite=True) as folder:
        model.save_pretrained(folder)
        build_processor().save_pretrained(folder)
        (folder / "README.md").write_text(_card(config, accuracy, dropped), encoding="utf-8")


def layer_dropping(model: Any) -> dict[str, dict[str, float]]:
    """Accuracy when the layers of lowest block influence are dropped for all tokens, by number of layers dropped.

    Block influence is 1 - cos(input, output), averaged over tokens (ShortGPT). A model whose layers could be dropped
    for nothing would prove nothing about choosing which to skip.
    """
    rows = reference_dataset("calibration", 96)
    measured = profile(model, batches(rows, Collator(build_processor()), 16), draws=1)
    influence = measured.block_influence
    layers = len(CostModel.of(model).layers)
    attach(model)
    results = {}
    for k in (0, 1, 2, 3, 4, 6):
        run = torch.ones(layers, 2, dtype=torch.bool)
        run[influence.argsort()[:k]] = False
        # Masked execution takes the packed questions' own mask; skipping is the same either way.
        with running(policy=FixedUnits(run), mode="masked", kv="evict"):
            results[str(k)] = exact_match(model, "test", images=192, seed=3)
    detach(model)
    return results


def _card(config: PretrainConfig, accuracy: dict[str, float], dropped: dict[str, dict[str, float]]) -> str:
    rows = {"none": accuracy} | {str(k): values for k, values in dropped.items() if k != "0"}
    lines = [[name, *(f"{values[kind]:.1%}" for kind in KINDS)] for name, values in rows.items()]
    table = markdown(["layers dropped", *KINDS], lines)
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---
# skipit's reference VLM

A real `LlavaForConditionalGeneration` (4-layer CLIP tower, 12-layer Llama decoder of width 128 with grouped-query attention,
2.3 M parameters) that reads 3x3 grids of handwritten digits: look up a cell, read a row, read the grid, compare two cells, sum
a row, count a digit. Small enough to be measured exhaustively on two CPU cores, hard enough that dropping layers hurts.

Digits are scikit-learn's 1,797 real scans (UCI Optical Recognition of Handwritten Digits, CC BY 4.0), split by scan into 1,197 for
training, 300 for calibration and 300 for testing before any grid is composed.

## Accuracy on held-out scans

Exact match of the whole answer on {IMAGES:,} grids of the test scans, and on 192 of them with the layers of lowest block influence
dropped for all tokens (keys and values too), without retraining:

{table}

## How it was made

`scripts/study pretrain` on 2 CPU cores: {config.tower_steps} steps of the tower alone on "which digit is in this patch's cell", then
{config.steps:,} steps of batches of {config.batch} images with 13 questions each. Settings:

```json
{json.dumps(asdict(config), indent=2)}
```

The shipped weights were made in three sittings of one run: up to step 1,250 "compare" drew unbalanced pairs (two thirds "no"), and
the schedule's length was 6,000 steps up to step 1,250, 4,500 up to step 1,750, then {config.steps:,}. A run from scratch with this script
therefore gives a similar model, not the same bits.
"""
