"""Where a lossless answer ends, what it is drawn from, and who may ask for it; its laws are in test_lossless_laws."""

import itertools
import threading
from typing import Any

import pytest
import torch
from families import LAYERS, build, inputs, processor
from scipy.stats import chisquare
from tiny_models import PATTERNS
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList, TextIteratorStreamer

import skipit
from skipit.router import Drafts, FixedUnits, InputError, RouterConfig, RouterConfigError, Trace, attach, running

ROW = [5, "image", 6, 7, 6, 7]
NEW = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1}


def gated(pattern: str = "gates", **settings: Any) -> Any:
    model = build("llava")
    attach(model, RouterConfig(**settings))
    if pattern != "open":
        PATTERNS[pattern](model)
    return model


def dense(**settings: Any) -> Tensor:
    return build("llava").generate(**inputs("llava", [ROW]), **{**NEW, **settings})


def answered(model: Any, **settings: Any) -> tuple[Tensor, Drafts]:
    """The whole sequence, lossless, and what was drafted."""
    return skipit.generate(model, lossless=True, return_trace=True, **inputs("llava", [ROW]), **{**NEW, **settings})


EVERY_PATTERN = pytest.mark.parametrize("pattern", ["gates", "open", "all"])


@EVERY_PATTERN
class TestEnds:
    """An answer ends where the dense model's does, wherever that is among the drafted tokens."""

    def test_at_its_longest(self, pattern: str) -> None:
        model = gated(pattern)
        for longest in range(1, 10):
            made, _ = answered(model, max_new_tokens=longest)
            assert torch.equal(made, dense(max_new_tokens=longest))

    def test_at_a_token(self, pattern: str) -> None:
        model, whole = gated(pattern), dense()
        prompt = whole.shape[1] - NEW["max_new_tokens"]
        for place in range(prompt, whole.shape[1]):
            made, _ = answered(model, eos_token_id=int(whole[0, place]))
            assert torch.equal(made, whole[:, : place + 1])

    def test_where_a_caller_wants(self, pattern: str) -> None:
        model, whole = gated(pattern), dense()
        prompt = whole.shape[1] - NEW["max_new_tokens"]
        for place in range(prompt, whole.shape[1]):

            def ended(ids: Tensor, _: Any, token: Tensor = whole[0, place]) -> Tensor:
                return (ids[:, prompt:] == token).any(1)

            made, _ = answered(model, stopping_criteria=StoppingCriteriaList([ended]))
            assert torch.equal(made, whole[:, : place + 1])


@pytest.mark.parametrize("settings", [{"repetition_penalty": 5.0}, {"min_new_tokens": 8}, {"no_repeat_ngram_size": 2}])
def test_rules_for_words_hold_for_drafts(settings: dict[str, Any]) -> None:
    eos = int(dense()[0, -9])
    made, _ = answered(gated("open"), eos_token_id=eos, **settings)
    assert torch.equal(made, dense(eos_token_id=eos, **settings))


@torch.no_grad()
def test_samples_have_the_dense_models_distribution() -> None:
    """Answers of a word and an end, of which some drafts are accepted and some are not."""
    model, batch, draws, (word, eos) = gated(), inputs("llava", [[5, 6, 7, 8]]), 250, (21, 33)
    settings = {"do_sample": True, "temperature": 4.0, "eos_token_id": eos, "max_new_tokens": 4, "draft_tokens": 2}
    words, lengths = torch.tensor([[word] * 4]), [0] * 5  # of words, before an end or without
    ids = torch.cat([batch["input_ids"], words], dim=1)
    logits = build("llava")(input_ids=ids).logits[0, -5:-1, [word, eos]] / 4.0
    goes_on = [1.0, *logits.softmax(-1)[:, 0].cumprod(0).tolist()]
    expected = [draws * (p - q) for p, q in itertools.pairwise([*goes_on, 0.0])]
    torch.manual_seed(0)
    with running(drafts=(total := Drafts())):
        for _ in range(draws):
            made = model.generate(**batch, **settings, lossless=True, prefix_allowed_tokens_fn=lambda *_: [word, eos])
            lengths[int((made[0] == word).sum())] += 1
    assert 0.1 < total.acceptance < 0.9
    assert min(expected) > 5
    assert chisquare(lengths, expected).pvalue > 0.01


def test_a_streamer_gets_the_answer() -> None:
    model, words = gated("open"), processor("llava").tokenizer
    streamer, made = TextIteratorStreamer(words, skip_prompt=True, timeout=60), []
    ask = {**inputs("llava", [ROW]), **NEW, "lossless": True, "streamer": streamer}
    thread = threading.Thread(target=lambda generate: made.append(generate(**ask)), args=(model.generate,))
    thread.start()
    said = "".join(streamer)
    thread.join()
    assert torch.equal(made[0], dense())
    assert said == words.decode(made[0][0, inputs("llava", [ROW])["input_ids"].shape[1] :])


def test_who_asks_how() -> None:
    """A call, a server's settings, and `running` around it; each draft at a budget of its own."""
    model, counts = gated(operating_points={"0.5": 0.0, "none": 1e9}), {}
    for budget in (0.5, "none"):
        made, counts[budget] = answered(model, draft_budget=budget, draft_tokens=2)
        assert torch.equal(made, dense())
        settings = GenerationConfig(**NEW, lossless=True, draft_budget=budget, draft_tokens=2)
        batch = inputs("llava", [ROW])
        assert skipit.generate(model, **batch, generation_config=settings, return_trace=True)[1] == counts[budget]
        with running(budget=budget):
            assert answered(model, draft_tokens=2)[1] == counts[budget]
    assert counts[0.5] != counts["none"]


def test_one_more_is_drafted_than_was_accepted() -> None:
    right = answered(gated("open"), max_new_tokens=1 + 6 + 7 + 8)[1]
    assert right == Drafts(drafted=5 + 6 + 7, accepted=5 + 6 + 7, verifications=3)
    with running(policy=FixedUnits(torch.zeros(LAYERS, 2, dtype=torch.bool))):
        made, wrong = answered(gated("open"), max_new_tokens=1 + 6)
    assert torch.equal(made, dense(max_new_tokens=1 + 6))
    assert wrong == Drafts(drafted=5 + 1 + 1 + 1 + 1, accepted=0, verifications=6)  # the last token needs no draft


def test_only_drafts_are_traced() -> None:
    trace = Trace()
    with running(trace=trace):
        _, drafts = answered(gated())
    assert len(trace.steps) == drafts.drafted
    assert all(step.real.shape == (1, 1) for step in trace.steps)


def test_in_bf16_verified_tokens_are_the_likeliest_ones_of_the_pass_that_verified_them() -> None:
    model = gated().to(torch.bfloat16)
    batch = {name: v.bfloat16() if v.is_floating_point() else v for name, v in inputs("llava", [ROW]).items()}
    made = model.generate(
        **batch, **NEW, lossless=True, return_dict_in_generate=True, output_scores=True
    )  # scores are those of the dense passes
    chosen = torch.stack(made.scores).argmax(-1).flatten()
    assert torch.equal(made.sequences[0, -len(chosen) :], chosen)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"draft_tokens": 0}, "`draft_tokens`: got 0, expected a number of tokens, at least 1"),
    ({"budget": 0.5}, r"`lossless`: got budget=0.5, expected None.*at `draft_budget`"),
    ({"num_beams": 2}, "`lossless`: got num_beams=2, expected 1.*Leave out `num_beams`, or `lossless`"),
    ({"num_return_sequences": 2, "do_sample": True}, "`lossless`: got num_return_sequences=2, expected 1"),
    ({"use_cache": False}, "`lossless`: got use_cache=False, expected True"),
    ({"guidance_scale": 2.0}, "`lossless`: got guidance_scale=2.0"),
    ({"prompt_lookup_num_tokens": 2}, "`lossless`: got prompt_lookup_num_tokens=2, expected None"),
    ({"cache_implementation": "static"}, "`lossless`: got cache_implementation='static', expected None"),
    ({"past_key_values": DynamicCache()}, "`lossless`: got past_key_values=.*, expected None"),
    ({"assistant_ensemble_weight": 0.5}, "`lossless`: got assistant_ensemble_weight=0.5, expected None"),
    ({"budget_per": "input"}, "`lossless`: got budget_per='input'.*Use budget_per='data'"),
    (
        {"do_sample": True, "stopping_criteria": StoppingCriteriaList([lambda ids, _: ids[:, 0] < 0])},
        "`lossless`: with `do_sample`, drafts could run past.*do_sample=False",
    ),
]


@pytest.mark.parametrize(
    ("settings", "message"), REFUSED, ids=lambda case: "+".join(case) if isinstance(case, dict) else ""
)
def test_what_cannot_be_drafted_for(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        answered(gated(), **settings)


def test_more_that_is_refused() -> None:
    model, batch = gated(operating_points={"0.5": 0.0}), inputs("llava", [ROW])
    with pytest.raises(InputError, match=r"`lossless`: got 2 rows.*one row at a time, or leave out `lossless`"):
        model.generate(**inputs("llava", [ROW, ROW]), **NEW, lossless=True)
    with pytest.raises(InputError, match="`draft_budget`: nothing is drafted without `lossless=True`"):
        model.generate(**batch, **NEW, draft_budget=0.5)
    with pytest.raises(RouterConfigError, match=r"`budget`: got '0.3', this router is calibrated for: 0.5"):
        answered(model, draft_budget=0.3)
    with pytest.raises(InputError, match=r"got inputs_embeds='Tensor', expected None"):
        model.generate(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), **NEW, lossless=True)


def test_other_assistants_are_as_before() -> None:
    """With gates that are not asked to draft, transformers' own assisted generation."""
    model, batch = gated(), inputs("llava", [ROW])
    plain = model.generate(**batch, **NEW)
    assert torch.equal(model.generate(**batch, **NEW, prompt_lookup_num_tokens=2), plain)
    assert torch.equal(model.generate(**batch, **NEW, assistant_model=build("llava", seed=1)), plain)
