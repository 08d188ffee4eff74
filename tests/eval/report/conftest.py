"""One evaluation with everything in it, on the reference model: what the tests of the report read."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from skipit.eval.evaluate import Request, evaluate
from skipit.theory.artefact import save_plan, save_profile
from skipit.theory.plan import make_plan
from skipit.train.data.sources import load_data, load_model
from skipit.train.export import export_plan
from skipit.train.profiling import profile_model


def entry(system: str, accuracy: float, compute: float, **more: Any) -> dict[str, Any]:
    """What a sweep of baselines says of one method at one budget."""
    return {
        "system": system,
        "budget": 0.5,
        "trained": system.startswith("ours"),
        "runs": 3,
        "seeds": 3,
        "floor": None,
        "failed": 0,
        "accuracy": accuracy,
        "spread": 0.01,
        "compute": compute,
        "same_answer": accuracy,
        "prefill_ms": 20.0,
        "prefill_speed_up": 0.9,
        "decode_speed_up": 0.9,
        **more,
    }


ENTRIES = [entry("ours-retain", 0.99, 0.5), entry("bi", 0.7, 0.49), entry("<b>random</b> $x$", 0.4, 0.5, spread=None)]
TRANSFER = {
    "types": {
        kind: {
            "dense": {"accuracy": 0.98, "same": 1.0, "compute": 1.0, "of_dense": 1.0},
            "trained on cell": {"accuracy": right, "same": right, "compute": 0.5, "of_dense": right / 0.98},
            "trained on all": {"accuracy": 0.98, "same": 0.97, "compute": 0.5, "of_dense": 1.0},
        }
        for kind, right in (("cell", 0.98), ("row", 0.7))
    },
    "shifts": {
        "noise": {
            "dense": {"accuracy": 0.6, "same": 1.0, "compute": 1.0, "of_dense": 1.0},
            "trained on all": {"accuracy": 0.59, "same": 0.8, "compute": 0.5, "of_dense": 0.98},
        }
    },
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of an untrained gated checkpoint, with further routers and read-in studies."""
    at = tmp_path_factory.mktemp("report")
    measured = profile_model(*load_model("reference"), load_data("reference", "calibration", 12), draws=1)
    save_profile(measured, at / "profile")
    for name, init in (("theory", "theory"), ("zero", "zero")):
        save_plan(make_plan(measured, 0.6, init=init), at / f"plan-{name}")
        export_plan(at / f"plan-{name}", "reference", at / name)
    for folder, summary in (
        ("baselines", {"entries": ENTRIES, "made_by": {"command": "scripts/study peers --seeds 0 1 2"}}),
        ("transfer", {"figures": TRANSFER, "kinds": ["cell"], "made_by": {}}),
    ):
        (at / folder).mkdir()
        (at / folder / "summary.json").write_text(json.dumps(summary))
    request = Request(
        at / "theory",
        "reference",
        samples=8,
        repeats=2,
        compiled=False,
        profile=at / "profile",
        also=[("neutral <script>", at / "zero"), ("neutral <script>", at / "zero"), ("again", at / "theory")],
        baselines=at / "baselines",
        transfer=at / "transfer",
        controlled_samples=4,
    )
    evaluate(request, at / "out")
    return at / "out"


@pytest.fixture(scope="session")
def page(made: Path) -> str:
    """The report."""
    return (made / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def values(made: Path) -> dict[str, Any]:
    """What eval.json holds; a copy to change."""
    return copy.deepcopy(json.loads((made / "eval.json").read_text(encoding="utf-8")))
