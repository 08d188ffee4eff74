"""Recorded layers: what lies in their memory is what a call has given, whoever else has used it before.

On a CPU a recording is its function, run again on the same memory; that CUDA's graphs replay it is for
`scripts/bench_gpu` to show.
"""

import copy
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from families import FAMILIES as EVERY_FAMILY
from families import ROWS, inputs
from test_engine_laws import gated
from tiny_models import FAMILIES, PATTERNS, same
from torch import nn

import skipit
from skipit.router import Gated, find_router, gated_layers, running
from skipit.router import recorded as recorded_module
from skipit.router.recorded import Recordings
from studies.counts import counting

KV = pytest.mark.parametrize("kv", ["retain", "evict"])
ONE_ROW = [["image", 41, 42, 43, 44, 45]]
TEN = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}


@pytest.fixture
def short_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values outgrow their memory within an answer."""
    monkeypatch.setattr(recorded_module, "SLOTS", 4)
    monkeypatch.setattr(recorded_module, "SPARE", 2)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often functions were replayed, by name."""
    found: Counter[str] = Counter()
    own = Recordings._replay

    def replay(self: Recordings, known: Any, key: Any, *args: Any) -> Any:
        found[key[0].__name__] += 1
        return own(self, known, key, *args)

    monkeypatch.setattr(Recordings, "_replay", replay)
    return found


def pair(family: str, **settings: Any) -> tuple[Any, Any]:
    """The same model twice, the second one recorded."""
    plain, recorded = gated(family, **settings), gated(family, **settings)
    skipit.compile(recorded, backend="cudagraphs")
    return plain, recorded


def check(plain: Any, recorded: Any, batch: Any, times: int = 3, **options: Any) -> None:
    """Both answer alike, and have the same logits on the way, every time."""
    for _ in range(times):
        with running(**options):
            one, two = (
                model.generate(**batch, **TEN, return_dict_in_generate=True, output_logits=True)
                for model in (plain, recorded)
            )
        assert torch.equal(one.sequences, two.sequences)
        assert all(same(b, a) for a, b in zip(one.logits, two.logits, strict=True))
        del one, two  # and with them the caches


def policy(pattern: str, *models: Any) -> Any:
    """That of a pattern, for each of the models."""
    if pattern == "everyone":
        return Gated(-1e9)
    first, *_ = [PATTERNS[pattern](model) for model in models]  # which also sets the gates of each
    return first


@KV
@pytest.mark.parametrize("rows", [ONE_ROW, ROWS], ids=["one row", "rows"])
@pytest.mark.parametrize("pattern", ["everyone", "gates", "tokens", "units"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers(family: str, pattern: str, rows: Any, kv: str, short_rooms: None, replays: Counter[str]) -> None:
    plain, recorded = pair(family, kv=kv)
    check(plain, recorded, inputs(family, rows), route="whole", policy=policy(pattern, plain, recorded))
    assert replays["_step"] > 0
    assert replays["_first"] + replays["_evicting"] > 0


@pytest.mark.slow
@KV
@pytest.mark.parametrize("rows", [ONE_ROW, ROWS], ids=["one row", "rows"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family(family: str, rows: Any, kv: str, short_rooms: None) -> None:
    for pattern in ("everyone", "gates", "tokens", "units"):
        plain, recorded = pair(family, kv=kv)
        check(plain, recorded, inputs(family, rows), policy=policy(pattern, plain, recorded))


@KV
def test_a_capacity_and_thresholds_per_row(kv: str, replays: Counter[str]) -> None:
    plain, recorded = (gated("llava", kv=kv) for _ in range(2))
    skipit.compile(plain, backend="eager", capacity=0.5)
    skipit.compile(recorded, backend="cudagraphs", capacity=0.5)
    check(plain, recorded, inputs("llava", ROWS), budget=0.6, budget_per="input")
    assert replays["_step"] > 0


class TestMemory:
    """It belongs to one cache at a time, and whoever else needs it goes without."""

    @KV
    @torch.no_grad()
    def test_two_caches_in_turn(self, kv: str, replays: Counter[str]) -> None:
        plain, recorded = pair("llava", kv=kv)
        given = [inputs("llava", [["image", *range(40, 45 + more)]]) for more in range(2)]
        outputs: list[list[Any]] = [[model(**batch, use_cache=True) for batch in given] for model in (plain, recorded)]
        for token in range(5):
            before = replays["_step"]
            for number in range(2):
                ids = torch.tensor([[41 + token + number]])
                for model, held in zip((plain, recorded), outputs, strict=True):
                    held[number] = model(input_ids=ids, past_key_values=held[number].past_key_values)
                assert same(outputs[1][number].logits, outputs[0][number].logits)
            assert replays["_step"] > before  # the first one's

    @KV
    def test_it_is_free_again(self, kv: str, replays: Counter[str]) -> None:
        _, recorded = pair("llava", kv=kv)
        batch = inputs("llava", ONE_ROW)
        for _ in range(3):
            before = replays["_step"]
            recorded.generate(**batch, **TEN)
            assert replays["_step"] > before
        assert all(len(known.memory) == 1 for known in self._known(recorded) if known.memory)

    @KV
    def test_what_was_outgrown_gives_way(self, kv: str, short_rooms: None) -> None:
        """One memory per layer, at most twice as large as the longest answer needs, whatever came before it."""
        plain, recorded = pair("llava", kv=kv)
        batch = inputs("llava", ONE_ROW)
        for new in (4, 20, 4):
            how = {**TEN, "max_new_tokens": new, "min_new_tokens": new}
            assert torch.equal(recorded.generate(**batch, **how), plain.generate(**batch, **how))
        held = batch["input_ids"].shape[1] + 20 + recorded_module.SLOTS + recorded_module.SPARE
        for known in self._known(recorded):
            assert [memory.slots < 2 * held for memory in known.memory.values()] in ([], [True])

    @KV
    @torch.no_grad()
    def test_it_is_bounded_whatever_sizes_come(
        self, kv: str, short_rooms: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Caches of more batch sizes, and prompts of more lengths, than are kept."""
        monkeypatch.setattr(recorded_module, "MEMORIES", 2)
        monkeypatch.setattr(recorded_module, "MOST", 3)
        plain, recorded = pair("llava", kv=kv)

        def ask(rows: int, more: int) -> None:
            batch = inputs("llava", [["image", *range(40, 43 + more)]] * rows)
            for _ in range(3):
                assert torch.equal(recorded.generate(**batch, **TEN), plain.generate(**batch, **TEN))

        sizes = [(rows, 0) for rows in (1, 2, 3, 4)] + [(1, more) for more in range(6)]
        held = []
        for rows, more in sizes:
            ask(rows, more)
            _, router = find_router(recorded)
            held.append(len(router.compiling.recordings._shared))
            for known in self._known(recorded):
                assert len(known.memory) <= 2
                assert len(known.recordings) <= 3
                assert all(len(memory.recordings) <= 3 for memory in known.memory.values())
        assert max(held[-3:]) <= max(held[:-3])

    @KV
    @torch.no_grad()
    def test_a_copy_of_a_cache_goes_its_own_way(self, kv: str) -> None:
        plain, recorded = pair("llava", kv=kv)
        batch, found = inputs("llava", ONE_ROW), []
        for model in (plain, recorded):
            cache = model(**batch, use_cache=True).past_key_values
            model(input_ids=torch.tensor([[41]]), past_key_values=cache)
            other = copy.deepcopy(cache)
            shallow = copy.copy(cache.layers[-1])
            logits = [
                model(input_ids=torch.tensor([[token]]), past_key_values=one).logits
                for token, one in ((42, cache), (43, other), (44, cache), (45, other))
            ]
            found.append((torch.stack(logits), shallow.keys.clone()))
        assert same(found[1][0], found[0][0])
        assert same(found[1][1], found[0][1])

    @KV
    def test_tokens_that_are_forgotten(self, kv: str, replays: Counter[str]) -> None:
        plain, recorded = pair("llava", kv=kv)
        batch = inputs("llava", ONE_ROW)
        for options in ({"lossless": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
            for _ in range(2):
                one, two = (model.generate(**batch, **TEN, **options) for model in (plain, recorded))
                assert torch.equal(one, two), options
        assert replays["_step"] > 0

    @staticmethod
    def _known(model: Any) -> list[Any]:
        return list(find_router(model)[1].compiling.recordings._layers.values())  # type: ignore[union-attr]


class TestChanges:
    """What changes a layer after it was recorded is noticed."""

    def check(self, change: Any) -> None:
        plain, recorded = pair("llava")
        batch, options = inputs("llava", ONE_ROW), {"policy": Gated(-1e9)}
        check(plain, recorded, batch, **options)
        before = recorded.generate(**batch, **TEN, return_dict_in_generate=True, output_logits=True).logits[-1]
        for model in (plain, recorded):
            for layer in gated_layers(model):
                change(layer)
        check(plain, recorded, batch, **options)
        after = recorded.generate(**batch, **TEN, return_dict_in_generate=True, output_logits=True).logits[-1]
        assert not same(after, before)

    def test_weights_in_place(self) -> None:
        self.check(lambda layer: layer.mlp.up_proj.weight.data.mul_(-1))

    def test_other_weights(self) -> None:
        def change(layer: Any) -> None:
            layer.mlp.up_proj.weight = nn.Parameter(-layer.mlp.up_proj.weight.detach())

        self.check(change)

    def test_another_module(self) -> None:
        def change(layer: Any) -> None:
            layer.mlp.act_fn = nn.Identity()

        self.check(change)

    def test_a_hook(self) -> None:
        self.check(lambda layer: layer.mlp.register_forward_hook(lambda module, given, output: -output))

    def test_training_and_gradients(self, replays: Counter[str]) -> None:
        _, recorded = pair("llava")
        batch = inputs("llava", ONE_ROW)
        recorded.train()(**batch)
        recorded(**batch).logits.sum().backward()
        recorded.eval()(**batch)
        assert not replays


def test_a_copy_of_the_model_records_anew() -> None:
    plain, recorded = pair("llava")
    batch, options = inputs("llava", ONE_ROW), {"policy": Gated(-1e9)}
    check(plain, recorded, batch, **options)
    another = copy.deepcopy(recorded)
    for model in (plain, another):
        for layer in gated_layers(model):
            layer.mlp.up_proj.weight.data.mul_(-1)
    check(plain, another, batch, **options)
    assert find_router(another)[1].compiling.recordings is not find_router(recorded)[1].compiling.recordings


def test_what_torch_compile_makes_is_recorded(replays: Counter[str]) -> None:
    torch.compiler.reset()
    plain, recorded = (gated("llava") for _ in range(2))
    skipit.compile(recorded, mode="reduce-overhead", backend="eager")
    check(plain, recorded, inputs("llava", ONE_ROW), policy=policy("tokens", plain, recorded), route="whole")
    assert replays["_step"] > 0
    assert sum(replays.values()) > replays["_step"] + replays["_keep"]


def test_within_inference_mode_and_without() -> None:
    plain, recorded = pair("llava")
    batch = inputs("llava", ONE_ROW)
    for _ in range(2):
        with torch.inference_mode():
            check(plain, recorded, batch, times=1)
        check(plain, recorded, batch, times=2)


def test_threads() -> None:
    plain, recorded = pair("llava")
    batches = [inputs("llava", [["image", *range(40, 44 + more)]]) for more in range(3)]
    expected, found = [plain.generate(**batch, **TEN) for batch in batches], [[] for _ in batches]

    def answer(number: int) -> None:
        for _ in range(4):
            found[number].append(recorded.generate(**batches[number], **TEN))

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[number]) for number, every in enumerate(found) for one in every)


@KV
@torch.no_grad()
def test_a_recorded_function_asks_the_device_for_nothing(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could not be captured."""
    _, recorded = pair("llava", kv=kv)
    asked: list[int] = []
    own = recorded_module._Recording.__call__

    def call(self: Any) -> Any:
        with counting(recorded) as counts:
            output = own(self)
        asked.append(counts.waited())
        return output

    monkeypatch.setattr(recorded_module._Recording, "__call__", call)
    batch = inputs("llava", ROWS)
    for _ in range(2):
        recorded.generate(**batch, **TEN)
    assert asked
    assert not any(asked)
