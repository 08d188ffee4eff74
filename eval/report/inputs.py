"""What a router does with single inputs: does it spend more on hard ones, how deep is each patch and word computed?"""

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from PIL.Image import Image

from skipit.eval.plots import draw_depth_map, draw_intervals
from skipit.eval.statistics import beyond_chance

from .page import Content, Html, figure, heading, joined, paragraph, strong, table
from .part import Missing, Part, Values, again, between, label, number, p_value, percent, plural, points

LONGEST_TITLE = 70


def adaptivity(values: Values) -> Part | Missing:
    """Compute by group of rows, difficulty and kind of token, against the router's own decisions shuffled."""
    title = "Does it spend more on hard inputs?"
    if "adaptivity" not in values:
        return Missing(title, again(values, "--controlled-samples 48"))
    spending = values["adaptivity"]
    contrasts = [
        (f"{factor}: {level}", c) for factor, levels in spending["groups"].items() for level, c in levels.items()
    ]
    contrasts += [(f"token: {name}", c) for name, c in spending["tokens"].items()]
    shown = [(name, c) for name, c in contrasts if c["difference"] is not None]
    body = [
        paragraph(
            f"{plural(spending['rows'], 'row')}, {percent(spending['share'])} of the dense FLOPs. Excess: what was "
            "executed minus what the same tokens would cost if each layer ran at its average rate for their kind, "
            "in points of a hundred of the dense FLOPs. A router that decides nothing by its input has none. "
            "Shuffled: the same router with its decisions shuffled over tokens and rows."
        )
    ]
    if spending["tokens"]:
        body.append(
            paragraph(
                "Kinds of token in the image are known only to a model whose image tokens see the question. In a "
                "causal decoder that reads the image first they cannot: a difference there is chance, or what the "
                "patches show.",
                class_="soft",
            )
        )
    if shown:
        bars = [(label(name), "excess", *(100 * c[k] for k in ("difference", "low", "high"))) for name, c in shown]
        drawn = draw_intervals(bars, "what is given beyond the rest", "points of the dense FLOPs", 0.0)
        body.append(
            figure(drawn, "Excess compute by group of rows and kind of token", "Right of the line: given more.")
        )
    rows = [
        [
            name,
            str(c["rows"]),
            percent(c["share"]),
            percent(c["rest"]),
            between(_as(c), "+.2f", 100),
            p_value(c["p"]),
            points(c["control"], 2),
        ]
        for name, c in contrasts
    ]
    head = ["", "rows", "FLOPs", "of the rest", "excess, points [95%]", "p", "shuffled"]
    body.append(table("Groups of rows and kinds of token against the rest", head, rows))
    links = [(name, a) for name, a in spending["difficulty"].items()]
    # Kinds of question differ in difficulty: are harder rows of one kind given more?
    links += [
        (f"{name}, within kinds of question", by["question"])
        for name, by in spending["within"].items()
        if "question" in by
    ]
    if links:
        rows = [[name, str(a["rows"]), between(a), p_value(a["p"]), number(a["control"], "+.2f")] for name, a in links]
        head = ["difficulty", "rows", "Spearman [95%]", "p", "shuffled"]
        body.append(
            table("Rank correlation of a row's excess with its difficulty; above 0: harder rows get more", head, rows)
        )
    return Part("adaptivity", title, [_verdict(spending, shown)], body, ("eval", "checkpoint"))


def _as(contrast: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": contrast["difference"], "low": contrast["low"], "high": contrast["high"]}


def _verdict(spending: Mapping[str, Any], shown: Sequence[tuple[str, Mapping[str, Any]]]) -> Html:
    parts: list[Content] = []
    hard = [(name, a) for name, a in spending["difficulty"].items() if a["value"] is not None]
    if hard:
        clear = beyond_chance({name: a["p"] for name, a in hard})
        more, less = ([name for name, a in hard if name in clear and sign * a["value"] > 0] for sign in (1, -1))
        word, mood = ("more compute for hard rows is not shown", "")
        if more and not less:
            word, mood = "it spends more on harder rows", "good"
        elif less and not more:
            word, mood = "it spends less on harder rows", "bad"
        elif more:
            word, mood = "mixed: more on rows that are hard by one measure, less by another", ""
        told = "; ".join(f"{name} {between(a)}, p {p_value(a['p'])}" for name, a in hard)
        parts += [strong(word[:1].upper() + word[1:], mood), f" (rank correlation of a row's excess with {told}). "]
    found = dict(shown)
    if groups := beyond_chance({name: c["p"] for name, c in shown}):
        groups.sort(key=lambda name: -abs(found[name]["difference"]))
        listed = "; ".join(f"{name} {between(_as(found[name]), '+.2f', 100)} points" for name in groups[:3])
        parts.append(f"Clearest differences between groups, of {len(shown)} looked at: {listed}.")
    elif shown:
        parts.append(
            f"None of {len(shown)} groups of rows or kinds of token is given clearly more or less than the rest."
        )
    return joined(parts) if parts else joined(["Too few rows to say anything about single inputs."])


def depth_maps(values: Values, pictures: Sequence[Image]) -> Part | Missing:
    """How deep each patch and word of a few rows was computed.

    Args:
        values: with `examples`, in the order of the pictures.
        pictures: the images that were asked about.
    """
    title, examples = "How deep each patch and word is computed", values.get("examples") or []
    if not examples:
        return Missing(title, values.get("no_examples") or "no example was measured.")
    body: list[Html] = []
    for example, picture in zip(examples, pictures, strict=True):
        question, reply = (shorten(example[k], LONGEST_TITLE, placeholder=" ...") for k in ("prompt", "answer"))
        drawn = draw_depth_map(
            picture,
            example["patches"],
            example["tokens"],
            example["token_depth"],
            example["layers"],
            "",
        )
        right = (
            "right"
            if example["right"]
            else f"wrong, expected {shorten(example['wanted'], LONGEST_TITLE, placeholder=' ...')}"
        )
        share = percent(example["compute"])
        body += [
            heading(f"{question} \N{RIGHTWARDS ARROW} {reply}"),
            figure(
                drawn,
                f"Layers executed per patch and word: {question}",
                f"{share} of the FLOPs; the answer is {right}.",
            ),
        ]
    text, vision = (_mean_depth(examples, key) for key in ("token_depth", "patches"))
    layers = examples[0]["layers"]
    told = joined(
        [
            f"In {plural(len(examples), 'example')} a patch of the image runs {number(vision, '.1f')} of {layers} "
            f"layers in the mean, a word {number(text, '.1f')}."
        ]
    )
    return Part("depth", title, [told], body, ("eval", "checkpoint"))


def _mean_depth(examples: Sequence[Mapping[str, Any]], key: str) -> float | None:
    depths: list[float] = []
    for example in examples:
        values = example[key]
        depths += [d for row in values for d in row] if key == "patches" else list(values)
    return sum(depths) / len(depths) if depths else None
