"""A token's modality comes from the inputs and the model's configuration."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, IMAGE, build, inputs

from skipit.router import InputError, Trace, attach, running, token_modality
from skipit.router.modality import vision_token_ids


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image_token_id": 7}, [7]),
        ({"image_token_index": 7, "video_token_index": 3}, [3, 7]),
        ({"image_token_id": 7, "image_token_index": 7, "video_token_id": None}, [7]),
        ({"image_token_id": -1, "video_token_id": "x"}, []),
        ({}, []),
    ],
)
def test_placeholders(values: dict[str, object], expected: list[int]) -> None:
    assert vision_token_ids(SimpleNamespace(**values)) == expected


CONFIG = SimpleNamespace(image_token_id=7, video_token_id=8)
IDS = torch.tensor([[1, 7, 7, 2], [8, 3, 7, 7]])


def test_from_ids() -> None:
    assert token_modality(CONFIG, IDS).tolist() == [[0, 1, 1, 0], [1, 0, 1, 1]]
    assert token_modality(SimpleNamespace(), IDS).tolist() == [[0] * 4] * 2


def test_types_win_when_they_cover_the_call() -> None:
    types = torch.tensor([[0, 1, 2, 0], [0, 0, 0, 0]])
    assert token_modality(CONFIG, IDS, types).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    assert token_modality(CONFIG, None, types, 4).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    # In decoding the types of the whole sequence come along.
    assert token_modality(CONFIG, IDS[:, -1:], types, 1).tolist() == [[0], [1]]


def test_nothing_to_tell_from() -> None:
    message = r"cannot tell text from vision tokens: got `inputs_embeds` without `input_ids` or `mm_token_type_ids`"
    with pytest.raises(InputError, match=message):
        token_modality(CONFIG, None)
    model = build("llava")
    attach(model)
    embeds = torch.zeros(1, 3, 32)
    with pytest.raises(InputError, match=message):
        model(inputs_embeds=embeds)
    with pytest.raises(InputError, match=r"a gated model needs `input_ids` or `inputs_embeds`; got neither"):
        model(attention_mask=torch.ones(1, 3))
    # Dense execution asks for nothing.
    with running(mode="dense"):
        model(inputs_embeds=embeds)


def test_embeddings_with_types() -> None:
    model = build("llava")
    attach(model)
    trace = Trace()
    with running(trace=trace):
        model(inputs_embeds=torch.randn(1, 3, 32), mm_token_type_ids=torch.tensor([[0, 1, 1]]))
    assert trace.steps[0].modality.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_in_a_model(family: str, padding: str) -> None:
    model, batch = build(family), inputs(family, [[5, "image", 6], [7]], padding)
    attach(model)
    trace = Trace()
    with running(trace=trace), torch.no_grad():
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    prefill, *decode = trace.steps
    assert torch.equal(prefill.modality, (batch["input_ids"] == IMAGE).long())
    assert torch.equal(prefill.real, batch["attention_mask"].bool())
    assert [step.past for step in trace.steps] == [0, prefill.real.shape[1], prefill.real.shape[1] + 1]
    assert all(step.modality.tolist() == [[0], [0]] and step.real.all() for step in decode)
