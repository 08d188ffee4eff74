"""`skipit.generate` answers as the model does, and its trace is what ran."""

from typing import Any

import pytest
import torch
from families import LAYERS, ROWS, WIDTH, build, inputs

import skipit
from skipit.eval.measure.traced import ONE_PASS
from skipit.router import InputError, RouterConfig, RouterConfigError, SkipItError, attach, running, set_gates
from skipit.theory.cost import CostModel, trace_compute

NEW_TOKENS = {"max_new_tokens": 5, "do_sample": False}


def gated(kv: str = "retain"):  # type: ignore[no-untyped-def]
    model = build("llava")
    attach(model, RouterConfig(kv=kv, operating_points={"0.5": 0.3}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    set_gates(model, torch.randn(LAYERS, 2, WIDTH, generator=generator), torch.zeros(LAYERS, 2))
    return model


@pytest.mark.parametrize("kv", ["retain", "evict"])
def test_trace(kv: str) -> None:
    model, batch = gated(kv), inputs("llava", ROWS)
    expected = model.generate(**batch, **NEW_TOKENS)
    assert torch.equal(skipit.generate(model, **batch, **NEW_TOKENS), expected)
    output, trace = skipit.generate(model, return_trace=True, **batch, **NEW_TOKENS)
    assert torch.equal(output, expected)
    tokens = output.shape[1] - 1  # the last token is never fed back
    assert trace.run.shape == trace.flops.shape == (LAYERS, len(ROWS), tokens)
    assert torch.equal(trace.real[:, : batch["input_ids"].shape[1]], batch["attention_mask"].bool())
    assert not trace.run[:, ~trace.real].any()
    assert not trace.flops[:, ~trace.real].any()
    assert torch.equal(trace.depth, trace.run.sum(0))
    costs = CostModel.of(model)
    assert trace.share == pytest.approx(float(trace_compute(costs, trace.trace.steps).share))
    assert 0 < trace.share < 1
    # A token that runs a layer costs more there than one that skips it.
    linear = costs.layers[0].linear
    assert (trace.flops[trace.run] >= linear).all()
    assert (trace.flops[~trace.run] < linear).all()


def test_a_budget_is_an_operating_point() -> None:
    model, batch = gated(), inputs("llava", ROWS)
    _, at = skipit.generate(model, return_trace=True, budget=0.5, **batch, **NEW_TOKENS)
    with running(budget="0.5"):
        _, same = skipit.generate(model, return_trace=True, budget="0.5", **batch, **NEW_TOKENS)
    assert torch.equal(at.run, same.run)
    _, default = skipit.generate(model, return_trace=True, **batch, **NEW_TOKENS)
    assert at.share < default.share


def test_errors() -> None:
    model, batch = gated(), inputs("llava", ROWS)
    with pytest.raises(RouterConfigError, match=r"`budget`: got '0.7', this router is calibrated for: 0.5"):
        skipit.generate(model, budget=0.7, **batch)
    with pytest.raises(InputError, match="`return_trace`: beam search moves rows"):
        skipit.generate(model, return_trace=True, num_beams=2, **batch, **NEW_TOKENS)
    with pytest.raises(SkipItError, match="has no gates"):
        skipit.generate(build("llava"), **batch)


ODD = (
    {"return_dict_in_generate": True},
    {"use_cache": False},
    {"output_attentions": True, "output_hidden_states": True, "output_scores": True, "return_dict_in_generate": True},
    {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1},
    {"num_beams": 3, "num_return_sequences": 2},
    {"prefill_chunk_size": 3},
)


@pytest.mark.parametrize("kv", ["retain", "evict"])
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: next(iter(odd)))
def test_a_trace_has_every_token_once_or_is_refused(kv: str, odd: dict[str, Any]) -> None:
    """Whatever the checkpoint's `generation_config` says."""
    model, batch = gated(kv), inputs("llava", [[5, "image", 6, 7, 6, 7]])
    wanted, plain = skipit.generate(model, return_trace=True, **batch, **NEW_TOKENS)
    for name, value in odd.items():
        setattr(model.generation_config, name, value)
    refused = False
    try:
        output, trace = skipit.generate(model, return_trace=True, **batch, **NEW_TOKENS)
    except InputError:
        refused = True
    assert not refused or {"use_cache", "prompt_lookup_num_tokens", "num_beams"} & set(odd)
    if not refused:
        assert torch.equal(output if isinstance(output, torch.Tensor) else output.sequences, wanted)
        assert torch.equal(trace.run, plain.run)
    untraced = skipit.generate(model, **batch, **NEW_TOKENS)
    untraced = untraced if isinstance(untraced, torch.Tensor) else untraced.sequences
    assert torch.equal(untraced, wanted) or "num_beams" in odd
    # What measures asks for one pass itself.
    assert torch.equal(skipit.generate(model, return_trace=True, **batch, **(NEW_TOKENS | ONE_PASS))[1].run, plain.run)


def test_a_trace_counts_no_draft_that_was_thrown_away() -> None:
    """Not even one of the last step, after which nothing comes that would tell."""
    model, batch = gated(), inputs("llava", [[5, 6, 7]])
    for drafts in ({"assistant_model": build("llava", seed=1)}, {"guidance_scale": 2.0}):
        for new in (1, 2, 5):
            settings = {"max_new_tokens": new, "do_sample": False, **drafts}
            try:
                output, trace = skipit.generate(model, return_trace=True, **batch, **settings)
            except InputError as error:
                assert "tokens were run more than once" in str(error)  # noqa: PT017
            else:
                assert trace.run.shape[-1] == output.shape[1] - 1
    with running(mode="dense"), pytest.raises(InputError, match=r"a dense run executes every layer.*records nothing"):
        skipit.generate(model, return_trace=True, **batch, **NEW_TOKENS)
