"""Labels are the answer and the token that ends its turn, as a model would write them after the prompt."""

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, processor
from families.family import picture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from skipit.router import InputError
from skipit.theory.labels import IGNORE
from skipit.train.data.collate import Collator
from skipit.train.reference.data import reference_dataset
from studies.architecture import build_processor

Turns = list[dict[str, Any]]


def row(prompt: Any = "t5 t6", completion: Any = "t7 t8", images: int = 1) -> dict[str, Any]:
    return {"images": [picture(n, 0) for n in range(images)], "prompt": prompt, "completion": completion}


def with_template(family: str, old: str, new: str) -> Any:
    """The family's processor with another chat template."""
    made = copy.deepcopy(processor(family))
    assert old in made.chat_template
    made.chat_template = made.chat_template.replace(old, new)
    return made


def labelled(processor: Any, *rows: dict[str, Any]) -> list[str]:
    """The text of the labels of each row."""
    labels = Collator(processor)(list(rows))["labels"]
    return [processor.tokenizer.decode(one[one != IGNORE]) for one in labels]


def say(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_its_answer_after_the_very_prompt(family: str) -> None:
    made, rows = processor(family), [row(), row("t9", "t10", 2), row("t9 t5 t6", "t11 t12 t13")]
    assert labelled(made, *rows) == ["t7 t8 </s>", "t10 </s>", "t11 t12 t13 </s>"]
    batch, prompts = Collator(made)(rows), Collator(made, with_completion=False)(rows)
    for number in range(3):
        prompt = prompts["input_ids"][number][prompts["attention_mask"][number].bool()]
        ids, labels = (batch[name][number][batch["attention_mask"][number].bool()] for name in ("input_ids", "labels"))
        if not FAMILIES[family].prefix_lm:  # of which the processor puts a line break between prompt and answer
            assert torch.equal(ids[: len(prompt)], prompt)
            assert labels[: len(prompt)].eq(IGNORE).all()
            assert torch.equal(labels[len(prompt) :], ids[len(prompt) :])


def test_the_reference_learns_what_it_was_made_with() -> None:
    made, rows = build_processor(), list(reference_dataset("train", 60))
    batch, prompts = Collator(made)(rows), Collator(made, with_completion=False)(rows)
    place = torch.arange(batch["input_ids"].shape[1])
    inside = (place >= prompts["attention_mask"].sum(-1)[:, None]) & batch["attention_mask"].bool()
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(~inside, IGNORE))


def spaced(byte_level: bool) -> Any:
    """A processor whose generation prompt ends in a space, which its BPE tokenizer joins to an answer's first word."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Metaspace()
    made.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", "<image>"], show_progress=False
    )
    made.train_from_iterator(["USER: is it a cat? ASSISTANT: yes", "ASSISTANT: two three", "é 7\n\n"] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": 8, "width": 8}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor("llava")
        .chat_template.replace("ASSISTANT :'", "ASSISTANT: '")
        .replace("ASSISTANT : '", "ASSISTANT: '"),
    )


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("answer", ["yes", "two three", " yes", "two\n\nthree", "7", "é"])
def test_a_token_that_reaches_into_the_prompt_is_the_answers(byte_level: bool, answer: str) -> None:
    (found,) = labelled(spaced(byte_level), row("is it a cat?", answer))
    assert found.lstrip() == answer.lstrip() + "</s>"


END = "{{ ' ' if message['role'] == 'user' else eos_token }}"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("{{ eos_token }}\n", "t7 t8 </s>"),
        ("<|end|>\n{{ eos_token }}", "t7 t8 <|end|>"),
        (" ", "t7 t8"),
        ("{{ ' : ' }}\n", "t7 t8 :"),
    ],
)
def test_nothing_after_the_end_of_a_turn(end: str, expected: str) -> None:
    made = with_template("llava", END, end)
    made.tokenizer.add_tokens("<|end|>", special_tokens=True)
    assert labelled(made, row(), row("t9", "t7 t8 ")) == [expected] * 2


def test_a_line_break_after_a_turn_is_no_label() -> None:
    """As Qwen's template has it, and many others."""
    made = spaced(byte_level=True)
    made.chat_template = made.chat_template.replace(END, "{{ eos_token }}\n")
    batch = Collator(made)([row("is it a cat?", "yes")])
    assert batch["input_ids"][0, -1] != made.tokenizer.eos_token_id, "the line break is a token"
    assert made.tokenizer.decode(batch["labels"][0][batch["labels"][0] != IGNORE]).strip() == "yes</s>"


def test_every_answer_of_a_completion_and_nothing_that_is_asked() -> None:
    turns = [say("assistant", "t7"), say("user", "t9"), say("assistant", [{"type": "text", "text": "t7 t10"}])]
    for family in ("llava", "qwen2.5-vl", "gemma3"):
        assert labelled(processor(family), row(completion=turns)) == ["t7 </s> t7 t10 </s>"]
    made = with_template("llava", END, "{{ ' ' }}")
    assert labelled(made, row(completion=turns)) == ["t7 t7 t10"]
    with pytest.raises(InputError, match=r"^row 0 of the batch: `completion` has no message of the assistant"):
        labelled(processor("llava"), row(completion=[say("user", "t9")]))


def test_a_template_that_spaces_its_own_turns_in_another_way() -> None:
    """LLaVA-OneVision's: what is trained begins with the very prompt that generation gets."""
    made = spaced(byte_level=True)
    made.chat_template = made.chat_template.replace("else 'ASSISTANT: '", "else 'ASSISTANT: \n'")
    made.chat_template = made.chat_template.replace("{{ 'ASSISTANT: ' }}", "{{ 'ASSISTANT:\n' }}")
    batch, prompt = (Collator(made, with_completion=asked)([row("is it?", "two")]) for asked in (True, False))
    text = made.tokenizer.decode(prompt["input_ids"][0])
    assert made.tokenizer.decode(batch["input_ids"][0]) == f"{text}two</s>"
    assert text.endswith(":\n")
    assert labelled(made, row("is it?", "two"))[0].strip() == "two</s>"


class TestThoughts:
    """A generation prompt that opens one."""

    opened = "ASSISTANT : < cat > "

    def test_an_answer_without_it_is_refused(self) -> None:
        made = with_template("llava", "{{ 'ASSISTANT :' }}", f"{{{{ '{self.opened}' }}}}")
        for answer in ("t7", "t7 t8"):
            with pytest.raises(InputError, match=r"row 0 of the batch: .* answer after .*< cat > ', but writes this"):
                labelled(made, row(completion=answer))

    def test_an_answer_with_it_is_learned(self) -> None:
        made = with_template("llava", "{{ 'ASSISTANT :' }}", f"{{{{ '{self.opened}' }}}}")
        assert labelled(made, row(completion="< cat > t7 < t8")) == ["t7 < t8 </s>"]

    def test_one_that_the_template_closes_is_learned(self) -> None:
        """As Qwen3's: nothing was thought."""
        made = with_template("llava", "{{ 'ASSISTANT :' }}", f"{{{{ '{self.opened}' }}}}")
        said = f"else '{self.opened} < dog > ' }}}}"
        made.chat_template = made.chat_template.replace("else 'ASSISTANT : ' }}", said)
        assert labelled(made, row(completion="t7")) == ["< dog > t7 </s>"]


def test_an_answer_that_holds_special_tokens() -> None:
    made = copy.deepcopy(processor("llava"))
    made.tokenizer.add_tokens(["<box>", "</box>"], special_tokens=True)
    assert labelled(made, row(completion="<box>t7</box>")) == ["<box> t7 </box> </s>"]
    assert labelled(made, row(completion="t7</s>")) == ["t7 </s>"], "a second end is written by no model"
    with pytest.raises(InputError, match=r"^row 0 of the batch: its answer goes on after '</s>', which ends a turn"):
        labelled(made, row(completion="t7</s> t8"))


def test_an_answer_without_a_token() -> None:
    assert labelled(processor("llava"), row(completion="")) == ["</s>"]
    made = with_template("llava", END, " ")
    with pytest.raises(InputError, match=r"^row 0 of the batch: its completion has no token to learn"):
        labelled(made, row(completion=""))


def test_a_template_that_drops_the_answer() -> None:
    made = with_template("llava", "{{ message['content'] }}", "{{ message['content'] if message['role'] == 'user' }}")
    with pytest.raises(InputError, match="chat template does not write its completion as it stands"):
        labelled(made, row())


def test_a_tokenizer_without_offsets() -> None:
    class Slow:
        """One in Python alone."""

        is_fast = False

        def __init__(self, fast: Any) -> None:
            self.fast = fast

        def __getattr__(self, name: str) -> Any:
            return getattr(self.fast, name)

        def __call__(self, text: Any, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return self.fast(text, **options)

    class Reader:
        def __init__(self, of: Any) -> None:
            self.of, self.tokenizer, self.image_token = of, Slow(of.tokenizer), of.image_token
            self.apply_chat_template = of.apply_chat_template

        def __call__(self, images: Any, text: Any, **options: Any) -> Any:
            return self.of(images=images, text=text, **options)

    turns = [say("assistant", "t7"), say("user", "t9"), say("assistant", "t7 t10")]
    rows = [row(), row("t9", "t10", 2), row(completion=turns)]
    ours, theirs = Collator(Reader(processor("llava")))(rows), Collator(processor("llava"))(rows)
    assert torch.equal(ours["labels"], theirs["labels"])
    with pytest.raises(InputError, match=r"row 0 of the batch: the tokenizer joins the answer .*Use a fast tokenizer"):
        Collator(Reader(spaced(byte_level=True)))([row("is it a cat?", "yes")])


def test_a_processor_that_writes_more() -> None:
    class Adds:
        def __init__(self, of: Any) -> None:
            self.of, self.tokenizer, self.image_token = of, of.tokenizer, of.image_token
            self.apply_chat_template = of.apply_chat_template

        def __call__(self, images: Any, text: Any, **options: Any) -> Any:
            return self.of(images=images, text=[one + " t9" for one in text], **options)

    with pytest.raises(InputError, match="row 0 of the batch: the processor changes the answer's tokens"):
        Collator(Adds(processor("llava")))([row()])


@pytest.mark.parametrize("template_begins", [True, False])
def test_a_text_begins_as_transformers_own_prompts_do(template_begins: bool) -> None:
    """Once: by the chat template, or else by a tokenizer that begins every text, as LLaVA-1.5's does."""
    made = with_template("llava", "{{ bos_token }}", "{{ bos_token }}" if template_begins else "")
    made.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 1)]
    )
    content = [{"type": "image", "image": picture(0, 0)}, {"type": "text", "text": "t5 t6"}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    theirs = made.apply_chat_template([say("user", content)], **how)["input_ids"]
    assert theirs[0, 0] == 1 != theirs[0, 1]
    assert torch.equal(Collator(made, with_completion=False)([row()])["input_ids"], theirs)
    assert torch.equal(Collator(made)([row()])["input_ids"][:, : theirs.shape[1]], theirs)
    assert labelled(made, row()) == ["t7 t8 </s>"]
