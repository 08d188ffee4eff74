"""Stages two and three: LoRA on the decoder learns to answer.

First from what an ideal tower would say, so that it needs no trained one and may run beside the first stage; then from
what the tower does say. The tower does not go on: a page a step is noise to it, and it read less of other fonts.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from skipit.train.reference.documents.data import Document, draw_document, questions_of
from skipit.train.reference.documents.layouts import KINDS
from skipit.train.reference.documents.model import IMAGE_TOKEN, IMAGE_TOKENS
from skipit.train.reference.documents.questions import TASKS, Task
from skipit.train.reference.documents.words import WORDS, Face, Split, Words

from ..state import load_state, save_state
from .fonts import OWN
from .targets import Alphabet
from .tower import Log, Reader, batch, in_turn, rate, strained

SAVE_EVERY, MEASURE_EVERY = 10, 100  # steps
HELD_OUT = 24  # pages on whose questions answers are measured
MISREAD = 0.03  # of the tokens


@dataclass(frozen=True)
class Packed:
    """A page's text: one prompt, and after it every question with its answer, blind to the others.

    Attributes:
        ids: [1, seq].
        positions: [1, seq], of which every question's begin where the prompt ends.
        mask: [1, 1, seq, seq], added to the scores: 0 where a token may look.
        answers: places that predict a token of an answer, [answer tokens].
        questions: which question each of these belongs to.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    answers: Tensor
    questions: Tensor

    def to(self, device: torch.device) -> "Packed":
        """The same on a device."""
        return Packed(*(getattr(self, each.name).to(device) for each in fields(self)))


def pack(tokenizer: Any, questions: Sequence[tuple[str, str]]) -> Packed:
    """Pack questions and answers about one page, as the chat template writes each alone."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids = tokens("<|im_start|>user\n" + IMAGE_TOKEN * IMAGE_TOKENS + "\n")
    start = len(ids)
    segments, positions = [0] * start, list(range(start))
    answers: list[int] = []
    numbers: list[int] = []
    for number, (question, answer) in enumerate(questions, start=1):
        asked, said = tokens(f"{question}<|im_end|>\n<|im_start|>assistant\n"), tokens(f"{answer}<|im_end|>")
        answers += range(len(ids) + len(asked) - 1, len(ids) + len(asked) + len(said) - 1)
        numbers += [number] * len(said)
        ids += asked + said
        segments += [number] * (len(asked) + len(said))
        positions += range(start, start + len(asked) + len(said))
    segment = torch.tensor(segments)
    sees = (segment[:, None] == segment) | (segment == 0)
    mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(~(sees & torch.ones_like(sees).tril()), -1e4)
    return Packed(torch.tensor([ids]), torch.tensor([positions]), mask, torch.tensor(answers), torch.tensor(numbers))


def answer_logits(model: Any, packed: Packed, said: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the answers, [answer tokens, vocabulary], and the tokens that are right there.

    Args:
        model: the LLaVA.
        packed: the page's text.
        said: what the decoder is given of the page, [1, `IMAGE_TOKENS`, width].
    """
    embeddings = model.get_input_embeddings()(packed.ids)
    image = (packed.ids == model.config.image_token_id)[..., None]
    out = model(
        inputs_embeds=embeddings.masked_scatter(image, said.to(embeddings.dtype)),
        attention_mask=packed.mask,
        position_ids=packed.positions,
        logits_to_keep=packed.answers,
        use_cache=False,
    )
    return out.logits[0].float(), packed.ids[0, packed.answers + 1]


def drawn(
    split: Split, rng: np.random.Generator, words: Words | None = None, among: Sequence[Face] = ()
) -> tuple[Document, list[tuple[Task, str, str]]]:
    """A page with two questions of every task that it can be asked, but one to read it: task, question, answer.

    Args:
        split: whose layouts and styles it has, and words and fonts unless others are given.
        rng: draws all of it.
        words: to be written.
        among: faces, as in `FONTS`.
    """
    document = draw_document(split, KINDS[rng.integers(len(KINDS))], rng, words, among)
    return document, [*questions_of(document, split, rng), *questions_of(document, split, rng, TASKS[:-1])]


@torch.no_grad()
def right(
    model: Any, reader: Reader, processor: Any, alphabet: Alphabet, split: Split, pages: int, ideal: bool
) -> dict[str, float]:
    """Share of answers that are right to the token, per task, under teacher forcing."""
    hits: dict[Task, list[float]] = {}
    for number in range(pages):
        document, asked = drawn(split, np.random.default_rng([8, number]))
        packed = pack(processor.tokenizer, [(question, answer) for _, question, answer in asked]).to(model.device)
        pixels, tokens, _ = (part.to(model.device) for part in batch([document.page], alphabet, processor))
        with torch.autocast(model.device.type, torch.bfloat16):
            logits, wanted = answer_logits(model, packed, reader.table[tokens] if ideal else reader(pixels)[0])
        hit = logits.argmax(-1) == wanted
        for place, (task, _, _) in enumerate(asked, start=1):
            hits.setdefault(task, []).append(float(hit[packed.questions == place].all()))
    return {task: round(float(np.mean(values)), 3) for task, values in sorted(hits.items())}


def more_words(alphabet: Alphabet, rng: np.random.Generator) -> Words:
    """The training split's word lists, each with as many frequent words that are on no list."""
    frequent = [word for word in alphabet.words if word not in set(alphabet.listed)]
    lists = {each.name: getattr(WORDS["train"], each.name) for each in fields(Words)}
    return Words(**{name: (*own, *rng.permutation(frequent)[: len(own)]) for name, own in lists.items()})


class AnswerSteps(Dataset[list[tuple[Packed, Tensor, Tensor]]]):
    """What each step of the later stages sees, by its number alone: per page its questions, pixels and tokens.

    Args:
        alphabet: what the tower says.
        processor: the model's.
        size: pages of a step.
        seed: another one gives other pages.
        among: faces that pages are written with, as in `FONTS`.
    """

    def __init__(self, alphabet: Alphabet, processor: Any, size: int, seed: int, among: Sequence[Face]) -> None:
        self.alphabet, self.processor, self.size, self.seed, self.among = alphabet, processor, size, seed, among

    def __getitem__(self, step: int) -> list[tuple[Packed, Tensor, Tensor]]:
        rng, pages = np.random.default_rng([self.seed, step]), []
        for _ in range(self.size):
            document, asked = drawn("train", rng, more_words(self.alphabet, rng), self.among)
            packed = pack(self.processor.tokenizer, [(question, answer) for _, question, answer in asked])
            # Strained, so that the decoder learns what a tower says that does not read all of a page.
            pixels, tokens, _ = batch([strained(document.page, rng)], self.alphabet, self.processor)
            pages.append((packed, pixels, tokens))
        return pages


def misread(tokens: Tensor, written: int, step: int) -> Tensor:
    """Tokens of which a few are others, as a tower that is good and not perfect would say them.

    Args:
        tokens: indices in the alphabet.
        written: the alphabet's size.
        step: by which they are drawn.
    """
    random = torch.Generator().manual_seed(step)
    wrong = torch.rand(tokens.shape, generator=random) < MISREAD
    return torch.where(wrong & (tokens > 1), torch.randint(2, written, tokens.shape, generator=random), tokens)


def train_answers(
    model: Any,
    processor: Any,
    folder: Path,
    steps: int,
    ideal: bool,
    size: int = 2,
    workers: int = 0,
    log: Log = print,
    among: Sequence[Face] = OWN,
) -> Any:
    """Train LoRA up to a step, going on from `folder`; all else is frozen.

    Args:
        model: the LLaVA, with LoRA (`add_lora`); it is changed and returned.
        processor: the model's.
        folder: the checkpoint and the log.
        steps: in all, those of earlier sittings included.
        ideal: give the decoder what an ideal tower would say; otherwise the tower's own words.
        size: pages of a step, each with about thirteen questions.
        workers: processes that draw pages ahead.
        log: receives a line now and then.
        among: faces that pages are written with, as in `FONTS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet, device = Alphabet(processor.tokenizer), model.device
    model.set_attn_implementation("eager")  # on a CPU half of the time that the backward pass of sdpa takes
    model.requires_grad_(False)
    lora = [p for name, p in model.named_parameters() if ".lora_" in name]
    reader = Reader(model, alphabet.tokens).to(device)
    for parameter in lora:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(lora, weight_decay=0.0)
    done, started = load_state(folder, {"model": model}, optimizer), time.time()
    peak, running = (1e-3 if ideal else 5e-4), 0.0
    drawn_steps = AnswerSteps(alphabet, processor, size, 2 if ideal else 3, among)
    for step, pages in enumerate(in_turn(drawn_steps, done, steps, workers), start=done):
        total = 0.0
        optimizer.zero_grad()
        for page in pages:
            packed, pixels = (part.to(device) for part in page[:2])
            with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
                given = misread(page[2], len(alphabet.tokens), step).to(device)
                said = reader.table[given] if ideal else reader(pixels)[0]
            with torch.autocast(device.type, torch.bfloat16):
                logits, wanted = answer_logits(model, packed, said)
            # A long answer counts more than a short one, but not in proportion to its length.
            weight = torch.bincount(packed.questions)[packed.questions].float().rsqrt()
            answer = (F.cross_entropy(logits, wanted, reduction="none") * weight).sum() / weight.sum()
            (answer / size).backward()
            total += answer.item() / size
        nn.utils.clip_grad_norm_(lora, 1.0)
        optimizer.param_groups[0]["lr"] = rate(step, peak, warmup=20, flat=1000 if ideal else 50)
        optimizer.step()
        running = total if step == done else 0.95 * running + 0.05 * total
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            pace = (time.time() - started) / (step + 1 - done)
            log(f"{folder.name} {step + 1}/{steps} loss {running:.3f} {pace:.1f} s/step")
            save_state(folder, step + 1, {"model": model}, optimizer)
        if (step + 1) % MEASURE_EVERY == 0 or step + 1 == steps:
            held_out = right(model, reader, processor, alphabet, "calibration", HELD_OUT, ideal)
            record = json.dumps({"step": step + 1, "loss": round(running, 4), **held_out})
            log(record)
            with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(record + "\n")
    return model.eval()
