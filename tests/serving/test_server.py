"""`vllm serve` on a gated checkpoint: answers, budgets per request, an error with the known ones, metrics."""

import base64
import io
import json
import os
import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: tests/environments/vllm makes an environment with it")

import torch

import skipit
from skipit.router import RouterConfig, gate_state
from skipit.train.data.sources import load_data, load_model
from studies.local_server import free_port, running_server

pytestmark = pytest.mark.slow
POINTS = {"0.5": 0.0, "0.25": 0.7}
ASKED: list[dict[str, Any]] = [{}, {"skipit_budget": 0.5}, {"skipit_budget": "0.25"}]


def make(folder: Path) -> Path:
    model, processor = load_model("reference")
    skipit.attach(model, RouterConfig(operating_points=POINTS, threshold=-1.0))
    gates = gate_state(model)
    generator = torch.Generator().manual_seed(0)
    draw = {name: torch.randn(gate.shape, generator=generator) for name, gate in gates.items()}
    skipit.set_gates(model, weight=draw["weight"] / gates["weight"].shape[-1] ** 0.5, bias=draw["bias"])
    skipit.save_gated(model, processor, folder)
    return folder


def server(folder: Path, log: Path, *options: str) -> AbstractContextManager[str]:
    """The address of a server on a free port; stopped at the end."""
    # What `vllm serve` starts; the wheel for CPUs has a command that looks for a package called vllm, and fails.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(free_port())]
    settings = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-batched-tokens", "512"]
    variables = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return running_server([*command, *settings, *options], log, variables)


def question(row: dict[str, Any]) -> str:
    return next(part["text"] for part in row["prompt"][0]["content"] if part["type"] == "text")


def ask(address: str, folder: Path, row: dict[str, Any], extra: dict[str, Any]) -> str:
    picture = io.BytesIO()
    row["images"][0].save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question(row)}]
    body = {"model": str(folder), "max_tokens": 12, "temperature": 0.0, "vllm_xargs": extra}
    body["messages"] = [{"role": "user", "content": parts}]
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"]).strip()  # detokenized piece by piece


@torch.no_grad()
def answer(model: Any, processor: Any, row: dict[str, Any], extra: dict[str, Any]) -> tuple[str, Any]:
    """The same question without a server."""
    content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": question(row)}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    given = processor.apply_chat_template([{"role": "user", "content": content}], **how)
    budget = extra.get("skipit_budget")
    out, trace = skipit.generate(model, return_trace=True, budget=budget, **given, max_new_tokens=12, do_sample=False)
    return processor.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip(), trace


def test_questions_at_several_budgets_at_once(tmp_path: Path) -> None:
    rows = list(load_data("reference", "test", 8, 0))
    folder = make(tmp_path / "checkpoint")
    model, processor = skipit.load(folder)
    asked = [(row, extra) for row in rows for extra in ASKED]
    expected = [answer(model, processor, row, extra) for row, extra in asked]
    assert len({tuple(text for text, _ in expected[place :: len(ASKED)]) for place in range(len(ASKED))}) == len(ASKED)
    log = tmp_path / "server.log"
    with server(folder, log, "--no-enable-prefix-caching") as address:
        with ThreadPoolExecutor(8) as pool:
            said = list(pool.map(lambda it: ask(address, folder, *it), asked))
        assert said == [text for text, _ in expected]
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            ask(address, folder, rows[0], {"skipit_budget": 0.3})
        assert "calibrated for: 0.5, 0.25" in refused.value.read().decode()
        page = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode()
    counted = {found[1]: float(found[2]) for found in re.finditer(r"^(skipit_\S+) (\S+)$", page, re.M)}
    for place, name in enumerate(("default", "0.5", "0.25")):
        traces = [trace for _, trace in expected[place :: len(ASKED)]]
        label = f'{{budget="{name}"}}'
        assert counted[f"skipit_requests_total{label}"] == len(rows)
        assert counted[f"skipit_token_layers_total{label}"] == sum(int(trace.run.sum()) for trace in traces)
        assert counted[f"skipit_flops_routed_total{label}"] == pytest.approx(sum(float(t.flops.sum()) for t in traces))
        dense = sum(float(trace.dense_flops.sum()) for trace in traces)
        assert counted[f"skipit_flops_dense_total{label}"] == pytest.approx(dense)
    assert "runs gated (unit block)" in log.read_text()
