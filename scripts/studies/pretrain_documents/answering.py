"""Stages two and three: LoRA on the decoder learns to answer.

First from what an ideal tower would say, so that it needs no trained one and may run beside the first stage; then from
what the tower does say. The tower goes on only where it is told to: a page a step was noise to it, and it read less of
other fonts.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

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
from .sitting import Sitting
from .targets import Alphabet
from .tower import Log, Reader, batch, in_turn, seen, strained

LOG_EVERY, MEASURE_EVERY = 10, 100  # steps
HELD_OUT = 24  # pages on whose questions answers are measured
MISREAD = 0.03  # of the tokens
MULTIPLE = 64  # tokens of a batch of texts, so that few lengths arise
AGAIN: tuple[Task, ...] = (*TASKS[:-1], "compare", "sum", "yesno")  # asked of a page beside one of every task


class Packed(NamedTuple):
    """Texts of pages: each one prompt, and after it every question with its answer, blind to the others.

    Attributes:
        ids: [pages, seq]; shorter ones are padded.
        positions: [pages, seq], of which every question's begin where the prompt ends.
        segments: [pages, seq]: the number of the question, from 1 over all pages; 0 for the prompt, -1 for padding.
        answers: places that predict a token of an answer, [answer tokens], counted over pages and sequence.
        questions: which question each of these belongs to.
        weights: what each counts. A long answer counts more than a short one, but not in proportion to its length.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    answers: Tensor
    questions: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "Packed":
        """The same on a device."""
        return Packed(*(part.to(device, non_blocking=True) for part in self))

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, [pages, 1, seq, seq]: 0 where a token may look, at the prompt and its own."""
        rows, columns = self.segments[:, None, :, None], self.segments[:, None, None, :]
        sees = ((rows == columns) | (columns == 0)).tril()
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, -1e4)


def pack(tokenizer: Any, pages: Sequence[Sequence[tuple[str, str]]]) -> Packed:
    """Pack questions and answers about pages, as the chat template writes each alone."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = tokens("<|im_start|>user\n" + IMAGE_TOKEN * IMAGE_TOKENS + "\n")
    start = len(prompt)
    ids = [[*prompt] for _ in pages]
    positions, segments = [[*range(start)] for _ in pages], [[0] * start for _ in pages]
    answers: list[tuple[int, int]] = []  # page and place
    questions: list[int] = []
    weights: list[float] = []
    every = [(page, *each) for page, of_page in enumerate(pages) for each in of_page]
    for number, (page, question, answer) in enumerate(every, start=1):
        asked, said = tokens(f"{question}<|im_end|>\n<|im_start|>assistant\n"), tokens(f"{answer}<|im_end|>")
        first, length = len(ids[page]) + len(asked) - 1, len(asked) + len(said)
        answers += [(page, place) for place in range(first, first + len(said))]
        questions += [number] * len(said)
        weights += [len(said) ** -0.5] * len(said)
        ids[page] += asked + said
        segments[page] += [number] * length
        positions[page] += range(start, start + length)
    width = MULTIPLE * math.ceil(max(map(len, ids)) / MULTIPLE)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    return Packed(
        padded(ids, tokenizer.pad_token_id),
        padded(positions, 0),
        padded(segments, -1),
        torch.tensor([page * width + place for page, place in answers]),
        torch.tensor(questions),
        torch.tensor(weights),
    )


def answer_logits(model: Any, packed: Packed, said: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the answers, [answer tokens, vocabulary], and the tokens that are right there.

    Args:
        model: the LLaVA.
        packed: the pages' texts.
        said: what the decoder is given of the pages, [pages, `IMAGE_TOKENS`, width].
    """
    from peft.helpers import disable_input_dtype_casting

    embeddings = model.get_input_embeddings()(packed.ids)
    image = (packed.ids == model.config.image_token_id)[..., None]
    with disable_input_dtype_casting(model):  # LoRA's inputs would be copied to fp32, for autocast to copy them back
        states = model.model(
            inputs_embeds=embeddings.masked_scatter(image, said.to(embeddings.dtype)),
            attention_mask=packed.mask(embeddings.dtype),
            position_ids=packed.positions,
            use_cache=False,
        ).last_hidden_state
    return model.lm_head(states.flatten(0, 1)[packed.answers]).float(), packed.ids.flatten()[packed.answers + 1]


def answer_loss(logits: Tensor, wanted: Tensor, packed: Packed) -> Tensor:
    """Cross-entropy of the answers' tokens, weighted over all pages."""
    return (F.cross_entropy(logits, wanted, reduction="none") * packed.weights).sum() / packed.weights.sum()


def drawn(
    split: Split, rng: np.random.Generator, words: Words | None = None, among: Sequence[Face] = ()
) -> tuple[Document, list[tuple[Task, str, str]]]:
    """A page with questions of every task that it can be asked: task, question, answer.

    Two of each, three of what is answered worst, and one to read it, for which there is one way to ask.

    Args:
        split: whose layouts and styles it has, and words and fonts unless others are given.
        rng: draws all of it.
        words: to be written.
        among: faces, as in `FONTS`.
    """
    document = draw_document(split, KINDS[rng.integers(len(KINDS))], rng, words, among)
    return document, [*questions_of(document, split, rng), *questions_of(document, split, rng, AGAIN)]


class Asked(NamedTuple):
    """Pages with their questions, as they travel: text, pixels as bytes, and index in the alphabet per image token."""

    packed: Packed
    pixels: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> "Asked":
        """The same on a device."""
        return Asked(self.packed.to(device), *(part.to(device, non_blocking=True) for part in self[1:]))


@torch.no_grad()
def right(model: Any, reader: Reader, asked: Sequence[tuple[list[Task], Asked]], ideal: bool) -> dict[str, float]:
    """Share of answers that are right to the token, per task, under teacher forcing.

    Args:
        model: the LLaVA.
        reader: its tower.
        asked: pages, and the task of every question about them.
        ideal: give the decoder what an ideal tower would say.
    """
    hits: dict[Task, list[float]] = {}
    for tasks, pages in asked:
        packed, pixels, tokens = pages.to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            logits, wanted = answer_logits(model, packed, reader.table[tokens] if ideal else reader(seen(pixels))[0])
        hit, questions = (logits.argmax(-1) == wanted).cpu(), pages.packed.questions
        for number, task in enumerate(tasks, start=1):
            hits.setdefault(task, []).append(float(hit[questions == number].all()))
    return {task: round(float(np.mean(values)), 3) for task, values in sorted(hits.items())}


def held_out(alphabet: Alphabet, processor: Any, split: Split, size: int) -> list[tuple[list[Task], Asked]]:
    """Pages on whose questions answers are measured, `size` at a time, and the tasks of these."""
    found = []
    for first in range(0, HELD_OUT, size):
        numbers = range(first, min(first + size, HELD_OUT))
        documents, questions = zip(*(drawn(split, np.random.default_rng([8, n])) for n in numbers), strict=True)
        packed = pack(processor.tokenizer, [[(question, answer) for _, question, answer in page] for page in questions])
        pixels, tokens, _ = batch([document.page for document in documents], alphabet, processor)
        found.append(([task for page in questions for task, _, _ in page], Asked(packed, pixels, tokens)))
    return found


def more_words(alphabet: Alphabet, rng: np.random.Generator) -> Words:
    """The training split's word lists, each with as many frequent words that are on no list."""
    frequent = alphabet.unlisted
    lists = {each.name: getattr(WORDS["train"], each.name) for each in fields(Words)}
    some = {name: rng.permutation(len(frequent))[: len(own)] for name, own in lists.items()}
    return Words(**{name: (*own, *(frequent[i] for i in some[name])) for name, own in lists.items()})


class AnswerSteps(Dataset[Asked]):
    """What each step of the later stages sees, by its number alone.

    Args:
        alphabet: what the tower says.
        processor: the model's.
        size: pages of a step.
        seed: another one gives other pages.
        among: faces that pages are written with, as in `FONTS`.
    """

    def __init__(self, alphabet: Alphabet, processor: Any, size: int, seed: int, among: Sequence[Face]) -> None:
        self.alphabet, self.processor, self.size, self.seed, self.among = alphabet, processor, size, seed, among

    def __getitem__(self, step: int) -> Asked:
        rng, pages, questions = np.random.default_rng([self.seed, step]), [], []
        for _ in range(self.size):
            document, asked = drawn("train", rng, more_words(self.alphabet, rng), self.among)
            questions.append([(question, answer) for _, question, answer in asked])
            # Strained, so that the decoder learns what a tower says that does not read all of a page.
            pages.append(strained(document.page, rng))
        pixels, tokens, _ = batch(pages, self.alphabet, self.processor)
        return Asked(pack(self.processor.tokenizer, questions), pixels, tokens)


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
    deadline: float = math.inf,
    cooldown: bool = False,
    peak: float = 1e-3,
    tower_peak: float = 0.0,
) -> Any:
    """Train LoRA up to a step, going on from `folder`; all else is frozen.

    Args:
        model: the LLaVA, with LoRA (`add_lora`); it is changed and returned.
        processor: the model's.
        folder: the checkpoint and the log.
        steps: in all, those of earlier sittings included.
        ideal: give the decoder what an ideal tower would say; otherwise the tower's own words.
        size: pages of a step, each with about seventeen questions.
        workers: processes that draw pages ahead.
        log: receives a line now and then.
        among: faces that pages are written with, as in `FONTS`.
        deadline: when it stops before, by `time.monotonic()`.
        cooldown: let the rate fall to zero towards the end.
        peak: LoRA's highest rate.
        tower_peak: that of tower and projector, which go on to learn what the page says, too; 0 freezes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet, device = Alphabet(processor.tokenizer), model.device
    model.model.language_model.set_attn_implementation("sdpa")  # keeps no scores of a batch; the tower has no attention
    model.requires_grad_(False)
    reader = Reader(model, alphabet.tokens).to(device)
    groups = [([p for name, p in model.named_parameters() if ".lora_" in name], peak)]
    if tower_peak:
        groups.append(([*reader.tower.parameters(), *reader.projector.parameters()], tower_peak))
    for parameters, _ in groups:
        for parameter in parameters:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters, _ in groups], weight_decay=0.0)
    done, sitting = load_state(folder, {"model": model}, optimizer), Sitting(steps, deadline, cooldown)
    if sitting.over(done):
        return model.eval()
    drawn_steps = AnswerSteps(alphabet, processor, size, 2 if ideal else 3, among)
    pages = in_turn(drawn_steps, done, steps, workers, device)
    measured = held_out(alphabet, processor, "calibration", size)
    running = torch.zeros((), device=device)
    for step, (packed, pixels, tokens) in enumerate(pages, start=done):
        if ideal:
            tokens = misread(tokens, len(alphabet.tokens), step)
        packed, pixels, tokens = Asked(packed, pixels, tokens).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.set_grad_enabled(tower_peak > 0):
                said = reader.table[tokens] if ideal else reader(seen(pixels))[0]
            logits, wanted = answer_logits(model, packed, said)
        answer = answer_loss(logits, wanted, packed)
        optimizer.zero_grad()
        (answer + reader.spoken(said, tokens) if tower_peak else answer).backward()
        for group, (parameters, highest) in zip(optimizer.param_groups, groups, strict=True):
            nn.utils.clip_grad_norm_(parameters, 1.0)
            group["lr"] = sitting.rate(step, highest, warmup=20, flat=1000 if ideal else 50)
        optimizer.step()
        # Stays on the device: to read a number there waits for the step.
        running = answer.detach() if step == done else 0.95 * running + 0.05 * answer.detach()
        last = sitting.over(step + 1)
        if (step + 1) % LOG_EVERY == 0 or last:
            pace = (time.monotonic() - sitting.began) / (step + 1 - done)
            log(f"{folder.name} {step + 1}/{steps} loss {running.item():.3f} {pace:.2f} s/step")
        if sitting.due() or last:
            save_state(folder, step + 1, {"model": model}, optimizer)
        if (step + 1) % MEASURE_EVERY == 0 or last:
            share = right(model, reader, measured, ideal)
            record = json.dumps({"step": step + 1, "loss": round(running.item(), 4), **share})
            log(record)
            with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(record + "\n")
        if last:
            break
    return model.eval()
