"""vLLM dense against vLLM gated, the same folder served in turn: scripts/study serving [options].

Requests per second, time to the first token, time per token after it, and the share executed, at several concurrencies
and budgets. Gates are random and thresholds such as meet the budgets on a few prompts: speed does not depend on what
gates have learned. The first answers of every row are compared with `skipit.generate`'s. An environment with vLLM is
made by `tests/environments/vllm`.
"""

import argparse
import base64
import io
import json
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import skipit
from skipit.router import RouterConfig
from skipit.router.attach import find_router, gate_state, gated_layers
from skipit.router.folders import provenance, save_json
from skipit.router.gates import logits_of
from skipit.router.modality import token_modality
from skipit.router.spending import row_thresholds
from skipit.theory.cost import CostModel
from skipit.train.data.sources import load_model
from skipit.train.reference.documents.page import SIDE

from .local_server import free_port, running_server
from .options import command, markdown
from .shapes import PATCH, bench_small

CHECKED = 2  # answers of a row that are compared with skipit.generate's
HEAD = ("served", "at once", "requests/s", "TTFT p50 ms", "p99", "ms/token", "share routed", "executed", "same answers")


class Served(NamedTuple):
    """One answer: its tokens, and seconds to the first of them and to the last."""

    tokens: list[int]
    first: float
    last: float


def reference() -> tuple[Any, Any, int]:
    """The reference VLM, its processor, and the side of its pictures."""
    model, processor = load_model("reference")
    return model, processor, 64


def small() -> tuple[Any, Any, int]:
    """`bench-small` with 576 image tokens, with a processor made of the reference's tokenizer."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    _, other = load_model("reference")
    model, side = bench_small(), PATCH * 24
    model.config.image_token_id = other.tokenizer.convert_tokens_to_ids(other.image_token)
    size = {"height": side, "width": side}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=other.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=other.chat_template,
    )
    return model, processor, side


def documents() -> tuple[Any, Any, int]:
    """The model that reads documents, in fp32 as it is served, its processor, and the side of a page."""
    model, processor = load_model("documents")
    return model.float(), processor, SIDE


SHAPES = {"reference": reference, "bench-small": small, "documents": documents}


def question(number: int, side: int) -> tuple[Image.Image, str]:
    """A picture of its own for every request, so that nothing is cached, and a text."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels), "read the top row ."


def inputs_of(processor: Any, number: int, side: int) -> dict[str, Any]:
    """The same as a model takes it."""
    picture, text = question(number, side)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template([{"role": "user", "content": content}], **how))


@torch.no_grad()
def thresholds(model: Any, prompts: list[dict[str, Any]], budgets: Sequence[float]) -> dict[str, float]:
    """Thresholds at which prompts spend these shares of their FLOPs, in the mean."""
    _, router = find_router(model)
    costs, entered = CostModel.of(model).layers, []
    hook = router.layers[0].register_forward_pre_hook(lambda layer, args: entered.append(args[0]))
    found: dict[str, list[float]] = {f"{budget:g}": [] for budget in budgets}
    for prompt in prompts:
        with skipit.running(mode="dense"):
            model(**prompt)
        modality = token_modality(model.config, prompt["input_ids"])
        logits = logits_of([layer.layer_gate for layer in gated_layers(model)], entered.pop(), modality)
        seen = torch.arange(1, logits.shape[-1] + 1)[None]
        for budget in budgets:
            one = row_thresholds(
                logits, torch.ones_like(seen, dtype=torch.bool), seen, costs, "retain", "block", budget
            )
            found[f"{budget:g}"].append(float(one))
    hook.remove()
    return {name: float(np.mean(values)) for name, values in found.items()}


def make(shape: str, budgets: Sequence[float], folder: Path, tokens: int) -> tuple[int, dict[str, list[list[int]]]]:
    """A gated checkpoint; the side of its pictures, and the first answers at every budget, by its name."""
    model, processor, side = SHAPES[shape]()
    router = skipit.attach(model)
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(gate.shape, generator=generator) for name, gate in gate_state(model).items()}
    skipit.set_gates(model, drawn["weight"] / drawn["weight"].shape[-1] ** 0.5, drawn["bias"])
    prompts = [inputs_of(processor, number, side) for number in range(4)]
    points = thresholds(model, prompts, budgets)
    router.config = RouterConfig(operating_points=points)
    skipit.save_gated(model, processor, folder)
    model.generation_config.eos_token_id = None  # answers of one length
    said: dict[str, list[list[int]]] = {}
    for name in (None, *points):
        said[name or "dense"] = []
        for prompt in prompts[:CHECKED]:
            with skipit.running(mode=None if name else "dense"):
                out = model.generate(**prompt, budget=name, max_new_tokens=tokens, do_sample=False)
            said[name or "dense"].append(out[0, prompt["input_ids"].shape[1] :].tolist())
    return side, said


def server(python: Path, folder: Path, log: Path, gated: bool, options: Sequence[str]) -> AbstractContextManager[str]:
    """The address of `vllm serve` on a free port; stopped at the end."""
    # What `vllm serve` starts; the wheel for CPUs has a command that looks for a package called vllm, and fails.
    given = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32"]
    given += ["--host", "127.0.0.1", "--port", str(free_port()), "--no-enable-prefix-caching", "--max-num-seqs", "32"]
    given += options if gated else [*options, "--model-impl", "transformers"]
    variables = {**os.environ, "SKIPIT_VLLM": str(int(gated)), "HF_HUB_OFFLINE": "1"}
    variables.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    variables.pop("PYTHONPATH", None)
    return running_server(given, log, variables, seconds=inf)  # a large model takes its time to load


def ask(address: str, folder: Path, number: int, side: int, tokens: int, budget: str | None) -> Served:
    """One request, streamed."""
    picture, text = question(number, side)
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"model": str(folder), "max_tokens": tokens, "temperature": 0.0, "stream": True, "ignore_eos": True}
    body["return_token_ids"] = True
    body |= {"messages": [{"role": "user", "content": content}]}
    body |= {"vllm_xargs": {"skipit_budget": budget}} if budget else {}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    said: list[int] = []
    times: list[float] = []
    begin = time.perf_counter()
    with urllib.request.urlopen(request, timeout=3600) as lines:
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            part = json.loads(line[6:])
            if part["choices"] and (new := part["choices"][0].get("token_ids")):
                said += new
                times.append(time.perf_counter() - begin)
    return Served(said, times[0], times[-1])


def counted(address: str) -> dict[str, float]:
    """The server's counters of skipit, summed over budgets."""
    page = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode()
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^skipit_(\w+)_total\{.*\} (\S+)$", page, re.M):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def row(
    address: str, folder: Path, side: int, at_once: int, requests: int, tokens: int, budget: str | None
) -> dict[str, Any]:
    """What one budget costs at one concurrency; the first answers are kept."""
    before, begin = counted(address), time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(lambda number: ask(address, folder, number, side, tokens, budget), range(requests)))
    seconds, after = time.perf_counter() - begin, counted(address)
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    per_token = [(one.last - one.first) / (len(one.tokens) - 1) for one in found if len(one.tokens) > 1]
    p50, p99 = np.percentile([one.first for one in found], [50, 99])
    return {
        "at_once": at_once,
        "requests": requests,
        "per_second": requests / seconds,
        "ttft_p50": float(p50),
        "ttft_p99": float(p99),
        "tpot": float(np.median(per_token)) if per_token else None,
        "routed": spent["flops_routed"] / spent["flops_dense"] if spent else 1.0,
        "executed": spent["flops_executed"] / spent["flops_dense"] if spent else 1.0,
        "said": [one.tokens for one in found[:CHECKED]],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows."""

    def line(one: dict[str, Any]) -> list[str]:
        times = [f"{1000 * one[name]:.0f}" for name in ("ttft_p50", "ttft_p99")]
        tpot = "" if one["tpot"] is None else f"{1000 * one['tpot']:.1f}"
        shares = [f"{one[name]:.1%}" for name in ("routed", "executed")]
        return [one["served"], str(one["at_once"]), f"{one['per_second']:.2f}", *times, tpot, *shares, one["same"]]

    return markdown(HEAD, map(line, rows))


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = command(__name__, __doc__, budgets=[0.75, 0.5, 0.25], file=Path("runs/serving.json"))
    parser.add_argument(
        "--python", type=Path, default=Path(".venv-vllm/bin/python"), help="that has vLLM (default %(default)s)"
    )
    parser.add_argument("--shape", choices=SHAPES, default="bench-small", help="model (default %(default)s)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32], help="concurrencies")
    parser.add_argument("--requests", type=int, default=32, help="of every row (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer (default %(default)s)")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of `vllm serve`, at the end")
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        side, expected = make(arguments.shape, arguments.budgets, folder, arguments.tokens)
        for gated in (False, True):
            log = Path(place) / "server.log"
            with server(arguments.python, folder, log, gated, arguments.options) as address:
                budgets = [f"{budget:g}" for budget in arguments.budgets] if gated else [None]
                row(address, folder, side, 1, 2, arguments.tokens, budgets[0])  # warm
                for at_once in arguments.at_once:
                    for budget in budgets:
                        one = row(address, folder, side, at_once, arguments.requests, arguments.tokens, budget)
                        name = f"gated {budget}" if budget else "dense"
                        pairs = zip(one["said"], expected[budget or "dense"], strict=True)
                        same = sum(said == wanted for said, wanted in pairs)
                        rows.append({"served": name, "same": f"{same} of {CHECKED}", **one})
                        save_json(arguments.file, {"results": rows, "made_by": provenance()})
    print(table(rows))
