"""`transformers serve` answers image questions with a gated checkpoint, in a virtual environment that has no skipit."""

import base64
import io
import json
import os
import re
import shlex
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_environment import bare_python, bare_variables
from transformers.utils.import_utils import is_serve_available

import skipit
from skipit.router import RouterConfig, Trace, attach, gate_state, running, set_gates
from skipit.train.data.sources import load_data, load_model
from studies.local_server import free_port, running_server

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


def bare(folder: Path) -> str:
    """The interpreter of a virtual environment that has no skipit."""
    python = folder / "venv" / "bin" / "python"
    return str(python if python.exists() else bare_python(folder / "venv"))


def server(log: Path, *options: str) -> AbstractContextManager[str]:
    """`transformers serve` on a free port, in a virtual environment that has no skipit; stopped at the end."""
    code = (
        "from importlib.util import find_spec; assert find_spec('skipit') is None; "
        "from transformers.cli.transformers import main; main()"
    )
    command = [bare(log.parent), "-c", code, "serve", "--host", "127.0.0.1", "--port", str(free_port()), *options]
    return started(command, log, log.parent, bare_variables(HF_MODULES_CACHE=str(log.parent / "modules")))


def started(command: list[str], log: Path, place: Path, variables: Mapping[str, str]) -> AbstractContextManager[str]:
    """The address of a server on one thread of the processor."""
    environment = {**variables, "OMP_NUM_THREADS": "1"}
    return running_server([*command, "--device", "cpu"], log, environment, place=place)


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


def commands_on_the_page() -> list[str]:
    """Every command of docs/serving.md that starts a server."""
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    return re.findall(
        r"^transformers serve .+$|^python -m skipit\S+ .+--port.+$|(?<=`)cd .+--port \d+(?=`)", page, re.M
    )


def post(address: str, body: bytes, kind: str = "application/json") -> str:
    """What is answered, an error's text too."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, body, {"Content-Type": kind}), timeout=200
        ) as found:
            return found.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


def attack(address: str, folder: Path) -> list[str]:
    """Every endpoint asked for another folder."""
    said = {"role": "user", "content": "hi"}
    body = {"model": str(folder), "messages": [said], "input": [said], "prompt": "hi", "max_tokens": 2, "stream": False}
    body |= {"questions": [{"name": "a", "question": "b", "type": "yes_no"}]}
    form = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in {"model": str(folder), 'file"; filename="a.wav': "RIFF"}.items()
    )
    answers = [
        post(f"{address}/{endpoint}", json.dumps({key: body[key] for key in keys}).encode())
        for endpoint, keys in {
            "v1/chat/completions": ("model", "messages", "max_tokens"),
            "v1/completions": ("model", "prompt", "max_tokens"),
            "v1/responses": ("model", "input"),
            "v1/systemone": ("model", "messages", "questions"),
            "load_model": ("model",),
        }.items()
    ]
    return [
        *answers,
        post(f"{address}/v1/audio/transcriptions", f"{form}--x--\r\n".encode(), "multipart/form-data; boundary=x"),
    ]


@pytest.mark.parametrize("command", commands_on_the_page())
def test_no_request_runs_code_under_a_command_of_the_page(command: str, tmp_path: Path) -> None:
    make(tmp_path / "runs" / "checkpoint", leaves=2)
    evil, trace = tmp_path / "evil", tmp_path / "trace"
    shutil.copytree(tmp_path / "runs" / "checkpoint", evil)
    (evil / "evil.py").write_text(f"open({str(trace)!r}, 'w').write('x')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoProcessor", "AutoModelForMultimodalLM", "AutoModelForImageTextToText")
    for file in ("config.json", "processor_config.json"):
        values = json.loads((evil / file).read_text())
        (evil / file).write_text(json.dumps({**values, "auto_map": dict.fromkeys(names, "evil.Evil")}))
    place, variables, words = tmp_path, dict(os.environ), shlex.split(command)
    if words[0] == "cd":
        place, words = tmp_path / words[1], words[3:]
        words = [str(place) if word == "$PWD" else word for word in words]
        python, variables = bare(tmp_path), dict(bare_variables())
    else:
        python = sys.executable
    start = ["-c", "from transformers.cli.transformers import main; main()"] if words[0] == "transformers" else []
    words = [python, *start, *words[1:]]
    words[words.index("--port") + 1] = str(free_port())
    variables["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    name = words[words.index("--host") - 1]
    rows = list(load_data("reference", "test", 2, 0))
    gated = "transformers serve" not in command
    model, processor = skipit.load(tmp_path / "runs" / "checkpoint")
    with running(mode="gathered" if gated else "dense"):
        expected = [answer(model, processor, row) for row in rows]
    with started(words, tmp_path / "log", place, variables) as address:
        refusals = attack(address, evil)
        if gated:
            assert all('"choices"' not in text and '"ready"' not in text for text in refusals), refusals
        said = [ask(address, Path(name), row)["choices"][0]["message"]["content"] for row in rows]
    assert said == expected
    assert not trace.exists()


def test_the_page_has_a_command_for_each_way() -> None:
    assert [command.split()[0] for command in commands_on_the_page()] == ["python", "cd", "transformers"]
    assert not any("trust" in command for command in commands_on_the_page())
