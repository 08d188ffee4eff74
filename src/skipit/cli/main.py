"""The `skipit` command: one verb per arrow of the data flow, each thin over one public function.

Heavy imports happen inside the verbs, so `skipit --help` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import Verb, parse

# What the folders that skipit makes hold; `--overwrite` replaces nothing else.
MADE = (
    "profile.json",
    "backbone.json",
    "plan.json",
    "train_config.json",
    "run.json",
    "router_config.json",
    "eval.json",
    "summary.json",
    "probes.json",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 1 refused with a reason, 2 wrong arguments, 130 interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        # The launcher of DeepSpeed puts this in front; the environment says it too.
        arguments = parse([argument for argument in given if not argument.startswith("--local_rank=")], RUNS)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    status = _run(arguments)
    if arguments.verb == "train":
        from skipit.train.launch import end_process

        end_process(status)
    return status


def _run(arguments: argparse.Namespace) -> int:
    try:
        from skipit.router.errors import SkipItError
        from skipit.train.display import quiet

        try:
            with quiet():
                arguments.run(arguments)
        except SkipItError as error:
            print(f"skipit: {error}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        if arguments.verb == "train" or (arguments.verb == "profile" and _partial(arguments.out).is_dir()):
            print("skipit: interrupted. The same command with --resume goes on from the last save.", file=sys.stderr)
        else:
            print("skipit: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _check_out(arguments: argparse.Namespace) -> None:
    """Refuse an output folder before hours of work, not after them."""
    from skipit.router.folders import check_out

    check_out(arguments.out, arguments.overwrite, MADE)


def _profile(arguments: argparse.Namespace) -> None:
    from skipit.theory.artefact import save_profile
    from skipit.theory.partial import Partial
    from skipit.train.data.sources import load_model, name_data
    from skipit.train.display import loading, note, progress
    from skipit.train.profiling import profile_model

    _check_out(arguments)
    if arguments.part != "decoder":
        _profile_part(arguments)
        return
    same = ("split", "samples", "batch_size", "streaming", "shuffle_buffer", "layers")
    partial = Partial(
        _partial(arguments.out),
        every=arguments.save_every,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        of={"data": name_data(arguments.data), **{name: getattr(arguments, name) for name in same}},
    )
    with loading("loading"):
        model, processor = load_model(arguments.model)
        rows, count = _rows(arguments)
    with progress("profile", count) as advance:
        result = profile_model(
            model,
            processor,
            advance.over(rows),
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            draws=arguments.draws,
            layers=arguments.layers,
            partial=partial,
        )
    save_profile(result, arguments.out, arguments.overwrite)
    partial.remove()
    if bad := result.about["skipped_row_numbers"]:
        more = f" and {result.about['skipped_rows'] - 10} more" if result.about["skipped_rows"] > 10 else ""
        note(f"left out, their states are not finite: row {', '.join(map(str, bad[:10]))}{more}")
    print(f"{arguments.out}: {result.about['rows']} rows measured, {result.about['skipped_rows']} not finite.")
    print(f"Next: skipit plan {arguments.out} --out DIR")


def _profile_part(arguments: argparse.Namespace) -> None:
    from skipit.router.errors import InputError
    from skipit.theory.artefact import save_backbone
    from skipit.train.display import loading, progress
    from skipit.train.profiling import load_part, part_table, profile_part

    if arguments.resume:
        raise InputError(f"--part {arguments.part} takes one forward pass and keeps nothing to --resume. Start anew.")
    with loading("loading"):
        model, read = load_part(arguments.model, arguments.part)
        rows, count = _rows(arguments)
    with progress("profile", count) as advance:
        found = profile_part(model, read, advance.over(rows), batch_size=arguments.batch_size, layers=arguments.layers)
    save_backbone(found, arguments.out, arguments.overwrite)
    print(part_table(found))
    print(f"{arguments.out}: {found.layers} of {found.rows} {'images' if found.modality == 'vision' else 'texts'}.")


def _rows(arguments: argparse.Namespace) -> tuple[Any, int]:
    """Rows to profile, and how many at most: a stream does not know its length."""
    from skipit.train.data.sources import load_data

    rows = load_data(
        arguments.data,
        arguments.split,
        arguments.samples,
        arguments.seed,
        streaming=arguments.streaming,
        shuffle_buffer=arguments.shuffle_buffer,
        columns=arguments.columns,
    )
    return rows, arguments.samples if arguments.streaming else len(rows)


def _partial(out: Path) -> Path:
    return out.parent / f"{out.name}.partial"


def _plan(arguments: argparse.Namespace) -> None:
    from skipit.theory.artefact import load_profile, save_plan
    from skipit.theory.plan import make_plan

    _check_out(arguments)
    if _of_mode(arguments):
        _plan_mode(arguments)
        return
    plan = make_plan(load_profile(arguments.profile), arguments.budget, arguments.kv, arguments.init)
    save_plan(plan, arguments.out, arguments.overwrite)
    text, vision = plan.run_rate.mean(0).tolist()
    print(
        f"{arguments.out}: {arguments.init} gates for {arguments.budget:.0%} of the FLOPs; "
        f"expected to run {text:.0%} of text and {vision:.0%} of vision token-layers."
    )
    print(f"Next: skipit train MODEL DATA --plan {arguments.out} --out DIR")


def _of_mode(arguments: argparse.Namespace) -> bool:
    from skipit.router.errors import InputError

    rules = {"--max-damage": arguments.max_damage, "--eps": arguments.eps, "--nu": arguments.nu}
    given = [name for name, value in rules.items() if value is not None]
    if given and arguments.mode is None:
        raise InputError(f"{given[0]} chooses the layers of a --mode: late-entry, early-exit or both.")
    return arguments.mode is not None


def _plan_mode(arguments: argparse.Namespace) -> None:
    from skipit.theory.artefact import load_profile, save_plan
    from skipit.theory.modes import choose_span, span_plan

    measured, mode, kv = load_profile(arguments.profile), arguments.mode, arguments.kv
    span = choose_span(
        measured,
        mode,
        kv,
        budget=arguments.budget,
        limit=arguments.max_damage,
        eps=arguments.eps,
        nu=arguments.nu,
    )
    save_plan(span_plan(measured, span, mode, kv), arguments.out, arguments.overwrite)
    layers = f"layers {span.entry} to {span.exit - 1}" if span.exit > span.entry else "none"
    print(
        f"{arguments.out}: of {len(span.run)} layers vision tokens run {layers}, about {span.compute:.1%} of the "
        f"FLOPs; predicted damage {span.damage:.4f} nats per answer token."
    )
    print(f"Next: skipit export {arguments.out} --model MODEL --out DIR")


def _inspect(arguments: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from skipit.eval.measure.inspection import inspect_model, inspection_table

    found = inspect_model(arguments.model, arguments.layers)
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        # A file or a pipe has no width; a line of a table is not broken there.
        width = None if sys.stdout.isatty() else 160
        Console(highlight=False, markup=False, width=width).print(inspection_table(found))


def _theory(arguments: argparse.Namespace) -> None:
    from skipit.router.errors import InputError
    from skipit.theory.artefact import check_same_model, load_profile
    from skipit.theory.identity import fingerprint
    from skipit.theory.tightness import from_model, from_profile, show
    from skipit.train.data.collate import Collator, batches
    from skipit.train.data.sources import load_data, load_model
    from skipit.train.display import progress

    measured = load_profile(arguments.profile)
    found = from_profile(measured)
    if (arguments.model is None) != (arguments.data is None):
        raise InputError("--model and --data go together: the model's tensors are measured on the data's rows.")
    if arguments.model is not None:
        model, processor = load_model(arguments.model)
        check_same_model(measured, fingerprint(model))
        rows = load_data(arguments.data, arguments.split, arguments.samples, arguments.seed)
        with progress("theory", len(rows)) as advance:
            read = batches(advance.over(rows), Collator(processor), arguments.batch_size)
            found += from_model(model, read, seed=arguments.seed)
    show(sorted(found, key=lambda line: line.statement))
    print("1 is exact, above 1 would be false. Statement 12 is about counted errors: `skipit calibrate --risk`.")


def _probe(arguments: argparse.Namespace) -> None:
    from skipit.theory.artefact import save_probes
    from skipit.theory.pooling import pool_states
    from skipit.theory.probes import probe_states
    from skipit.train.data.collate import Collator, batches
    from skipit.train.data.sources import load_data, load_model
    from skipit.train.display import loading, progress

    from .probing import probe_table

    _check_out(arguments)
    with loading("loading"):
        model, processor = load_model(arguments.model)
        rows = load_data(arguments.data, arguments.split, arguments.samples, arguments.seed, columns=arguments.columns)
    with progress("probe", len(rows)) as advance:
        pooled = pool_states(model, batches(advance.over(rows), Collator(processor), arguments.batch_size))
    with loading("fitting probes"):
        found = probe_states(pooled, penalty=arguments.penalty, splits=arguments.splits, seed=arguments.seed)
    save_probes(found, arguments.out, arguments.overwrite)
    print(probe_table(found))
    print(f"{arguments.out}: probes.json")


def _train(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from skipit.router.folders import load_json
    from skipit.theory.artefact import load_plan
    from skipit.train.config import TrainConfig
    from skipit.train.data.sources import load_data, load_held_out, load_model, name_model
    from skipit.train.display import loading, note, on_one_process, training_progress
    from skipit.train.launch import launched
    from skipit.train.run import DTYPES, train
    from skipit.train.run_folder import RUN_FILE, check_folder

    out = arguments.out
    check_folder(out, resume=arguments.resume, overwrite=arguments.overwrite)
    plan = load_plan(arguments.plan) if arguments.plan else None
    names = {f.name for f in fields(TrainConfig)}
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    config = TrainConfig.from_dict({**({"budget": plan.budget, "kv": plan.kv} if plan else {}), **given})
    with launched(config, out, report_to=arguments.report_to, processes=arguments.processes) as launch:
        on_one_process(launch.process_index)
        with loading("loading"):
            model, processor = load_model(arguments.model, dtype=DTYPES[config.precision])
            samples = arguments.samples or config.steps * config.batch_size * config.accumulation * launch.world_size
            rows = load_data(
                arguments.data,
                arguments.split,
                samples,
                arguments.seed,
                streaming=arguments.streaming,
                shuffle_buffer=arguments.shuffle_buffer,
                columns=arguments.columns,
            )
            held_out = load_held_out(
                arguments.calibration_data,
                arguments.data,
                arguments.calibration_split,
                arguments.calibration_samples,
                arguments.seed,
                arguments.columns,
            )
        if plan is None:
            plan = _plan_for_training(arguments, config, launch, model, processor, rows)
        with training_progress(config) as callback:
            train(
                model,
                processor,
                rows,
                plan,
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
            for budget, share in load_json(out / RUN_FILE)["calibrated_shares"].items():
                print(
                    f"{out}: trained; executes {share:.1%} of the dense decoder's FLOPs on held-out rows at {budget}."
                )
            print(f"Next: skipit export {out} --out DIR")


def _plan_for_training(
    arguments: argparse.Namespace, config: Any, launch: Any, model: Any, processor: Any, rows: Any
) -> Any:
    """Gates for the run's budget: of a profile, or of one that is measured on rows to train on."""
    from itertools import islice

    from skipit.router.errors import InputError
    from skipit.theory.artefact import check_same_model, load_profile
    from skipit.theory.identity import fingerprint
    from skipit.theory.plan import make_plan
    from skipit.train.display import progress
    from skipit.train.launch import stage_of
    from skipit.train.profiling import profile_model

    if arguments.profile is not None:
        measured = load_profile(arguments.profile)
        check_same_model(measured, fingerprint(model))
    elif stage_of(launch) == 3:
        raise InputError(
            "under ZeRO-3 no process has the whole model to measure. Run `skipit profile` and add --profile."
        )
    else:
        with progress("profile", arguments.profile_samples) as advance:
            some = advance.over(islice(rows, arguments.profile_samples))
            measured = profile_model(model, processor, some, batch_size=config.batch_size, seed=config.seed)
    return make_plan(measured, config.budget, config.kv)


def _export(arguments: argparse.Namespace) -> None:
    from skipit.router.errors import InputError
    from skipit.train.display import loading
    from skipit.train.export import export, export_again, export_plan, is_checkpoint
    from skipit.train.hub import check_repository, push

    _check_out(arguments)
    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)
    source, out, overwrite = arguments.source, arguments.out, arguments.overwrite
    again = is_checkpoint(source)
    if again and (arguments.adapter or arguments.model is not None):
        raise InputError(f"{source} is a checkpoint already: leave out --adapter and --model, which make one.")
    if arguments.eval is not None and not again:
        raise InputError("--eval is of a checkpoint: skipit export CHECKPOINT --eval DIR --out COPY.")
    if arguments.adapter and arguments.model is not None:
        raise InputError("--adapter is of a run: a plan has no LoRA. Leave out --model or --adapter.")
    if arguments.model is None and (source / "plan.json").is_file():
        raise InputError(f"{source} is a plan, which has no weights: name its model, --model MODEL.")
    made = "gated checkpoint"
    with loading("exporting"):
        if again:
            export_again(source, out, arguments.eval, overwrite=overwrite)
            made = (
                "a copy"
                if arguments.eval is None
                else f"a copy, with the figures of {arguments.eval} in its model card"
            )
        elif arguments.adapter:
            from skipit.train.adapter import export_adapter

            size = export_adapter(source, out, overwrite=overwrite)
            made = f"adapter checkpoint, {size / 1e6:.2f} MB. It needs its base: skipit.load(DIR, base=...)"
        elif arguments.model is not None:
            export_plan(source, arguments.model, out, overwrite=overwrite)
        else:
            export(source, out, overwrite=overwrite)
    print(f"{out}: {made}.")
    if arguments.push_to_hub is not None:
        print(f"Uploaded to {push(out, arguments.push_to_hub)}")
    elif not arguments.adapter and not again:
        print(f"Next: skipit generate {out} --image FILE --prompt TEXT")


def _calibrate(arguments: argparse.Namespace) -> None:
    from skipit.eval.operating_points import budget_checkpoint, certify_checkpoint, check_name
    from skipit.router.errors import InputError
    from skipit.theory.risk import SKIPPED_SHARES
    from skipit.train.data.sources import load_data
    from skipit.train.display import loading, progress

    if (arguments.budget is None) == (arguments.risk is None):
        raise InputError("give either --budget or --risk: an operating point spends a budget or has a certified risk.")
    folder = arguments.checkpoint
    check_name(folder, arguments.name if arguments.budget is None else f"{arguments.budget:g}", arguments.overwrite)
    rows = load_data(arguments.data, arguments.split, arguments.samples, arguments.seed)
    common = {"batch_size": arguments.batch_size, "overwrite": arguments.overwrite}
    if arguments.budget is not None:
        with loading("calibrating"):
            share = budget_checkpoint(folder, rows, arguments.budget, **common)
        print(f"{folder}: --budget {arguments.budget:g} executes {share:.1%} of the dense decoder's FLOPs.")
        return
    # At most: testing stops after the first threshold that fails.
    with progress("certify", (1 + len(SKIPPED_SHARES)) * len(rows)) as advance:
        found = certify_checkpoint(
            folder,
            rows,
            arguments.risk,
            arguments.confidence,
            name=arguments.name,
            seed=arguments.seed,
            max_new_tokens=arguments.max_new_tokens,
            progress=advance,
            **common,
        )
    print(f"{folder}: {found.summary()}")
    print(f"Next: skipit generate {folder} --budget {arguments.name} --image FILE --prompt TEXT")


def _generate(arguments: argparse.Namespace) -> None:
    from skipit.eval.measure.answer import answer, open_images
    from skipit.router.errors import InputError
    from skipit.train.adapter import load
    from skipit.train.display import loading

    if arguments.dense and (arguments.depth_map or arguments.budget):
        raise InputError("a dense run executes every layer for every token: leave out --depth-map and --budget.")
    images = open_images(arguments.image)
    with loading("loading"):
        model, processor = load(arguments.checkpoint, arguments.base)
    reply = answer(
        model,
        processor,
        images,
        arguments.prompt,
        budget=arguments.budget,
        dense=arguments.dense,
        max_new_tokens=arguments.max_new_tokens,
    )
    print(reply.text)
    if reply.compute is not None:
        print(f"({reply.compute:.1%} of the dense decoder's FLOPs)", file=sys.stderr)
    if arguments.depth_map is not None:
        reply.draw(arguments.depth_map)
        print(f"depth map: {arguments.depth_map}", file=sys.stderr)


def _eval(arguments: argparse.Namespace) -> None:
    from skipit.eval.evaluate import REPORT, Request, evaluate
    from skipit.train.card import EVALUATION

    _check_out(arguments)
    asked = {name: getattr(arguments, name) for name in Request.__dataclass_fields__}
    result = evaluate(Request(**{**asked, "also": tuple(asked["also"] or ())}), arguments.out, arguments.overwrite)
    print(result.table())
    print(f"{arguments.out}: {REPORT}, {EVALUATION}")


def _demo(arguments: argparse.Namespace) -> None:
    from skipit.demo import demo

    _check_out(arguments)
    demo(
        arguments.out,
        budget=arguments.budget,
        kv=arguments.kv,
        steps=arguments.steps,
        samples=arguments.samples,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )


RUNS: dict[str, Verb] = {
    "inspect": _inspect,
    "profile": _profile,
    "plan": _plan,
    "theory": _theory,
    "probe": _probe,
    "train": _train,
    "export": _export,
    "calibrate": _calibrate,
    "generate": _generate,
    "eval": _eval,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
