"""`skipit train`: gates and LoRA fine-tuned to a budget."""

import argparse
import ast
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Parser, budget, load_rows, nonnegative, nonnegative_int, positive_int

if TYPE_CHECKING:
    from skipit.theory.plan import Plan
    from skipit.train.config import TrainConfig
    from skipit.train.start import Start

ABOUT = "fine-tune gates and LoRA to a budget"
EXAMPLE = "skipit train reference reference --budget 0.5 --out runs/run"
NOTICED = 0.01  # share of held-out answer tokens: what fewer are right after training is told


def add_arguments(verb: Parser) -> None:
    """A model, rows, a plan or a profile, how training is launched, and the settings of `TrainConfig`."""
    about = _settings()
    verb.add_model_and_data()
    verb.add_out()
    verb.add_argument("--plan", type=Path, default=None, help="folder made by `skipit plan`; default: made first")
    verb.add_argument("--profile", type=Path, default=None, help="folder made by `skipit profile`, to make a plan of")
    verb.add_argument(
        "--profile-samples", type=positive_int, default=256, help="rows to measure without either (default %(default)s)"
    )
    about_run = (
        "finished run to go on from, its gates and its LoRA; with --plan without the layers that this leaves out"
    )
    verb.add_argument("--from-run", type=Path, default=None, help=about_run)
    verb.add_argument("--budget", type=budget, default=None, help=_planned(about["budget"]))
    verb.add_argument("--latency", type=budget, default=None, help=_planned(about["latency"]))
    verb.add_argument(
        "--more-budgets", type=budgets, default=None, help="further ones to train the same gates for: 0.25,0.75"
    )
    verb.add_argument("--kv", choices=("retain", "evict"), default=None, help=_planned(about["kv"]))
    verb.add_argument(
        "--samples", type=positive_int, default=None, help="rows to train on (default: one per step and row)"
    )
    verb.add_streaming()
    verb.add_argument("--calibration-data", default=None, help="held-out rows (default: another split of the data)")
    verb.add_argument("--calibration-split", default="calibration", help="of these (default %(default)s)")
    verb.add_argument("--calibration-samples", type=positive_int, default=192, help="how many (default %(default)s)")
    verb.add_flag("--resume", "continue the run in --out")
    verb.add_argument("--report-to", default="none", help="as in transformers' Trainer, such as tensorboard")
    verb.add_argument(
        "--processes", type=positive_int, default=None, help="stop unless the launcher started as many (default: any)"
    )
    _add_settings(verb, about)


def _add_settings(verb: Parser, about: Mapping[str, str]) -> None:
    """Settings of `TrainConfig` that neither the plan nor the data decide; None keeps their defaults."""
    choices = {
        "precision": ("fp32", "bf16"),
        "unit": ("block", "attention", "mlp"),
        "granularity": ("token", "sequence"),
    }
    for name, allowed in choices.items():
        verb.add_argument(f"--{name}", choices=allowed, default=None, help=about[name])
    verb.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=about["gradient_checkpointing"],
    )
    for name, kind in (
        ("deepspeed", str),
        ("steps", positive_int),
        ("accumulation", positive_int),
        ("learning-rate", nonnegative),
        ("gate-learning-rate", nonnegative),
        ("lora-rank", nonnegative_int),
        ("lora-alpha", positive_int),
        ("distillation", nonnegative),
        ("save-steps", positive_int),
        ("max-broken-rows", nonnegative_int),
    ):
        verb.add_argument(f"--{name}", type=kind, default=None, help=about[name.replace("-", "_")])


def _planned(about: str) -> str:
    return about.replace("(default ", "(default: the plan's, else ")


def _settings() -> dict[str, str]:
    """What `TrainConfig` says of each setting, with its default; from its source, since importing it imports torch."""
    package = find_spec("skipit.train")
    assert package is not None
    source = Path(str(package.origin)).with_name("config.py").read_text(encoding="utf-8")
    of = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    about = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", ast.get_docstring(of) or "", re.MULTILINE))
    told = {}
    for node in of.body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            name, default = ast.unparse(node.target), ast.literal_eval(node.value)
            default = "off" if default is False else "none" if default is None else default
            text = " ".join(about[name].replace("`", "").replace("%", "%%").rstrip(".").split())
            told[name] = f"{text} (default {default})"
    return told


def budgets(text: str) -> tuple[float, ...]:
    """Budgets between commas."""
    return tuple(budget(part) for part in text.split(","))


def run(arguments: argparse.Namespace) -> None:
    """Train, on one process or on those of a launcher, and say what share of FLOPs is executed on held-out rows."""
    from skipit.router.errors import InputError
    from skipit.router.folders import load_json
    from skipit.theory.artefact import load_plan
    from skipit.theory.calibrate import Took
    from skipit.train.card import LATENCIES
    from skipit.train.data.collate import Collator
    from skipit.train.data.rows import Broken, training_rows
    from skipit.train.data.sources import load_held_out, load_model, name_model
    from skipit.train.data.used import HeldOut
    from skipit.train.display import loading, note, on_one_process, training_progress
    from skipit.train.launch import launched
    from skipit.train.run import ANSWERED, DTYPES, train
    from skipit.train.run_folder import RUN_FILE, check_folder, claimed_run
    from skipit.train.start import start_from

    out = arguments.out
    check_folder(out, resume=arguments.resume, overwrite=arguments.overwrite)
    if arguments.from_run and arguments.profile:
        raise InputError("--from-run: a run has gates already. Leave --profile out.")
    if arguments.from_run and arguments.plan and arguments.budget is not None:
        raise InputError(
            "--from-run with --plan leaves out the plan's layers and holds its latency. Leave --budget out."
        )
    start = start_from(arguments.from_run) if arguments.from_run else None
    plan = load_plan(arguments.plan) if arguments.plan else None
    if start and plan:
        start = start.leaving_out(plan)
    planned = {"budget": plan.budget, "latency": plan.latency, "kv": plan.kv} if plan else {}
    config = _config(arguments, start.settings if start else planned)
    with (
        launched(config, out, report_to=arguments.report_to, processes=arguments.processes) as launch,
        claimed_run(out, launch.process_index == 0, resume=arguments.resume, overwrite=arguments.overwrite),
    ):
        on_one_process(launch.process_index)
        with loading("loading"):
            model, processor = load_model(arguments.model, dtype=DTYPES[config.precision])
            seen = config.steps * config.batch_size * config.accumulation * launch.world_size
            broken = Broken(config.max_broken_rows, note)
            rows = training_rows(load_rows(arguments, arguments.samples or seen), Collator(processor).checked, broken)
            held_out = load_held_out(
                arguments.calibration_data,
                arguments.data,
                arguments.calibration_split,
                arguments.calibration_samples,
                arguments.seed,
                arguments.columns,
            )
        begin: Start | Plan | None = start or plan
        if begin is None:
            begin = _plan_for_training(arguments, config, launch, model, processor, rows)
        with training_progress(config) as callback:
            train(
                model,
                processor,
                rows,
                begin,
                config,
                out,
                calibration=held_out,
                base=name_model(arguments.model),
                resume=arguments.resume,
                overwrite=arguments.overwrite,
                callbacks=[callback],
                arguments=launch,
                note=note,
            )
        if launch.process_index == 0:
            record = load_json(out / RUN_FILE)
            told = HeldOut(**record["held_out"]).sentence().capitalize()
            for point, share in record["calibrated_shares"].items():
                took = record[LATENCIES].get(point)
                took = f"takes {Took(**took).sentence()}, and " if took else ""
                print(f"{out}: trained; at {point} {took}executes {share:.1%} of the dense decoder's FLOPs. {told}.")
                if (answered := record[ANSWERED].get(point)) is not None:
                    print(f"  {_answered(**answered)}")
            print(f"Next: skipit export {out} --out DIR")


def _answered(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """What training changed on held-out rows, and what to do where that was for the worse."""
    said = (
        f"Of their answers' tokens {after['accuracy']:.1%} are right ({before['accuracy']:.1%} before training), with "
        f"a KL to the dense model of {after['kl']:.3f} ({before['kl']:.3f})."
    )
    if after["accuracy"] < before["accuracy"] - NOTICED and after["kl"] > before["kl"]:
        said += " Training made it worse: try a lower --learning-rate."
    return said


def _config(arguments: argparse.Namespace, planned: Mapping[str, Any]) -> "TrainConfig":
    """What is typed, over what the plan says, over the defaults."""
    from dataclasses import fields

    from skipit.router.errors import InputError
    from skipit.train.config import TrainConfig

    if arguments.budget is not None:
        if arguments.latency is not None:
            raise InputError("give either --budget or --latency: a share of FLOPs, or of time.")
        planned = {**planned, "latency": None, "more_budgets": ()}
    chosen = arguments.from_run and arguments.plan  # the plan chooses layers, the run's gates are for any budget
    if planned and arguments.latency not in (None, planned["latency"]) and not chosen:
        if arguments.from_run:
            raise InputError(
                f"--latency: got {arguments.latency:g}, but the run of --from-run was trained for another budget, and "
                "which layers may be left out is a plan's to say. Begin with --profile instead."
            )
        raise InputError(
            f"--latency: got {arguments.latency:g}, but the plan was made for another budget. Make one by "
            f"`skipit plan PROFILE --latency {arguments.latency:g}`, or give --profile instead of --plan."
        )
    names = {field.name for field in fields(TrainConfig)}
    typed = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    return TrainConfig.from_dict({**planned, **typed})


def _plan_for_training(
    arguments: argparse.Namespace, config: "TrainConfig", launch: Any, model: Any, processor: Any, rows: Any
) -> "Plan":
    """Gates for the run's budget: of a profile, or of one that is measured on rows to train on."""
    from itertools import islice

    from skipit.router.errors import InputError
    from skipit.theory.artefact import check_same_model, load_profile
    from skipit.theory.identity import fingerprint
    from skipit.theory.plan import make_plan
    from skipit.theory.time_model import TimeModel
    from skipit.train.data.collate import Collator, tried
    from skipit.train.data.rows import readable
    from skipit.train.display import progress
    from skipit.train.launch import stage_of
    from skipit.train.profiling import profile_model

    times = None if config.latency is None else TimeModel.of(model).times
    if arguments.profile is not None:
        profile = load_profile(arguments.profile)
        check_same_model(profile, fingerprint(model))
    elif stage_of(launch) == 3:
        raise InputError(
            "under ZeRO-3 no process has the whole model to measure. Run `skipit profile` and add --profile."
        )
    else:
        model.to(launch.device)  # where `Trainer` would bring it later
        first = rows.rows
        if hasattr(first, "select"):
            first = first.select(range(min(arguments.profile_samples, len(first))))
        first = islice(readable(first, tried(Collator(processor)), rows.broken), arguments.profile_samples)
        with progress("profile", arguments.profile_samples) as advance:
            profile = profile_model(
                model, processor, advance.over(first), batch_size=config.batch_size, seed=config.seed
            )
    return make_plan(profile, config.budget if config.latency is None else config.latency, config.kv, times=times)
