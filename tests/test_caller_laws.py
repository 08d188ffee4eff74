"""Laws of who calls: own loops, threads, pipelines, assistants and trainers get what `generate` and `backward` give.

A caller's way to a model says nothing about what it answers or learns. So each way is tried with open gates, against
the same way with the dense model, and with gates that skip about half, gathered against masked against `generate`.
"""

import copy
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, build, inputs, processor, text
from PIL import Image
from tiny_models import FAMILIES, PATTERNS, same
from torch import Tensor
from transformers import DynamicCache, TextIteratorStreamer, Trainer, TrainerCallback, TrainingArguments, pipeline

from skipit.router import (
    FixedUnits,
    InputError,
    RouterConfig,
    SkipCache,
    Trace,
    UnsupportedModelError,
    attach,
    gated_layers,
    running,
)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
ONE_FAMILY_FAST = pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])]
)
EVERY_POLICY = pytest.mark.parametrize("kv", ["retain", "evict"])
# Settings by which a prompt decides as a whole; the threshold of the second's default point is of no matter.
BY_PROMPT: list[dict[str, Any]] = [
    {"granularity": "sequence"},
    {"budget_per": "input", "operating_points": {"0.8": 0.0}},
]
ROW = [5, "image", 6, 7, 6, 7]
STEPS = 6
NEW = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
Batch = dict[str, Tensor]
Caller = Callable[[Any, str, Batch], Tensor]


def gated(family: str, kv: str, pattern: str = "gates", **settings: Any) -> Any:
    model = build(family)
    attach(model, RouterConfig(kv=kv, **settings))  # type: ignore[arg-type]
    if pattern != "open":
        PATTERNS[pattern](model)
    return model


@torch.no_grad()
def decode(model: Any, batch: Batch, cache: Any, tokens: Tensor, steps: int = STEPS) -> Tensor:
    """Greedy decoding by hand; `tokens` are those of the prompt and after it, of which the cache has all but the last.

    Args:
        model: any.
        batch: the prompt, whose pixels belong to the first call.
        cache: None runs everything again at each step.
        tokens: so far.
        steps: how many more.
    """
    suppressed = model.generation_config.suppress_tokens
    for _ in range(steps):
        held = 0 if cache is None else cache.get_seq_length()
        more = {"input_ids": tokens[:, held:], "use_cache": cache is not None}
        if held == 0:  # later on, Qwen's own code takes the mask of all tokens for this call's
            more["attention_mask"] = torch.ones_like(tokens)
        for name, value in batch.items() if held == 0 else ():
            if name not in more:
                grown = name.endswith("token_type_ids")
                more[name] = torch.nn.functional.pad(value, (0, tokens.shape[1] - value.shape[1])) if grown else value
        logits = model(**more, past_key_values=cache).logits[:, -1].clone()
        logits[:, suppressed] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


def own_cache(model: Any, family: str, batch: Batch) -> Tensor:
    return decode(model, batch, DynamicCache(), batch["input_ids"])


def own_cache_with_layers(model: Any, family: str, batch: Batch) -> Tensor:
    return decode(model, batch, DynamicCache(config=model.config.get_text_config()), batch["input_ids"])


def no_cache(model: Any, family: str, batch: Batch) -> Tensor:
    return decode(model, batch, None, batch["input_ids"])


def tree_of_drafts(model: Any, family: str, batch: Batch) -> Tensor:
    """Drafts that are thrown away: on a deep copy, on a shallow copy of the layers, and cropped from the cache."""
    cache = DynamicCache()
    tokens = decode(model, batch, cache, batch["input_ids"], 2)
    wrong = torch.cat([tokens, tokens[:, -3:]], dim=1)
    decode(model, batch, copy.deepcopy(cache), wrong, 2)
    shallow = copy.copy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    decode(model, batch, shallow, wrong, 3)
    held = cache.get_seq_length()
    decode(model, batch, cache, wrong, 2)
    cache.crop(held - cache.get_seq_length())
    return decode(model, batch, cache, tokens, STEPS - 2)


def expanded_batch(model: Any, family: str, batch: Batch) -> Tensor:
    """The rows of a cache are repeated, and one of them goes on."""
    cache = DynamicCache()
    tokens = decode(model, batch, cache, batch["input_ids"], 2)
    cache.batch_repeat_interleave(3)
    tokens = decode(model, batch, cache, tokens.repeat_interleave(3, dim=0), 2)
    cache.batch_select_indices(torch.tensor([1]))
    return decode(model, batch, cache, tokens[1:2], STEPS - 4)


def generate(model: Any, family: str, batch: Batch, **more: Any) -> Tensor:
    return model.generate(**batch, **NEW, **more)


def streamer_thread(model: Any, family: str, batch: Batch) -> Tensor:
    tokenizer = processor(family).tokenizer
    streamer, made = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60), []
    generated = model.generate

    def run(**kwargs: Any) -> None:
        made.append(generated(**kwargs))

    thread = threading.Thread(target=run, kwargs={**batch, **NEW, "streamer": streamer})
    thread.start()
    words = "".join(streamer)
    thread.join()
    assert words == tokenizer.decode(made[0][0, batch["input_ids"].shape[1] :])
    return made[0]


def own_cache_of_generate(model: Any, family: str, batch: Batch) -> Tensor:
    cache = DynamicCache()
    made = generate(model, family, batch, past_key_values=cache)
    assert cache.get_seq_length() == made.shape[1] - 1
    return made


def prompt_lookup(model: Any, family: str, batch: Batch) -> Tensor:
    return generate(model, family, batch, prompt_lookup_num_tokens=2, max_matching_ngram_size=1)


def assistant(model: Any, family: str, batch: Batch) -> Tensor:
    return generate(model, family, batch, assistant_model=build(family, seed=1))


def gated_assistant(model: Any, family: str, batch: Batch) -> Tensor:
    helper = build(family, seed=1)
    attach(helper)
    PATTERNS["gates"](helper)
    return generate(model, family, batch, assistant_model=helper)


def chunked_prefill(model: Any, family: str, batch: Batch) -> Tensor:
    return generate(model, family, batch, prefill_chunk_size=4)


def base_model_and_head(model: Any, family: str, batch: Batch) -> Tensor:
    """The model inside, called directly."""
    tokens = batch["input_ids"]
    for _ in range(STEPS):
        grown = {
            name: torch.nn.functional.pad(value, (0, tokens.shape[1] - value.shape[1]))
            for name, value in batch.items()
            if name.endswith("token_type_ids")
        }
        words = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.no_grad():
            logits = model.lm_head(model.model(**{**batch, **words, **grown}).last_hidden_state[:, -1])
        logits[:, model.generation_config.suppress_tokens] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


CALLERS = (
    *(own_cache, own_cache_with_layers, no_cache, tree_of_drafts, expanded_batch, own_cache_of_generate),
    *(streamer_thread, prompt_lookup, assistant, gated_assistant, chunked_prefill, base_model_and_head),
)


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)
@EVERY_FAMILY
@EVERY_POLICY
class TestGenerating:
    """Whoever decodes, and however, gets the same tokens."""

    def test_open_gates_are_the_dense_model(self, family: str, kv: str, caller: Caller) -> None:
        batch = inputs(family, [ROW])
        base = caller(build(family), family, batch)
        assert torch.equal(caller(gated(family, kv, "open"), family, batch), base)

    def test_gathered_is_masked_is_generate(self, family: str, kv: str, caller: Caller) -> None:
        model, batch = gated(family, kv), inputs(family, [ROW])
        plain = generate(model, family, batch)
        assert not torch.equal(plain, generate(build(family), family, batch))
        assert torch.equal(caller(model, family, batch), plain)
        with running(mode="masked"):
            assert torch.equal(caller(model, family, batch), plain)


@EVERY_FAMILY
@EVERY_POLICY
def test_pipeline(family: str, kv: str) -> None:
    prompt, image = text(family, ROW), Image.new("RGB", (16, 16), (200, 30, 90))

    def answer(model: Any) -> str:
        ask = pipeline("image-text-to-text", model=model, processor=processor(family))
        made = ask(images=image, text=prompt, generate_kwargs=NEW, return_full_text=False)
        return made[0]["generated_text"]

    model = gated(family, kv)
    plain = answer(model)
    with running(mode="masked"):
        assert answer(model) == plain
    dense = answer(build(family))
    assert dense != plain
    assert answer(gated(family, kv, "open")) == dense
    with running(mode="dense"):
        assert answer(model) == dense


@EVERY_POLICY
def test_two_models_of_one_class_take_turns(kv: str) -> None:
    """Each with its own gates, cache and loop."""
    models = [gated("llava", kv), gated("llava", kv, "open")]
    batch = inputs("llava", [ROW])
    wanted = [generate(model, "llava", batch) for model in models]
    assert not torch.equal(*wanted)
    tokens, caches = [batch["input_ids"]] * 2, [DynamicCache(), DynamicCache()]
    for _ in range(STEPS):
        tokens = [decode(m, batch, c, t, 1) for m, c, t in zip(models, caches, tokens, strict=True)]
    assert all(map(torch.equal, tokens, wanted))


class TestCaches:
    """A caller's cache is filled, or refused by name."""

    @EVERY_POLICY
    def test_a_turn_on_a_cache_of_the_dense_model(self, kv: str) -> None:
        """The prompt by the dense model, the answer by the gated one, and the other way round."""
        model, batch = gated("llava", kv), inputs("llava", [ROW])
        cache = DynamicCache()
        with running(mode="dense"):
            tokens = decode(model, batch, cache, batch["input_ids"], 1)
            assert type(cache) is DynamicCache
        gathered, masked = copy.deepcopy(cache), copy.deepcopy(cache)
        wanted = decode(model, batch, gathered, tokens, 4)
        assert isinstance(gathered, SkipCache)
        with running(mode="masked"):
            assert torch.equal(decode(model, batch, masked, tokens, 4), wanted)
        with running(mode="dense"):
            if kv == "retain":
                decode(model, batch, gathered, wanted, 1)
            else:
                message = r"a gated run with kv='evict' has left keys out of this cache.*Start from an empty cache"
                with pytest.raises(UnsupportedModelError, match=message):
                    decode(model, batch, gathered, wanted, 1)

    def test_the_cache_of_another_model(self) -> None:
        message = "`past_key_values`: got the cache of a model of 3 layers, this one has 4"
        with pytest.raises(UnsupportedModelError, match=message):
            gated("llava", "evict")(**inputs("llava", [ROW]), past_key_values=SkipCache(3))


def training_batch(family: str) -> Batch:
    batch = inputs(family, [ROW, [10, 11, "image", 12, 13, 14, 15]], "right")
    batch["labels"] = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), -100)
    batch["labels"][:, :-3] = -100
    return batch


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_step(model: Any, batch: Batch, **call: Any) -> dict[str, Tensor]:
    """Gradients of the model's own loss, by hand."""
    model.zero_grad()
    model(**batch, **call).loss.backward()
    return gradients(model)


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    gates = [name for name in wanted if "layer_gate" in name]
    assert len(gates) == 2 * 4
    assert all(wanted[name].any() for name in gates if name.endswith("weight"))
    close = [torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-6) for name in wanted]
    return found.keys() == wanted.keys() and all(close)


@EVERY_POLICY
class TestTraining:
    """The same loss means the same gradient, whoever asks for it."""

    @EVERY_FAMILY
    @pytest.mark.parametrize("granularity", ["token", "sequence"])
    def test_cache_and_checkpointing_change_no_gradient(self, family: str, kv: str, granularity: str) -> None:
        model, batch = gated(family, kv, granularity=granularity).train(), training_batch(family)
        with running(prompt=batch["labels"] == -100):
            wanted = own_step(model, batch, use_cache=False)
            assert agree(own_step(model, batch, use_cache=True), wanted)
            assert agree(own_step(model, batch, past_key_values=DynamicCache()), wanted)
            for reentrant in (False, True):
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                for use_cache in (False, True):
                    assert agree(own_step(model, batch, use_cache=use_cache), wanted)
                model.gradient_checkpointing_disable()

    @ONE_FAMILY_FAST
    def test_plain_trainer(self, family: str, kv: str, tmp_path: Path) -> None:
        batch = training_batch(family)
        wanted = own_step(gated(family, kv).train(), batch)

        class Seen(TrainerCallback):
            found: dict[str, Tensor]

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                self.found = gradients(kwargs["model"])

        for checkpointing in (None, False, True):
            seen = Seen()
            settings = TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=2,
                max_steps=1,
                max_grad_norm=0,
                gradient_checkpointing=checkpointing is not None,
                gradient_checkpointing_kwargs=None if checkpointing is None else {"use_reentrant": checkpointing},
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=True,
            )
            trainer = Trainer(gated(family, kv), settings, lambda rows: batch, train_dataset=[{}, {}], callbacks=[seen])
            trainer.train()
            assert agree(seen.found, wanted)

    @pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
    def test_trl(self, kv: str, tmp_path: Path) -> None:
        from trl import SFTConfig, SFTTrainer

        batch = training_batch("llava")
        wanted, found = own_step(gated("llava", kv).train(), batch), {}

        class Seen(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                found.update(gradients(kwargs["model"]))

        settings = SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=1,
            max_grad_norm=0,
            gradient_checkpointing=False,
            report_to=[],
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=True,
            bf16=False,
        )
        SFTTrainer(
            gated("llava", kv),
            settings,
            data_collator=lambda rows: batch,
            train_dataset=[{}, {}],
            processing_class=processor("llava"),
            callbacks=[Seen()],
        ).train()
        assert agree(found, wanted)

    def test_probabilities_have_their_gradient_or_are_refused(self, kv: str) -> None:
        model, batch = gated("llava", kv).train(), training_batch("llava")
        found = []
        for reentrant in (None, False, True):
            if reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.zero_grad()
            trace = Trace()
            with running(trace=trace):
                model(**batch)
            trace.steps[0].probability.sum().backward()
            found.append(gradients(model))
        assert agree(found[1], found[0])
        assert agree(found[2], found[0])

    def test_gates_alone_under_reentrant_checkpointing(self, kv: str) -> None:
        model, batch = gated("llava", kv).train(), training_batch("llava")
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        for layer in gated_layers(model):
            layer.layer_gate.requires_grad_(True)
        wanted = own_step(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        assert agree(own_step(model, batch), wanted)

    @pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
    def test_a_model_in_eval_mode_does_not_learn_without_a_word(self, kv: str, unit: str) -> None:
        model, batch = gated("llava", kv, unit=unit), training_batch("llava")
        with pytest.raises(InputError, match=r"gates get no gradient where only the tokens that run are computed"):
            model(**batch).loss.backward()
        wanted = own_step(model.train(), batch)
        with running(mode="masked"):
            assert agree(own_step(model.eval(), batch), wanted)

    def test_a_prompt_in_pieces(self, kv: str) -> None:
        """Two calls with a cache have the gradient of one, or say that they do not."""
        model, batch = gated("llava", kv).train(), training_batch("llava")
        keys = ("input_ids", "attention_mask")
        first = {**batch, **{name: batch[name][:, :-3] for name in keys}}
        first.pop("labels")
        last = {"input_ids": batch["input_ids"][:, -3:], "attention_mask": batch["attention_mask"]}

        def loss(*logits: Tensor) -> Tensor:
            return logits[-1][:, -3:].square().mean()

        model.zero_grad()
        loss(model(**{name: value for name, value in batch.items() if name != "labels"}).logits).backward()
        wanted = gradients(model)
        model.zero_grad()
        cache = model(**first).past_key_values
        if kv == "evict":
            with pytest.raises(UnsupportedModelError, match="cannot learn through keys that an earlier call"):
                model(**last, past_key_values=cache)
            with torch.no_grad():
                cache = model(**first).past_key_values
            loss(model(**last, past_key_values=cache).logits).backward()
        else:
            loss(model(**last, past_key_values=cache).logits).backward()
            assert agree(gradients(model), wanted)

    @pytest.mark.parametrize("settings", BY_PROMPT, ids=min)
    def test_labels_do_not_decide(self, kv: str, settings: dict[str, Any]) -> None:
        model, batch = gated("llava", kv, **settings).train(), training_batch("llava")
        with pytest.raises(InputError, match=r"running\(prompt=labels == -100\)"):
            model(**batch)


@ONE_FAMILY_FAST
@EVERY_POLICY
@pytest.mark.parametrize("settings", BY_PROMPT, ids=min)
def test_what_prompts_decide_is_decided_by_whole_ones_or_refused(
    family: str, kv: str, settings: dict[str, Any]
) -> None:
    model, batch = gated(family, kv, **settings), inputs(family, [ROW])
    name, value = next(iter(settings.items()))
    plain = generate(model, family, batch)
    for caller in (own_cache, streamer_thread, prompt_lookup, assistant, own_cache_of_generate):
        assert torch.equal(caller(model, family, batch), plain), caller.__name__
        with running(mode="masked"):
            assert torch.equal(caller(model, family, batch), plain), caller.__name__
    assert torch.equal(generate(model, family, batch, use_cache=False), plain)
    with pytest.raises(InputError, match=f"`{name}`: '{value}' decides by the whole prompt"):
        chunked_prefill(model, family, batch)
    other = torch.full((1, 30), 9)  # a longer prompt than the row's
    for guidance in ({}, {"negative_prompt_ids": other}):
        with pytest.raises(InputError, match=f"`{name}`.*or guidance"):
            generate(model, family, batch, guidance_scale=2.0, **guidance)
    cache = DynamicCache()
    tokens = decode(model, batch, cache, batch["input_ids"], 1)
    more = torch.cat([tokens, tokens[:, -3:]], dim=1)
    with pytest.raises(InputError, match="got 4 tokens of one after"):
        decode(model, batch, cache, more, 1)
    with (
        running(prompt=torch.ones(1, 4, dtype=torch.bool)),
        pytest.raises(InputError, match="got 4 tokens of one after"),
    ):
        decode(model, batch, cache, more, 1)


@EVERY_POLICY
def test_same_gradient_with_lora(kv: str) -> None:
    """Of an adapter on queries alone, whose layer's keys have no gradient: what backward reads is not written over."""
    from peft import LoraConfig, get_peft_model

    model, batch = gated("llava", kv), training_batch("llava")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    labels = batch.pop("labels")
    logits = tuned(**batch).logits
    logits[labels != -100].square().mean().backward()
    wanted = gradients(tuned)
    tuned.zero_grad()
    cache = DynamicCache()
    parts = tuned(**batch, past_key_values=cache).logits
    ids = torch.tensor([[9, 9]] * 2)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids)], dim=1)
    with running(mode="dense") if kv == "retain" else torch.no_grad():
        tuned(input_ids=ids, attention_mask=mask, past_key_values=cache)
    parts[labels != -100].square().mean().backward()
    found = gradients(tuned)
    assert all(same(found[name], wanted[name]) for name in wanted)


@torch.no_grad()
def test_another_adapter_goes_on_with_what_the_first_one_has_cached() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = build("llava")
    attach(model, RouterConfig(kv="retain"))
    tuned = get_peft_model(model, config, adapter_name="first").eval()
    tuned.add_adapter("second", config)
    nobody, everyone = (FixedUnits(torch.full((LAYERS, 2), run)) for run in (False, True))
    found = []
    for mode in ("masked", "gathered"):
        tuned.set_adapter("first")
        with running(policy=nobody, mode=mode):
            cache = tuned(**inputs("llava", [["image", 40, 41]]), use_cache=True).past_key_values
        tuned.set_adapter("second")
        with running(policy=everyone, mode=mode):
            found.append(tuned(input_ids=torch.tensor([[42]]), past_key_values=cache).logits)
    assert same(*found)
