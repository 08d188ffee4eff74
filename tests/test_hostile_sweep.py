"""Every file that skipit reads, damaged in every way we could think of: an error of ours, or the answers of before.

Hundreds of mutations of each kind of folder. None may run code, ask, call another program or the network, take more
than 20 seconds or 2 GB, or end in an error that is not skipit's. Where the format itself can tell that something is
wrong, it is refused, or makes no difference.
"""

import json
import os
import random
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import inputs
from families.family import picture
from safetensors.torch import load, save
from tiny_run import Made, make_all

import skipit
from skipit.router import SkipItError
from skipit.theory.artefact import load_plan, load_profile
from skipit.theory.plan import make_plan
from skipit.train.data.collate import Collator
from skipit.train.data.rows import Row
from skipit.train.export import merge_run

pytestmark = pytest.mark.slow

SECONDS, KILOBYTES = 20, 2 * 2**20
RAW = "@@raw@@"
# Raw texts that are no JSON, or that say what JSON has no word for: a reader must refuse them wherever they stand.
NO_JSON = ("NaN", "-Infinity", "1e999", "[" * 100_000, "9" * 5000, '"\ud800"', "")
# Values of JSON; a setting may happen to take one of them.
VALUES = (None, True, "x", "../../x", "someone/else", [], {}, [[]], -1, 0, 3, 10**9, 10**19, 1e308, "é" * 999)


class Mutation(NamedTuple):
    """One damage.

    Attributes:
        name: what it is.
        apply: does it to a file.
        tells: whether the format can tell.
    """

    name: str
    apply: Callable[[Path], object]
    tells: bool


def writes(content: bytes) -> Callable[[Path], object]:
    """What replaces a file's content."""
    return lambda path: path.write_bytes(content)


class Watch:
    """What may not happen while a folder is read, by an audit hook; such a hook stays, so this one is switched."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        self.root = "\0"
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class"):
            self.seen.append(f"{event} {arguments[0]}")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            self.seen.append(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[0]}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(self.root):
            self.seen.append(f"exec {arguments[0].co_filename}")


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_all(tmp_path_factory.mktemp("sweep"))


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON value, but the whole; of a long list the first few."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in items[:40]:
        yield (*here, key)
        yield from places(item, (*here, key))


def changed(value: Any, place: tuple[Any, ...], new: Any, *, remove: bool = False) -> Any:
    value = json.loads(json.dumps(value))
    parent = value
    for step in place[:-1]:
        parent = parent[step]
    if remove:
        del parent[place[-1]]
    else:
        parent[place[-1]] = new
    return value


def write_json(value: Any, raw: str | None = None) -> Callable[[Path], object]:
    text = json.dumps(value)
    if raw is not None:
        text = text.replace(f'"{RAW}"', raw)
    return writes(text.encode(errors="surrogatepass"))


def twice(text: str, key: str) -> Callable[[Path], object]:
    """The text with a key that stands there a second time, with another value, before its first."""
    doubled = text.replace(f"{json.dumps(key)}:", f'{json.dumps(key)}: "x", {json.dumps(key)}:', 1)
    return writes(doubled.encode())


def json_mutations(path: Path, count: int, rng: random.Random) -> Iterator[Mutation]:
    text = path.read_text()
    value = json.loads(text)
    found = list(places(value))
    for _ in range(count):
        place, new = rng.choice(found), rng.choice(VALUES)
        yield Mutation(f"{place} = {str(new)[:20]}", write_json(changed(value, place, new)), False)
    for _ in range(count // 4):
        place, raw = rng.choice(found), rng.choice(NO_JSON)
        yield Mutation(f"{place} = {raw[:20]}", write_json(changed(value, place, RAW), raw), True)
        place = rng.choice(found)
        yield Mutation(f"no {place}", write_json(changed(value, place, None, remove=True)), False)
    keys = [place[-1] for place in found if isinstance(place[-1], str)]
    for key in rng.sample(keys, min(4, len(keys))):
        if f"{json.dumps(key)}:" in text:
            yield Mutation(f"{key} twice", twice(text, key), True)
    yield Mutation("surplus key", write_json({**value, "zz": {"a": 1}}), False)
    for content in (b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 100_000):
        tells = content != b"{}"
        yield Mutation(f"is {content[:4]!r}", writes(content), tells)


def with_header(data: bytes, header: Any, length: int | None = None) -> bytes:
    (old,) = struct.unpack("<Q", data[:8])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data[8 + old :]


def tensor_mutations(path: Path, rng: random.Random) -> Iterator[Mutation]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    tensors = load(data)

    def rewritten(**changes: torch.Tensor | None) -> Callable[[Path], object]:
        new = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        return writes(save({name: value.contiguous() for name, value in new.items()}, {"format": "pt"}))

    numbers = [name for name in tensors if tensors[name].is_floating_point() and tensors[name].isfinite().all()]
    for name in rng.sample(sorted(numbers), min(3, len(numbers))):
        tensor = tensors[name]
        for value in (float("nan"), float("inf")):
            broken = tensor.clone()
            broken.view(-1)[rng.randrange(tensor.numel())] = value
            # A profile's fits are missing where there were no tokens.
            tells = value == float("inf") or not name.startswith("ridge_")
            yield Mutation(f"{name} has {value}", rewritten(**{name: broken}), tells)
        yield Mutation(
            f"{name} is 1e300", rewritten(**{name: tensor.double() * 0 + 1e300}), not path.match("profile/*")
        )
        for dtype in (torch.bool, torch.int8, torch.int64):
            yield Mutation(f"{name} as {dtype}", rewritten(**{name: tensor.to(dtype)}), True)
        yield Mutation(f"no {name}", rewritten(**{name: None}), True)
        yield Mutation(f"{name} renamed", rewritten(**{name: None, f"{name}x": tensor}), True)
        yield Mutation(f"{name} flat", rewritten(**{name: tensor.reshape(1, -1)}), True)
        yield Mutation(f"{name} shorter", rewritten(**{name: tensor[:1]}), tensor.shape[0] > 1)
        forged = json.loads(json.dumps(header))
        forged[name]["data_offsets"][1] += 2**33
        yield Mutation(f"{name} promises", writes(with_header(data, forged)), True)
        forged = json.loads(json.dumps(header))
        forged[name]["dtype"] = "F8_E4M3"
        yield Mutation(f"{name} forged", writes(with_header(data, forged)), True)
    yield Mutation("surplus", rewritten(zz=torch.ones(3)), True)
    for length in (0, 3, 2**31, 2**63):
        yield Mutation(f"header of {length}", writes(with_header(data, header, length)), True)
    size = 6 * 2**30
    huge = json.dumps({next(iter(tensors)): {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()

    def sparse(path: Path) -> None:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(huge)) + huge)
            file.truncate(8 + len(huge) + size)

    yield Mutation("sparse, 6 GB", sparse, True)


def file_mutations(path: Path, rng: random.Random) -> Iterator[Mutation]:
    data = path.read_bytes()
    tells = path.suffix in (".json", ".safetensors")

    def becomes(make: Callable[[Path], object]) -> Callable[[Path], object]:
        return lambda path: [path.unlink(), make(path)]

    yield Mutation("pipe", becomes(os.mkfifo), tells)
    for target in ("/dev/zero", "nowhere", path.name):
        yield Mutation(f"link to {target}", becomes(lambda path, target=target: path.symlink_to(target)), tells)
    yield Mutation("folder", becomes(Path.mkdir), tells)
    yield Mutation("gone", Path.unlink, False)
    for keep in (0, 1, len(data) // 3, len(data) - 2):
        yield Mutation(f"{keep} bytes", writes(data[:keep]), tells)
    yield Mutation("more bytes", writes(data + b"x"), tells)
    yield Mutation("zeros", writes(bytes(len(data))), tells)
    for _ in range(3):
        at, byte = rng.randrange(len(data)), rng.randrange(256)
        yield Mutation(f"byte {at}", writes(data[:at] + bytes([byte]) + data[at + 1 :]), False)


def mutations(path: Path, count: int, rng: random.Random) -> Iterator[Mutation]:
    yield from file_mutations(path, rng)
    if path.suffix == ".json":
        yield from json_mutations(path, count, rng)
    elif path.suffix == ".safetensors":
        yield from tensor_mutations(path, rng)


@torch.no_grad()
def answers(loaded: tuple[Any, Any]) -> list[torch.Tensor]:
    """What a model says, and what its processor makes of a question; one that fails in use makes nothing."""
    model, processor = loaded
    said = [model(**inputs("llava", [[5, "image", 6, 7, 8, 9]])).logits]
    parts = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    row = Row({"images": [picture(0, 0)], "prompt": [{"role": "user", "content": parts}]}, "the question")
    batch = Collator(processor, with_completion=False)([row])
    return [*said, *(batch[name] for name in ("input_ids", "pixel_values"))]


def planned(path: Path) -> list[torch.Tensor]:
    plan = make_plan(load_profile(path), budget=0.5)
    return [plan.weight, plan.bias, plan.run_rate]


def read_plan(path: Path) -> list[torch.Tensor]:
    plan = load_plan(path)
    return [plan.weight, plan.bias, plan.run_rate, torch.tensor(plan.budget)]


READERS: dict[str, Callable[[Path], list[torch.Tensor]]] = {
    "merged": lambda path: answers(skipit.load(path)),
    "adapter": lambda path: answers(skipit.load(path)),
    "run": lambda path: answers(merge_run(path)),
    "profile": planned,
    "plan": read_plan,
}


@pytest.mark.parametrize("kind", READERS)
def test_every_damage_is_refused_or_makes_no_difference(
    kind: str, made: Made, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    original, read = getattr(made, kind), READERS[kind]
    expected = read(original)
    rng = random.Random(f"sweep {kind}")
    files = [
        path for path in sorted(original.rglob("*")) if path.is_file() and path.suffix not in (".py", ".md", ".png")
    ]
    watch.root, memory = str(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong, tried = [], 0
    for file in files:
        for mutation in mutations(file, 12, rng):
            folder = Path(shutil.copytree(original, tmp_path / str(tried)))
            mutation.apply(folder / file.relative_to(original))
            tried += 1
            started, watch.on, watch.seen = time.monotonic(), True, []
            try:
                found = read(folder)
            except SkipItError:
                found = None
            except BaseException as error:
                wrong.append(f"{file.name}: {mutation.name}: {type(error).__name__}: {str(error)[:150]}")
                found = None
            watch.on = False
            if (seconds := time.monotonic() - started) > SECONDS:
                wrong.append(f"{file.name}: {mutation.name}: {seconds:.0f} s")
            wrong += [f"{file.name}: {mutation.name}: {event}" for event in watch.seen]
            if found is not None and mutation.tells and not _same(found, expected):
                wrong.append(f"{file.name}: {mutation.name}: other answers, in silence")
            shutil.rmtree(folder)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert not wrong, f"{len(wrong)} of {tried}:\n" + "\n".join(wrong)
    assert taken < KILOBYTES, f"{taken / 2**20:.1f} GB"
    assert tried >= LEAST[kind], tried


LEAST = {"merged": 300, "adapter": 120, "run": 200, "profile": 60, "plan": 60}  # 740 in all


def _same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
