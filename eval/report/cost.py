"""What skipping costs and what it saves: accuracy row by row against the untouched model, FLOPs, and milliseconds."""

from collections.abc import Mapping
from typing import Any

from skipit.eval.statistics import LEVEL, beyond_chance

from .page import Html, joined, paragraph, strong, table
from .part import NOTHING, Part, Values, between, number, p_value, percent, plural, points

PHASES = (("prefill", "prefill (image and prompt)"), ("decode", "decoding, one token"))


def cost(values: Values) -> Part:
    """Accuracy, agreement and executed FLOPs of the checkpoint and of every further router."""
    dense, gated, settings = values["dense"], values["gated"], values["settings"]
    differences = gated["difference"]
    kinds = list(dense["by_kind"]) if len(dense["by_kind"]) > 1 else []
    rows = [["accuracy", percent(dense["accuracy"]), percent(gated["accuracy"]), *_difference(differences["all"])]]
    rows += [
        [
            f"\N{EM SPACE}{kind}",
            percent(dense["by_kind"][kind]),
            percent(gated["by_kind"][kind]),
            *_difference(differences["kinds"][kind]),
        ]
        for kind in kinds
    ]
    same = percent(gated["same_answer"])
    rows.append([f"same answer as {values['settings']['dense']}", percent(1.0), same, NOTHING, NOTHING, NOTHING])
    body = [
        table(
            f"{plural(dense['rows'], 'row')} of {settings['data']}, split {settings['split']}",
            ["", settings["dense"], "checkpoint", "difference, points [95%]", "p", "rows lost, gained"],
            rows,
        ),
        paragraph(
            "The same rows for both, answered greedily. The interval is Agresti and Min's for paired rows, p is "
            "McNemar's exact test: rows lost were right without skipping and are wrong with it.",
            class_="soft",
        ),
    ]
    if calibration := values.get("calibration"):
        body += _calibration(calibration)
    if values.get("also"):
        body.append(_also(values))
    return Part("cost", "What it costs", [_cost_verdict(values)], body, ("eval", "checkpoint"))


def saving(values: Values) -> Part:
    """FLOPs executed, and milliseconds in the same interleaved run."""
    dense, gated = values["dense"]["latency"], values["gated"]["latency"]
    compute, compiled = values["gated"]["compute"], values["dense"].get("compiled")
    rows = [["decoder FLOPs executed", percent(1.0), percent(compute), f"{percent(1 - compute)} saved", NOTHING]]
    for phase, title in PHASES:
        estimate = _speed_up(gated, phase)
        rows.append(
            [
                f"{title}, ms",
                number(dense[f"{phase}_ms"]),
                number(gated[f"{phase}_ms"]),
                _times(estimate),
                _faster(estimate)[0],
            ]
        )
        if isinstance(compiled, Mapping):
            ratio = _over_compiled(gated, compiled, phase)
            what = "\N{EM SPACE}against it compiled"
            rows.append([what, number(compiled[f"{phase}_ms"]), NOTHING, f"{ratio:.2f}x", NOTHING])
    told = table(
        "What was executed, and how long it took",
        ["", values["settings"]["dense"], "checkpoint", "speed-up [95%]", ""],
        rows,
    )
    note = paragraph(
        f"Milliseconds: medians of {gated['repeats']} repeats on one row, batch 1, the two models in turn in one "
        "run; the model compared with is transformers' own, without gates. Speed-up: median of its time over the "
        "checkpoint's, pair by pair, with the distribution-free interval of a median. FLOPs: counted on the shapes "
        "that really ran, prompt and answer, gates included." + _not_compiled(compiled),
        class_="soft",
    )
    return Part("saving", "What it saves", [_saving_verdict(values)], [told, note], ("eval", "checkpoint"))


def _not_compiled(compiled: Any) -> str:
    """Why there is no compiled model to compare with."""
    if isinstance(compiled, Mapping):
        return ""
    return f" It was not compiled{f': {compiled}' if compiled else ''}; compiled it may be faster."


def _difference(difference: Mapping[str, Any]) -> list[str]:
    return [between(difference, "+.1f", 100), p_value(difference["p"]), f"{difference['lost']}, {difference['gained']}"]


def _dense(values: Values) -> str:
    return "the untouched model" if values["settings"]["dense"] == "untouched" else "the model without gates"


def _cost_verdict(values: Values) -> Html:
    dense, gated, settings = values["dense"], values["gated"], values["settings"]
    difference = gated["difference"]["all"]
    if difference["p"] >= LEVEL:
        words = strong("no difference that these rows can show")
        more = f"; a loss of more than {number(max(0.0, -100 * difference['low']), '.1f')} points is unlikely"
    elif difference["value"] < 0:
        words, more = strong("it costs accuracy", "bad"), ""
    else:
        words, more = strong("it is more accurate", "good"), ", which fine-tuning can do and skipping cannot"
    parts: list[Html | str] = [
        f"On {plural(dense['rows'], 'row')} of {settings['data']} ({settings['split']}) the checkpoint is right in "
        f"{percent(gated['accuracy'])}, {_dense(values)} in {percent(dense['accuracy'])}: "
        f"{between(difference, '+.1f', 100)} points, ",
        words,
        f" (p = {p_value(difference['p'])}){more}. {percent(gated['same_answer'])} of the answers are the same.",
    ]
    kinds = gated["difference"]["kinds"]
    clear = beyond_chance({kind: of["p"] for kind, of in kinds.items()}) if len(kinds) > 1 else []
    if lost := [kind for kind in clear if kinds[kind]["value"] < 0]:
        told = (f"{kind} ({points(kinds[kind]['value'])} points, p = {p_value(kinds[kind]['p'])})" for kind in lost)
        parts.append(f" Of {len(kinds)} kinds of question, a loss is shown on {', '.join(told)}.")
    if calibration := values.get("calibration"):
        parts += [" ", _calibration_words(calibration)]
    return joined(parts)


def _saving_verdict(values: Values) -> Html:
    gated = values["gated"]
    dense, compute = values["dense"]["latency"], gated["compute"]
    parts: list[Html | str] = [f"It executes {percent(compute)} of the decoder's FLOPs. "]
    words = []
    for phase, title in (("prefill", "Prefill"), ("decode", "a decoding step")):
        estimate = _speed_up(gated["latency"], phase)
        word, mood = _faster(estimate)
        words.append(word)
        times = f"{number(gated['latency'][f'{phase}_ms'])} ms instead of {number(dense[f'{phase}_ms'])}"
        parts += [f"{title} takes {times}: ", strong(word, mood), f" ({_times(estimate)})"]
        parts.append(", " if phase == "prefill" else ".")
    if isinstance(compiled := values["dense"].get("compiled"), Mapping):
        times = " and ".join(f"{number(compiled[f'{phase}_ms'])} ms" for phase, _ in PHASES)
        ratios = " and ".join(f"{_over_compiled(gated['latency'], compiled, phase):.2f}x" for phase, _ in PHASES)
        parts.append(f" Compiled by torch.compile, {_dense(values)} takes {times}: against that it is {ratios}.")
    if compute < 1 and "faster" not in words:
        parts.append(
            " FLOPs that are saved are not milliseconds here: on this hardware, at this size, what gates and packing "
            "cost is more than what skipping saves."
            if "slower" in words
            else " The FLOPs that are saved do not show as milliseconds here."
        )
    return joined(parts)


def _speed_up(latency: Mapping[str, Any], phase: str) -> dict[str, Any]:
    low, high = latency.get(f"{phase}_interval") or (None, None)
    return {"value": latency[f"{phase}_speed_up"], "low": low, "high": high}


def _over_compiled(latency: Mapping[str, Any], compiled: Mapping[str, Any], phase: str) -> float:
    """A model's speed-up over the dense one compiled: of two medians of ratios to the same runs."""
    return float(latency[f"{phase}_speed_up"] / compiled[f"{phase}_speed_up"])


def _times(estimate: Mapping[str, Any]) -> str:
    value, _, interval = between(estimate, ".2f").partition(" ")
    return f"{value}x {interval}".rstrip()


def _faster(estimate: Mapping[str, Any]) -> tuple[str, str]:
    """The word for a speed-up, and its mood."""
    if estimate["low"] is None:
        return "too few repeats to tell", ""
    if estimate["low"] > 1:
        return "faster", "good"
    if estimate["high"] < 1:
        return "slower", "bad"
    return "no difference in time shown", ""


def _calibration(calibration: Values) -> list[Html]:
    rows = []
    for label, key in (("expected calibration error", "error"), ("Brier score", "brier")):
        sides = [between(calibration[side][key], ".3f") for side in ("dense", "gated")]
        rows.append([label, *sides, between(calibration[f"{key}_change"], "+.3f")])
    rows.insert(
        0,
        ["mean confidence", *(between(calibration[side]["confidence"], ".3f") for side in ("dense", "gated")), NOTHING],
    )
    return [
        table(
            "Does it know when it is wrong? Confidence of whole answers against how often they are right",
            ["", "dense [95%]", "checkpoint [95%]", "change [95%]"],
            rows,
        )
    ]


def _calibration_words(calibration: Values) -> Html:
    words = {"worse": ("worse calibrated", "bad"), "better": ("better calibrated", "good")}.get(calibration["verdict"])
    change = f"the expected calibration error changes by {between(calibration['error_change'], '+.3f')}"
    if by_chance := calibration.get("by_chance"):
        low, high = (number(end, "+.3f") for end in by_chance)
        change += f"; models that are right as often as they say would differ by {low} to {high}"
    change += "."
    if words is None:
        return joined(["No change of its calibration is shown: ", change])
    return joined(["It is ", strong(*words), f": {change}"])


def _also(values: Values) -> Html:
    rows = [
        ["this checkpoint", values["settings"].get("init") or NOTHING, *_figures(values["gated"])],
        *([router["name"], router.get("init") or NOTHING, *_figures(router)] for router in values["also"]),
    ]
    return table(
        "Further routers, on the same rows",
        ["", "gates began as", "accuracy", "difference, points [95%]", "same answer", "FLOPs"],
        rows,
    )


def _figures(router: Mapping[str, Any]) -> list[str]:
    difference = between(router["difference"]["all"], "+.1f", 100)
    return [percent(router["accuracy"]), difference, percent(router["same_answer"]), percent(router["compute"])]
