"""`skipit plan`: a profile turned into gates."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import BUDGET, KV, LATENCY, Parser, budget, chosen, nonnegative, nonnegative_int
from .units import picture, show

if TYPE_CHECKING:
    from skipit.theory.plan import Plan

ABOUT = "turn a profile into gates"
EXAMPLE = "skipit plan runs/profile --budget 0.5 --out runs/plan"
RUNS = "tokens that run\nshare, as expected"


def add_arguments(verb: Parser) -> None:
    """A profile, and which gates to make of it."""
    verb.add_argument("profile", type=Path, help="folder made by `skipit profile`")
    verb.add_out()
    verb.add_argument("--budget", type=budget, default=0.5, help=f"{BUDGET} (default %(default)s)")
    verb.add_argument("--latency", type=budget, default=None, help=LATENCY)
    verb.add_argument(
        "--answer-tokens",
        type=nonnegative_int,
        default=0,
        help="--latency is of the time for a prompt and so many tokens decoded after it (default: a prompt alone)",
    )
    verb.add_argument("--kv", choices=("retain", "evict"), default="retain", help=KV)
    verb.add_argument(
        "--init", choices=("theory", "theory-bias", "zero", "run"), default="theory", help="how gates are made"
    )
    verb.add_argument(
        "--mode",
        choices=("late-entry", "early-exit", "both"),
        default=None,
        help="constant gates instead: vision tokens skip the first layers, the last, or both; by budget, or by a rule:",
    )
    verb.add_argument(
        "--max-damage", type=nonnegative, default=None, help="skip layers that do at most this, KL in nats"
    )
    verb.add_argument(
        "--eps", type=nonnegative, default=None, help="skip layers that turn vision by 1 - cos at most this"
    )
    verb.add_argument(
        "--nu", type=nonnegative, default=None, help="... where at most this share of attention is on vision"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write a plan and say what its gates are expected to run."""
    from skipit.router.errors import InputError

    rules = {"--max-damage": arguments.max_damage, "--eps": arguments.eps, "--nu": arguments.nu}
    rule = next((name for name, value in rules.items() if value is not None), None)
    if arguments.latency is not None and (arguments.mode is not None or arguments.init in ("zero", "run")):
        raise InputError("--latency is for gates made from the profile: leave out --mode, and --init zero or run.")
    if arguments.answer_tokens and arguments.latency is None:
        raise InputError("--answer-tokens says of what --latency is a share: give --latency, too.")
    if arguments.mode is not None:
        _plan_span(arguments)
    elif rule is not None:
        raise InputError(f"{rule} chooses the layers of a --mode: late-entry, early-exit or both.")
    else:
        _plan_gates(arguments)


def _plan_gates(arguments: argparse.Namespace) -> None:
    from skipit.theory.artefact import load_profile, save_plan
    from skipit.theory.layer_times import times_for
    from skipit.theory.plan import check_reachable, make_plan

    profile = load_profile(arguments.profile)
    if arguments.latency is None:
        check_reachable([arguments.budget], profile.least(arguments.kv), arguments.kv, "block")
        plan = make_plan(profile, arguments.budget, arguments.kv, arguments.init)
    else:
        times = times_for(profile.costs, profile.width)
        given: dict[str, Any] = {"times": times, "answer_tokens": arguments.answer_tokens}
        plan = make_plan(profile, arguments.latency, arguments.kv, arguments.init, **given)
    save_plan(plan, arguments.out, arguments.overwrite, picture({RUNS: plan.run_rate}, shares=True))
    print(show(arguments.out, {RUNS: plan.run_rate}, shares=True))
    text, vision = plan.run_rate.mean(0).tolist()
    print(
        f"{arguments.out}: {arguments.init} gates for {plan.budget:.0%} of the FLOPs; "
        f"expected to run {text:.0%} of text and {vision:.0%} of vision token-layers."
    )
    if arguments.latency is not None:
        _say_times(plan)
    print(f"Next: skipit train MODEL DATA --plan {arguments.out} --out DIR")


def _say_times(plan: "Plan") -> None:
    """What a plan for a latency is expected to take, and which layers it leaves out."""
    out, with_answer = plan.left_out, ""
    if answer := plan.about.get("answer"):
        with_answer = f", and {answer['expected_latency']:.0%} for it and {answer['tokens']} tokens after it"
    print(
        f"On this machine ({plan.about['measured_on']}) that is expected to take "
        f"{plan.about['expected_latency']:.0%} of the dense layers' time for a prompt{with_answer}.\n"
        f"Left out for all tokens: {'layers ' + ', '.join(map(str, out)) if out else 'no layer'}."
    )


def _plan_span(arguments: argparse.Namespace) -> None:
    """Constant gates, by which vision tokens run one span of layers."""
    from skipit.theory.artefact import load_profile, save_plan
    from skipit.theory.modes import choose_span, span_plan

    profile, mode, kv = load_profile(arguments.profile), arguments.mode, arguments.kv
    span = choose_span(profile, mode, kv, limit=arguments.max_damage, **chosen(arguments, "budget", "eps", "nu"))
    plan = span_plan(profile, span, mode, kv)
    save_plan(plan, arguments.out, arguments.overwrite, picture({RUNS: plan.run_rate}, shares=True))
    print(show(arguments.out, {RUNS: plan.run_rate}, shares=True))
    layers = f"layers {span.entry} to {span.exit - 1}" if span.exit > span.entry else "none"
    print(
        f"{arguments.out}: of {len(span.run)} layers vision tokens run {layers}, about {span.compute:.1%} of the "
        f"FLOPs; predicted damage {span.damage:.4f} nats per answer token."
    )
    print(f"Next: skipit export {arguments.out} --model MODEL --out DIR")
