"""The model card of a checkpoint: what it is, what was measured on it, how to run it, and how it was made."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from skipit.router import RouterConfig
from skipit.router.checkpoint import ROUTER_FILE
from skipit.router.errors import CheckpointError
from skipit.router.folders import load_json, new_file
from skipit.theory.calibrate import Took
from skipit.theory.plan import points_text
from skipit.train.data.sources import BUILT_IN
from skipit.train.data.used import RECORD, HeldOut

Kind = Literal["run", "adapter", "plan"]
CARD, PROVENANCE_FILE, EVALUATION = "README.md", "provenance.json", "eval.json"
ADAPTER_CONFIG, CERTIFICATES = "adapter_config.json", "certificates.json"
LATENCIES = "latencies"  # in a record: what operating points in time came to, by name
UNNAMED = "-"  # the default threshold, where it is no operating point
_SETTINGS = tuple(field.name for field in fields(RouterConfig))  # an adapter's file holds more
# What lies between these is written anew when a checkpoint gets an operating point; the rest is the reader's.
_START, _END = "<!-- operating points of router_config.json -->", "<!-- end of operating points -->"


def card(
    record: Mapping[str, Any],
    config: RouterConfig,
    kind: Kind = "run",
    evaluation: Mapping[str, Any] | None = None,
    certificates: Mapping[str, Any] | None = None,
) -> str:
    """The text of a card.

    Args:
        record: of the run or plan: `base`, `init`, `made_by`, and of a run `config` and `calibrated_shares`.
        config: the router's settings.
        kind: a `run` with its LoRA merged, an `adapter`, or a `plan` that nothing was trained for.
        evaluation: what `skipit eval` wrote about it.
        certificates: of operating points with a risk, by their names.
    """
    sections = [
        _front(record["base"], kind),
        _what(record, config, kind),
        "## Measured\n\n" + (_UNMEASURED if evaluation is None else measured_table(evaluation)),
        f"## Use\n\n{_use(kind)}",
        f"## Operating points\n\n{points_table(config, record, certificates or {})}",
        "## How it was made\n\n" + _how(record, kind),
    ]
    return "\n\n".join(sections) + "\n"


def _front(base: str, kind: Kind) -> str:
    library, relation = ("peft", "adapter") if kind == "adapter" else ("transformers", "finetune")
    # The Hub refuses a card whose base is a folder.
    of = {"base_model": base, "base_model_relation": relation} if _on_hub(base) else {}
    about: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "image-text-to-text",
        **of,
        "tags": ["skipit", "layer-skipping"],
    }
    return f"---\n{ModelCardData(**about).to_yaml()}\n---"


def _on_hub(base: str) -> bool:
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return "/" in base and not Path(base).exists()


def _name(base: str) -> str:
    """A base as others may know it: where it lies on this machine is nobody's business."""
    if base in BUILT_IN:
        return f"skipit's {base} model"
    return base if _on_hub(base) else Path(base).name


def _what(record: Mapping[str, Any], config: RouterConfig, kind: Kind) -> str:
    base = _name(record["base"])
    asked = record if kind == "plan" else record["config"]
    share = f"{asked['budget']:.0%} of the dense decoder's FLOPs"
    if asked.get("latency") is not None:
        share = f"{asked['latency']:.0%} of the dense layers' time for a prompt"
    made = f"Gates and LoRA were fine-tuned by skipit to spend {share}."
    if kind == "plan":
        made = f"Its gates come from a profile, for {share}; nothing was trained."
    skipped = {"block": "a whole decoder layer", "attention": "the attention of a layer", "mlp": "the MLP of a layer"}
    deciding = {"token": "Each token decides", "sequence": "A prompt's tokens of a modality decide together"}
    kept = {"retain": "are kept", "evict": "are not computed either"}
    return (
        f"# {base}, with gates for skipping layers\n\n"
        f"{base} with one small gate per decoder layer. {deciding[config.granularity]} whether to skip "
        f"{skipped[config.unit]}; what is skipped is not computed. "
        f"Gates decide by the states that enter {points_text(config.decide_at)}. "
        f"Keys and values of tokens that skip {kept[config.kv]} (`{config.kv}`). {made}"
    )


def measured_table(evaluation: Mapping[str, Any]) -> str:
    """What `skipit eval` found, as a Markdown table with what it was found on.

    Raises:
        CheckpointError: not what `skipit eval` writes.
    """
    try:
        models = [evaluation["dense"], evaluation["gated"]]
        lines = [
            ("accuracy", [f"{model['accuracy']:.1%}" for model in models]),
            ("same answer as dense", [f"{model['same_answer']:.1%}" for model in models]),
            ("decoder FLOPs executed", [f"{model['compute']:.1%}" for model in models]),
            ("prefill, ms (speed-up)", [_time(model["latency"], "prefill") for model in models]),
            ("decode step, ms (speed-up)", [_time(model["latency"], "decode") for model in models]),
        ]
        rows, made = models[0]["rows"], evaluation["made_by"]
        repeats = models[0]["latency"]["repeats"]
        held = HeldOut(**evaluation.get("held_out") or {"rows": rows, "used": {}})
        about = f"`{made['command']}`, {made['created'][:10]}, on {made['platform']}"
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"not what `skipit eval` writes into eval.json ({type(error).__name__}: {error})."
        ) from error
    table = "\n".join(f"| {what} | {' | '.join(cells)} |" for what, cells in lines)
    which = f"{rows} held-out rows" if held.known else f"{rows} rows, {held.sentence()}"
    return (
        f"|  | dense | gated |\n|---|---:|---:|\n{table}\n\n"
        f"{which}; dense is the model without gates; milliseconds are medians of {repeats} repeats of one "
        f"row, speed-up is dense time over gated time. Measured by {about}."
    )


def _time(latency: Mapping[str, Any], what: str) -> str:
    return f"{latency[f'{what}_ms']:.2f} ({latency[f'{what}_speed_up']:.2f}x)"


def shares_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Executed shares of dense FLOPs that were measured at operating points, by name."""
    return {name: share for name, share in (record.get("calibrated_shares") or {}).items() if share is not None}


def points_table(config: RouterConfig, record: Mapping[str, Any], certificates: Mapping[str, Any]) -> str:
    """The operating points of a router as a Markdown table, between marks by which it is found again."""
    shares = shares_of(record)
    if not config.operating_points:
        spent = f", which executes {shares[UNNAMED]:.1%} of the dense decoder's FLOPs" if UNNAMED in shares else ""
        body = f"None is calibrated: the gates run at their default threshold{spent}. `skipit calibrate` adds some."
    else:
        lines = [
            "| budget or name | threshold | decoder FLOPs executed, as measured |",
            "|---|---:|---:|",
        ]
        points = config.operating_points
        if config.threshold not in points.values():
            points = {UNNAMED: config.threshold, **points}
        for name, threshold in points.items():
            share = shares.get(name)
            shown = "-" if share is None else f"{share:.1%}"
            mark = " (default)" if threshold == config.threshold else ""
            lines.append(f"| {name}{mark} | {threshold:.4g} | {shown} |")
        chosen = next(iter(config.operating_points))
        call = f"model.generate(**inputs, budget={chosen if _is_number(chosen) else repr(chosen)})"
        body = "\n".join([f"`{call}` chooses one of these for a call.", "", *lines])
        for name, proof in certificates.items():
            body += (
                f"\n\nAt `{name}`, with confidence {proof['confidence']:.0%}, at most {proof['risk']:.0%} of new rows "
                "like those measured are answered otherwise than by the dense model."
            )
    for name, took in (record.get(LATENCIES) or {}).items():
        body += f"\n\n{f'At `{name}`' if name != UNNAMED else 'There'} it takes {Took(**took).sentence()}."
    return f"{_START}\n{body}\n{_END}"


def _is_number(name: str) -> bool:
    return name.replace(".", "", 1).isdigit()


def update_points(
    folder: Path, config: RouterConfig, record: Mapping[str, Any], certificates: Mapping[str, Any]
) -> None:
    """Write the operating points of a checkpoint's card anew; a card without their marks is left alone."""
    path = folder / CARD
    if not path.is_file():
        return
    before, start, rest = path.read_text(encoding="utf-8").partition(_START)
    _, end, after = rest.partition(_END)
    if start and end:
        with new_file(path) as file:
            file.write_text(before + points_table(config, record, certificates) + after, encoding="utf-8")


def write_card(folder: Path, evaluation: Mapping[str, Any] | None = None) -> None:
    """Write the card of a checkpoint from what lies in it, and from what was measured on it.

    Raises:
        CheckpointError: it lacks the record of how it was made, or is damaged.
    """
    values = load_json(folder / ROUTER_FILE)
    config = RouterConfig.from_dict({name: value for name, value in values.items() if name in _SETTINGS})
    record = load_json(folder / PROVENANCE_FILE)
    kind: Kind = "run" if "config" in record else "plan"
    if (folder / ADAPTER_CONFIG).is_file():
        kind = "adapter"
    record = {**record, "made_by": record.get("made_by") or record["exported_by"]}
    certificates = load_json(folder / CERTIFICATES) if (folder / CERTIFICATES).is_file() else {}
    (folder / CARD).write_text(card(record, config, kind, evaluation, certificates), encoding="utf-8")


def checkpoint_record(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of how it was made; empty if it says nothing."""
    path = checkpoint / PROVENANCE_FILE
    return load_json(path) if path.is_file() else {}


def read_evaluation(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The figures of an evaluation, for the card of the checkpoint it is about.

    Raises:
        CheckpointError: no such file, not what `skipit eval` writes, or of another checkpoint.
    """
    path = folder / EVALUATION
    evaluation = load_json(path)
    try:
        measured_table(evaluation)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    measured = Path(str((evaluation.get("settings") or {}).get("checkpoint", "")))
    if (measured / PROVENANCE_FILE).is_file():
        one, other = (
            {**load_json(place / PROVENANCE_FILE), "calibrated_shares": None, LATENCIES: None, RECORD: None}
            for place in (measured, checkpoint)
        )
        if one != other:
            raise CheckpointError(f"{path} is of {measured}, not of {checkpoint}. Evaluate this one first.")
    return evaluation


def _how(record: Mapping[str, Any], kind: Kind) -> str:
    versions = record["made_by"]["versions"]
    with_what = ", ".join(
        f"{name} {versions[name]}" for name in ("skipit", "torch", "transformers") if name in versions
    )
    line = f"`{record['made_by']['command']}` with {with_what}."
    if kind == "plan":
        return f"Gates initialized by `{record['init']}`. {line} More in `provenance.json`."
    settings = record["config"]
    rows = settings["batch_size"] * settings["accumulation"]
    return (
        f"{settings['steps']} steps of {rows} rows, LoRA rank {settings['lora_rank']}, gates initialized by "
        f"`{record['init']}`, seed {settings['seed']}. {line} More in `provenance.json`."
    )


_UNMEASURED = (
    "Accuracy and speed of this checkpoint were not measured when it was written. `skipit eval` measures them, and "
    "`skipit export CHECKPOINT --eval DIR --out COPY` writes them here."
)


def _use(kind: Kind) -> str:
    what, how = _USE_ADAPTER if kind == "adapter" else _USE
    return f"```python\nimport skipit\n\n{what}\nanswer = model.generate(**inputs)  # as usual\n```\n\n{how}"


_USE = (
    'model, processor = skipit.load("this folder or its Hub id")  # gated; runs no code from the folder',
    "Without skipit, `AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)` gives the gated model "
    "too,\nfrom the code in `skipit_router/`. Without `trust_remote_code` it gives the dense model with these weights, "
    "which runs\nevery layer.",
)
_USE_ADAPTER = (
    'model, processor = skipit.load("this folder", base="the base, or a copy")  # gates and LoRA on top of the base',
    "`PeftModel.from_pretrained(base, ...)` without skipit gives the LoRA alone, which runs every layer.",
)
