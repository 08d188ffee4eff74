"""How many kernels do gates launch, and how often do they wait for the device?: scripts/study counts.

The rule, the same on every device. Each call of an aten operator is a launch, but for those that look at memory in
another way (views), set it aside (`empty`) or give nothing (a tensor without entries); those that copy a tensor and
then write into the copy are two. A read is whatever makes the host wait for a number from the device: `item`, `bool`
and `int` of a tensor, `tolist`, `cpu`, `numpy`, and operators whose result has as many entries as the values say. On a
CPU nobody waits, but the calls are the same ones.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from skipit.router import RouterConfig, attach, running, set_gates
from skipit.router.decoder import find_decoder
from skipit.router.folders import provenance, save_json

from .options import command, markdown
from .shapes import bench_small, prompt

FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
TWICE = ("index_copy", "index_put", "index_fill", "masked_fill", "masked_scatter", "scatter", "scatter_add")
BY_VALUE = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")
METHODS = ("tolist", "cpu", "numpy")  # of a tensor that is on the CPU they call no operator
OUTSIDE = -1
EVERYONE, SOME, NOBODY = 0, (1, 2), 3  # who runs which layer of the model that is counted
CALLS = ("prefill", "first step", "later step")
# What each launch is for that the dense layer does not have; one that is not here has no reason.
WAYS: dict[str, dict[str, Any]] = {  # options of `running`; which route is the faster one depends on the machine
    "retain": {"kv": "retain", "route": "whole"},
    "retain, packed queries": {"kv": "retain", "route": "packed"},
    "evict": {"kv": "evict"},
}
LAYER = {
    ("retain", "index_select"): "the tokens that run, packed for the MLP",
    ("retain", "zeros_like"): "what the MLP gives for tokens that skip",
    ("retain", "index_copy"): "the MLP's output at its places among them",
    ("retain", "where"): "tokens that skip keep their states",
    ("evict", "index_select"): "states, cosines, sines and positions of the tokens that run, packed; in a batch "
    "what attention gives, too",
    ("evict", "new_zeros"): "room for queries, keys and values in rows of one width",
    ("evict", "index_copy_"): "queries, keys and values, each in its row",
    ("evict", "index_copy"): "the layer's output at its places among the states of tokens that skip",
    ("both", "clone"): "keys and values in the order that attention reads, as the cache keeps them",
}


@dataclass
class Counts:
    """What was counted.

    Attributes:
        launches: operators, how often, by the index of the decoder layer that they were called in, or `OUTSIDE`.
        reads: what made the host wait, how often, likewise.
    """

    launches: dict[int, Counter[str]] = field(default_factory=dict)
    reads: dict[int, Counter[str]] = field(default_factory=dict)

    def of(self, layer: int) -> Counter[str]:
        """The launches of a layer, without those that decide for it, which are `OUTSIDE`."""
        return self.launches.get(layer, Counter())

    def waited(self) -> int:
        """How often the host has waited, anywhere."""
        return sum(found.total() for found in self.reads.values())


class _Counting(TorchDispatchMode):
    def __init__(self, note: Callable[[str, str, int], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        read = name in BY_VALUE or _by_mask(name, args) or _brought(name, args, result)
        if read:
            self.note("reads", name, 1)
        nothing = isinstance(result, Tensor) and result.numel() == 0
        if not (func.is_view or nothing or name in FREE or (read and not isinstance(result, Tensor))):
            self.note("launches", name, 1 + (name in TWICE))
        return result


def _by_mask(name: str, args: Sequence[Any]) -> bool:
    """Whether an operator takes entries where a mask is True: how many, the host must know."""
    indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _brought(name: str, args: Sequence[Any], result: Any) -> bool:
    """Whether an operator copies from a device to the host."""
    source = args[1 if name == "copy_" else 0] if name in ("copy_", "_to_copy") else None
    return isinstance(source, Tensor) and source.device.type != "cpu" and result.device.type == "cpu"


@contextmanager
def counting(model: nn.Module) -> Iterator[Counts]:
    """Count what a model's calls launch and read within a block."""
    counts, inside = Counts(), [OUTSIDE]

    def note(kind: str, name: str, number: int) -> None:
        getattr(counts, kind).setdefault(inside[-1], Counter())[name] += number

    def reading(name: str) -> Callable[..., Any]:
        own = getattr(Tensor, name)

        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.device.type == "cpu":
                note("reads", name, 1)
            return own(tensor, *args, **kwargs)

        return read

    def enter(index: int) -> Callable[..., None]:
        return lambda *_: inside.append(index)

    def leave(*_: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for index, layer in enumerate(find_decoder(model, None)[2]):
            for hook in (layer.register_forward_pre_hook(enter(index)), layer.register_forward_hook(leave)):
                stack.callback(hook.remove)
        for name in METHODS:
            stack.enter_context(patch.object(Tensor, name, reading(name)))
        stack.enter_context(_Counting(note))
        yield counts


def models(decide_at: tuple[int, ...] | None = (0,), image_tokens: int = 576) -> tuple[Any, Any]:
    """An untouched model, LLaVA-shaped and narrow, and its gated twin, whose layers all, some or no tokens run."""
    dense = bench_small(hidden=128, layers=5, image_tokens=image_tokens)
    gated = copy.deepcopy(dense)
    attach(gated, RouterConfig(decide_at=decide_at))
    weight, bias = torch.zeros(5, 2, 128), torch.full((5, 2), 4.0)
    weight[list(SOME)] = torch.randn(len(SOME), 2, 128, generator=torch.Generator().manual_seed(0))
    bias[list(SOME)], bias[NOBODY] = 0, -4
    set_gates(gated, weight, bias)
    return dense, gated


def count_calls(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[Counts]:
    """Counts of a prefill and two decoding steps, `CALLS`; without what `generate` does between them."""
    found: list[Counts] = []
    open_block = ExitStack()
    hooks = [
        model.register_forward_pre_hook(
            lambda *_: found.append(open_block.enter_context(counting(model))), prepend=True
        ),
        model.register_forward_hook(lambda *_: open_block.close()),
    ]
    try:
        with running(**options), open_block:
            model.generate(**inputs, max_new_tokens=len(CALLS), min_new_tokens=len(CALLS), do_sample=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def overview(batches: Sequence[int] = (1, 4)) -> list[dict[str, Any]]:
    """Launches beyond the dense model's by batch, way and call: of layers, and of one decision; reads likewise."""
    dense, gated = models()
    rows = []
    for batch in batches:
        inputs = prompt(576, 64, batch)
        base = count_calls(dense, inputs)
        for way, options in WAYS.items():
            for call, got, own in zip(CALLS, count_calls(gated, inputs, **options), base, strict=True):
                more = {layer: got.of(layer).total() - own.of(layer).total() for layer in (OUTSIDE, *range(5))}
                row = {"call": call, "batch": batch, "way": way, "dense": own.of(0).total(), "everyone": more[EVERYONE]}
                row |= {"some": more[SOME[1]], "nobody": got.of(NOBODY).total()}
                # The first layer that some tokens run finds the places of all layers' tokens.
                row |= {"decision": more[OUTSIDE] + max(0, more[SOME[0]] - more[SOME[1]])}
                rows.append({**row, "reads": got.waited() - own.waited()})
    return rows


def reasons(batches: Sequence[int] = (1, 4)) -> list[tuple[str, int, str, int, str]]:
    """Policy, batch, operator, launches, and what they are for: those of a layer that some tokens run, in a prefill."""
    (dense, gated), layer, rows = models(), SOME[1], []
    for kv, batch in product(("retain", "evict"), batches):
        inputs = prompt(576, 64, batch)
        own, got = (count_calls(model, inputs, **WAYS[kv])[0].of(layer) for model in (dense, gated))
        rows += [(kv, batch, name, n, LAYER.get((kv, name)) or LAYER["both", name]) for name, n in (got - own).items()]
        rows += [(kv, batch, name, -n, "as above: the dense cache's") for name, n in (own - got).items()]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print tables and optionally write JSON."""
    given = command(__name__, __doc__, file=None).parse_args(argv)
    rows, why = overview(), reasons()
    head = ["call", "batch", "way", "dense layer", "all run", "some run", "nobody runs", "one decision", "reads"]
    print(
        markdown(
            head, [[str(value) for value in (r["call"], r["batch"], r["way"], *list(r.values())[3:])] for r in rows]
        )
    )
    print(
        markdown(
            ["policy", "batch", "operator", "launches", "what for"],
            [[kv, str(batch), f"`{name}`", f"{n:+d}", reason] for kv, batch, name, n, reason in why],
            (0, 2, 4),
        )
    )
    if given.file is not None:
        save_json(given.file, {"overview": rows, "reasons": why, "made_by": provenance()})
