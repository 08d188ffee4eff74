"""What studies share: rows, a profile, the one training of a reference router, cells that resume; and `options.py`."""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from skipit import __version__
from skipit.router import RouterConfig, attach
from skipit.router.config import KVPolicy
from skipit.router.errors import CheckpointError
from skipit.router.folders import load_json, provenance, save_json
from skipit.theory.artefact import load_profile, save_profile
from skipit.theory.cost import CostModel
from skipit.theory.plan import Init, make_plan
from skipit.theory.profile import Profile
from skipit.train.config import TrainConfig
from skipit.train.data.collate import Collator, batches
from skipit.train.data.sources import REFERENCE as REFERENCE
from skipit.train.data.sources import load_data, load_model
from skipit.train.display import note, training_progress
from skipit.train.export import merge_run
from skipit.train.launch import CHECKPOINTS
from skipit.train.profiling import profile_model
from skipit.train.reference.data import reference_dataset
from skipit.train.reference.digits import Split
from skipit.train.reference.questions import KINDS, Kind
from skipit.train.run import train
from skipit.train.run_folder import RUN_FILE

from .answers import always, answers, right, same_rows
from .options import command as command
from .options import markdown as markdown


@dataclass(frozen=True)
class Study:
    """What all measurements of one seed share: settings, rows, the reference model, its profile and trainings.

    Attributes:
        seed: of rows, training and random choices.
        steps: of training.
        samples: test rows.
        calibration: held-out rows, on which budgets are met.
        profiled: rows of the theory's profile.
        batch_size: rows of a training step.
        lora_rank: of LoRA, whose scale is 2.
        learning_rate: of LoRA.
        kinds: of question, in the rows of profile, training and calibration; test rows have all.
        decide_at: decision points, as of `RouterConfig`.
        model: by name, whose rows have the same name; `kinds` are the reference's.
        out: folder in which the profile is kept; None keeps none.
    """

    seed: int = 0
    steps: int = 250
    samples: int = 480
    calibration: int = 96
    profiled: int = 192
    batch_size: int = 16
    lora_rank: int = 8
    learning_rate: float = TrainConfig.learning_rate
    kinds: tuple[Kind, ...] = KINDS
    decide_at: tuple[int, ...] | None = RouterConfig.decide_at
    model: str = REFERENCE
    out: Path | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace, seed: int, **more: Any) -> Self:
        """From the command line, for one of its seeds."""
        given = {field.name: vars(arguments)[field.name] for field in fields(cls) if field.name in vars(arguments)}
        return cls(**{**given, "seed": seed, **more})

    def settings(self) -> dict[str, Any]:
        """All that a figure of this study depends on, to be kept with it."""
        return {name: value for name, value in asdict(self).items() if name != "out"}

    def config(self, budget: float, kv: KVPolicy = "retain", **more: Any) -> TrainConfig:
        """Settings of a training at a budget."""
        return TrainConfig(
            budget=budget,
            kv=kv,
            steps=self.steps,
            seed=self.seed,
            batch_size=self.batch_size,
            lora_rank=self.lora_rank,
            lora_alpha=2 * self.lora_rank,
            learning_rate=self.learning_rate,
            save_steps=50,
            **more,
        )

    def rows(self, split: Split, size: int) -> Any:
        """Rows of the model's data set."""
        if self.model != REFERENCE:
            return load_data(self.model, split, size, self.seed)
        return reference_dataset(split, size, self.seed, KINDS if split == "test" else self.kinds)

    def read(self, split: Split, size: int, batch_size: int | None = None) -> list[dict[str, Tensor]]:
        """Batches of these rows, with labels; by default few pages, whose logits over a real vocabulary are large."""
        rows = batch_size or (48 if self.model == REFERENCE else 4)
        return list(batches(self.rows(split, size), Collator(self.dense[1]), rows))

    def load(self) -> Any:
        """One more dense model, to be changed."""
        return load_model(self.model)[0]

    @cached_property
    def dense(self) -> tuple[Any, Any]:
        """The untouched model and its processor."""
        return load_model(self.model)

    @cached_property
    def gated(self) -> Any:
        """A dense model that can be told what to skip."""
        model = self.load()
        attach(model)
        return model

    @cached_property
    def costs(self) -> CostModel:
        """Of the dense model's layers, with linear gates."""
        return CostModel.of(self.dense[0])

    @cached_property
    def held_out(self) -> list[dict[str, Tensor]]:
        """Calibration rows."""
        return self.read("calibration", self.calibration)

    @cached_property
    def test(self) -> list[dict[str, Tensor]]:
        """Test rows."""
        return self.read("test", self.samples)

    @cached_property
    def wanted(self) -> list[Tensor]:
        """What the dense model answers on the test rows."""
        return answers(self.dense[0], self.test, always({})).predicted

    @cached_property
    def dense_accuracy(self) -> float:
        """Share of test rows that the dense model answers right."""
        return float(same_rows(self.wanted, right(self.test)).double().mean())

    @cached_property
    def profile(self) -> Profile:
        """The theory's measurements, made once."""
        rows = self.rows("train", self.profiled)
        options: dict[str, Any] = {"seed": self.seed, "decide_at": self.decide_at}
        if self.out is None:
            return profile_model(*self.dense, rows, **options)
        settings = {**options, "profiled": self.profiled, "kinds": self.kinds, "model": self.model}
        place = self.out / "profiles" / f"{self.seed}_{digest(settings)}"
        if not place.exists():
            save_profile(profile_model(*self.dense, rows, **options), place)
        return load_profile(place)

    def trained(
        self,
        config: TrainConfig,
        folder: Path,
        init: Init = "theory",
        *,
        calibrated: bool = True,
        callbacks: Sequence[Any] = (),
    ) -> tuple[Any, Any]:
        """The model with a trained router, LoRA merged, and its processor.

        Args:
            config: settings of the run.
            folder: of the run; a finished one is read, an interrupted one goes on.
            init: of the gates.
            calibrated: find the threshold on calibration rows, as `skipit train` does.
            callbacks: of the trainer.
        """
        if not (folder / RUN_FILE).is_file():
            model, processor = load_model(self.model)
            with training_progress(config) as bar:
                train(
                    model,
                    processor,
                    self.rows("train", config.steps * config.batch_size),
                    make_plan(self.profile, config.budget, config.kv, init),
                    config,
                    folder,
                    calibration=self.rows("calibration", self.calibration) if calibrated else None,
                    base=self.model,
                    resume=any((folder / CHECKPOINTS).glob("checkpoint-*")),
                    callbacks=[bar, *callbacks],
                )
        return merge_run(folder)


def digest(settings: Mapping[str, Any]) -> str:
    """A few letters that differ where settings do, or the version of skipit."""
    return hashlib.sha256(json.dumps({**settings, "skipit": __version__}, sort_keys=True).encode()).hexdigest()[:8]


def once(
    out: Path,
    name: str,
    settings: Mapping[str, Any],
    measure: Callable[[], Mapping[str, Any]],
    needs: Iterable[str] = (),
) -> dict[str, Any]:
    """A cell of a sweep: what was measured with the same settings, else measured now and kept in a file of its own.

    The file's name has a hash of the settings and of skipit's version: what was measured with others stays beside it
    and is never taken for it. A damaged file is measured again.

    Args:
        out: folder of the study; cells are in `cells/`.
        name: of the file, for people.
        settings: all that the figures depend on.
        measure: makes what the cell holds.
        needs: of this, what a finished cell must hold to be enough.

    Returns:
        Settings, figures, `file`, and what made it.
    """
    settings = json.loads(json.dumps({**settings, "skipit": __version__}))
    path = out / "cells" / f"{name}_{digest(settings)}.json"
    try:
        found = load_json(path)
    except CheckpointError:  # not there, or damaged
        found = {}
    if any(found.get(key) != value for key, value in settings.items()) or any(key not in found for key in needs):
        note(f"measuring {name}")
        made = {"threads": torch.get_num_threads(), "made_by": provenance()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, {**settings, "file": path.name, **measure(), **made})
    return load_json(path)
