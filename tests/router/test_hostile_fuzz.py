"""Whatever a checkpoint's files are turned into, only our own errors come out, and the model stays clean."""

import copy
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import processor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import build

from skipit.router import RouterConfig, SkipItError, attach, detach
from skipit.router.checkpoint import GATES_FILE, ROUTER_FILE, attach_from, load, save_gated
from skipit.router.folders import load_tensors, read_header

FAST = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
SLOW = settings(FAST, max_examples=700)
INDEX = "model.safetensors.index.json"

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)  # with what lies between, a test would allocate gigabytes
    | st.sampled_from([2**63 - 1, -(2**63), 2**70, 10**400])
    | st.floats(width=64)
    | st.text(max_size=8)
    | st.sampled_from(["../../x", "retain", "evict", "llava", "model.language_model", "F32", "0.5", "__class__"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    torch.manual_seed(0)
    model = build("llava")
    attach(model, RouterConfig(operating_points={"0.5": 0.25}))
    save_gated(model, processor("llava"), out, max_shard_size="60KB")
    return out


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here] + [place for key, item in items for place in paths(item, (*here, key))]


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three values replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(paths(value)))
        new = draw(JSON)
        if not place:
            if draw(st.booleans()):
                return new
            continue
        *parents, key = place
        parent = value
        for step in parents:
            parent = parent[step]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                parent[key] = new
            case "remove":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = new
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes cut, overwritten or extended."""
    data = data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data
    for _ in range(draw(st.integers(0, 3))):
        place, new = draw(st.integers(0, len(data))), draw(st.binary(max_size=9))
        data = data[:place] + new + data[place + len(new) :]
    return data


def text_of(value: Any) -> str:
    return json.dumps(value)  # NaN and infinities too: Python's own reader takes them


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def with_header(data: bytes, header: Any) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    new = text_of(header).encode()
    return struct.pack("<Q", len(new)) + new + data[8 + length :]


def only_ours(action: Callable[[], Any]) -> bool:
    """Whether the action went through; any error but ours fails the test."""
    try:
        action()
    except SkipItError:
        return False
    return True


def check_router(original: Path, tmp: Path, file: str, content: bytes, model: Any) -> None:
    """Gates are attached whole, or not at all."""
    for name in (ROUTER_FILE, GATES_FILE):
        (tmp / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(original / name, tmp / name)
    (tmp / file).write_bytes(content)
    classes = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    if only_ours(lambda: attach_from(model, tmp)):
        assert all(bool(p.isfinite().all()) for name, p in model.named_parameters() if "layer_gate" in name)
        detach(model)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == names
    assert not model._forward_pre_hooks


def fuzz_router_settings(original: Path, tmp: Path, budget: settings) -> None:
    model = build("llava")
    good = json.loads((original / ROUTER_FILE).read_text())
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    layers = st.sampled_from([*lists, "model", "", ".", "lm_head", "config"]).map(lambda path: {**good, "layers": path})

    @settings(budget)
    @given(mutated(good).map(text_of) | layers.map(text_of) | st.text(), st.booleans())
    def run(text: str, broken_utf8: bool) -> None:
        content = text.encode(errors="surrogatepass")
        check_router(original, tmp, ROUTER_FILE, content + b"\xff" * broken_utf8, model)

    run()


def fuzz_gates(original: Path, tmp: Path, budget: settings) -> None:
    model = build("llava")
    good = (original / GATES_FILE).read_bytes()

    @settings(budget)
    @given(damaged(good) | mutated(header_of(good)).map(lambda header: with_header(good, header)))
    def run(content: bytes) -> None:
        check_router(original, tmp, GATES_FILE, content, model)

    run()


def fuzz_headers(original: Path, tmp: Path, budget: settings) -> None:
    good = (original / GATES_FILE).read_bytes()
    file = tmp / "x.safetensors"

    @settings(budget)
    @given(damaged(good) | st.binary(max_size=99) | mutated(header_of(good)).map(lambda h: with_header(good, h)))
    def run(content: bytes) -> None:
        file.write_bytes(content)
        named, read = only_ours(lambda: read_header(file)), only_ours(lambda: load_tensors(file))
        assert named or not read

    run()


def fuzz_whole(original: Path, tmp: Path, budget: settings, name: str) -> None:
    """`load` of a checkpoint one of whose JSON files is another."""
    folder = tmp / "checkpoint"
    shutil.copytree(original, folder)
    good = json.loads((original / name).read_text())

    @settings(budget)
    @given(mutated(good))
    def run(value: Any) -> None:
        (folder / name).write_text(text_of(value))
        if only_ours(lambda: load(folder)):
            assert value is not None

    run()


def fuzz_config(original: Path, tmp: Path, budget: settings) -> None:
    fuzz_whole(original, tmp, budget, "config.json")


def fuzz_index(original: Path, tmp: Path, budget: settings) -> None:
    fuzz_whole(original, tmp, budget, INDEX)


FUZZERS = [fuzz_router_settings, fuzz_gates, fuzz_headers, fuzz_index, fuzz_config]


@pytest.mark.parametrize("fuzzer", FUZZERS)
def test_only_our_own_errors(fuzzer: Callable[..., None], original: Path, tmp_path: Path) -> None:
    few = settings(FAST, max_examples=40) if fuzzer in (fuzz_index, fuzz_config) else FAST
    fuzzer(original, tmp_path, few)


@pytest.mark.slow
@pytest.mark.parametrize("fuzzer", FUZZERS)
def test_only_our_own_errors_out_of_thousands(fuzzer: Callable[..., None], original: Path, tmp_path: Path) -> None:
    fuzzer(original, tmp_path, SLOW)


def test_the_fuzzers_reach_what_they_are_about(original: Path) -> None:
    good = (original / GATES_FILE).read_bytes()
    assert set(header_of(good)) >= {"weight", "bias"}
    assert with_header(good, header_of(good))[-64:] == good[-64:]
    assert (original / INDEX).is_file()
    assert math.isfinite(load_tensors(original / GATES_FILE)["bias"].sum())
