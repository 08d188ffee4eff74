"""`transformers serve` answers image questions with a gated checkpoint, in a virtual environment that has no skipit."""

import base64
import io
import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_environment import bare_python, bare_variables
from transformers.utils.import_utils import is_serve_available

import skipit
from skipit.router import RouterConfig, Trace, attach, gate_state, running, set_gates
from skipit.train.data.sources import load_data, load_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_serve_available(), reason="needs fastapi, uvicorn and openai: pip install 'skipit[serve]'"
    ),
]


def make(folder: Path, leaves: int) -> None:
    """The reference model with gates by which image tokens leave before layer `leaves`; text runs everywhere."""
    model, processor = load_model("reference")
    attach(model, RouterConfig(kv="retain", operating_points={"none": 100.0}))
    gates = gate_state(model)
    gates["bias"][leaves:, 1] = -4.0
    set_gates(model, **gates)
    skipit.save_gated(model, processor, folder)


@contextmanager
def server(log: Path, *options: str) -> Iterator[str]:
    """`transformers serve` on a free port, in a virtual environment that has no skipit; stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = log.parent / "venv" / "bin" / "python"
    if not python.exists():
        bare_python(log.parent / "venv")
    code = (
        "from importlib.util import find_spec; assert find_spec('skipit') is None; "
        "from transformers.cli.transformers import main; main()"
    )
    command = [str(python), "-c", code, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = bare_variables(HF_MODULES_CACHE=str(log.parent / "modules"), OMP_NUM_THREADS="1")
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], env=environment, cwd=log.parent, stdout=file, stderr=file)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start: {log.read_text()}")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def ask(address: str, folder: Path, row: dict[str, Any], budget: str | None = None) -> dict[str, Any]:
    """One question through the OpenAI-compatible endpoint."""
    picture = io.BytesIO()
    row["images"][0].save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question(row)}]
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 12,
        "temperature": 0.0,
    }
    if budget is not None:
        body["generation_config"] = json.dumps({"budget": budget})
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=200) as answer:
        return json.load(answer)


def question(row: dict[str, Any]) -> str:
    return next(part["text"] for part in row["prompt"][0]["content"] if part["type"] == "text")


@torch.no_grad()
def answer(model: Any, processor: Any, row: dict[str, Any]) -> str:
    """The same question without a server."""
    content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": question(row)}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_image_question_is_answered(tmp_path: Path) -> None:
    rows = list(load_data("reference", "test", 12, 0))
    # Two checkpoints: one that answers well, and one whose image tokens run nothing at all: it answers otherwise than
    # the dense model, and so shows who answered.
    mild, blind = tmp_path / "mild", tmp_path / "blind"
    make(mild, leaves=2)
    make(blind, leaves=0)
    expected, dense = {}, {}
    for folder in (mild, blind):
        model, processor = skipit.load(folder)
        trace = Trace()
        with running(trace=trace):
            expected[folder] = [answer(model, processor, row) for row in rows]
        assert not torch.cat([step.run.flatten() for step in trace.steps]).all()
        with running(mode="dense"):
            dense[folder] = [answer(model, processor, row) for row in rows]
        if folder == mild:
            with running(budget="none"):
                none = [answer(model, processor, row) for row in rows[:4]]
            assert none != expected[mild][:4]
    assert expected[blind] != dense[blind]

    with server(tmp_path / "gated.log", "--trust-remote-code") as address:
        for folder in (mild, blind):
            said = [ask(address, folder, row) for row in rows]
            assert [item["choices"][0]["message"]["content"] for item in said] == expected[folder]
            assert all(item["usage"]["completion_tokens"] > 0 for item in said)
        # A request may name a budget, and only it runs at it.
        for row, at_none, default in zip(rows[:4], none, expected[mild], strict=False):
            for budget, wanted in (("none", at_none), (None, default)):
                said = ask(address, mild, row, budget)
                assert said["choices"][0]["message"]["content"] == wanted
        with pytest.raises(urllib.error.HTTPError, match="500"):
            ask(address, mild, rows[0], "0.7")
        assert ask(address, mild, rows[0])["choices"][0]["message"]["content"] == expected[mild][0]
    assert "`budget`: got '0.7', this router is calibrated for: none" in (tmp_path / "gated.log").read_text()
    right = sum(text.strip() == row["answer"] for text, row in zip(expected[mild], rows, strict=True))
    assert right >= 10, expected[mild]

    with server(tmp_path / "dense.log") as address:  # code that is not trusted is not run: the dense model
        said = [ask(address, blind, row)["choices"][0]["message"]["content"] for row in rows[:3]]
        assert said == dense[blind][:3]
