"""Stage one: the tower and the projector learn to say each image token in the decoder's own input embeddings."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from skipit.train.reference.documents.data import draw_document
from skipit.train.reference.documents.layouts import KINDS, Kind
from skipit.train.reference.documents.page import SIDE, Page, Word, photographed
from skipit.train.reference.documents.words import WORDS, Face, Split, Words, font

from ..state import load_state, save_state
from .fonts import OWN
from .sitting import Sitting
from .targets import Alphabet, letters_of, tokens_of

Log = Callable[[str], None]
LOG_EVERY, MEASURE_EVERY = 25, 200  # steps
HELD_OUT = 24  # pages of a split on which reading is measured
PEAK = 2e-3  # rate
_WEIGHTS = (0.0, 0.0, 0.3, 0.6)  # pixels that strokes are thicker by
LOOSE = 0.6  # share of pages of loose words
_SCALES = (1.0, 1.0, 1.0, 1.2, 1.5)  # of the lines of a page of loose words: titles are larger than the rest
LETTERS = 96  # printable ASCII less the space, and none


def loose_page(alphabet: Alphabet, rng: np.random.Generator, among: Sequence[Face] = OWN) -> Page:
    """A page full of words and numbers of the alphabet without order.

    Five families of fonts are few to learn letters from. So every word has a face, a width, a slant and a weight of its
    own.

    Args:
        alphabet: what may be written.
        rng: draws all of it.
        among: faces, as in `FONTS`.
    """
    from PIL import Image

    paper, ink = (tuple(int(v) for v in rng.integers(*span, 3)) for span in ((225, 256), (0, 70)))
    page, pitch = Page(Image.new("RGB", (SIDE, SIDE), paper)), float(rng.uniform(32, 38))
    baseline = float(rng.uniform(26, 40))
    while baseline < SIDE - 6:
        x, scale = float(rng.uniform(4, 60)), float(rng.choice(_SCALES))
        baseline += pitch * (scale - 1)
        while (x := _draw_word(page, _loose(alphabet, rng), x, baseline, ink, among, scale, rng)) < SIDE - 60:
            x += float(rng.exponential(25)) + 7
        baseline += pitch
    return photographed(page, rng)


def _draw_word(
    page: Page,
    text: str,
    x: float,
    baseline: float,
    ink: Any,
    among: Sequence[Face],
    scale: float,
    rng: np.random.Generator,
) -> float:
    """Draw a word, unless the line has no room for it; returns where it ends."""
    from PIL import Image, ImageDraw

    letters = font(among[int(rng.integers(len(among)))], round(scale * rng.integers(19, 26)))
    edges = np.array([letters.getlength(text[:n]) for n in range(len(text) + 1)]) + 6
    by, slant = float(rng.uniform(0.75, 1.2)) * 19 * scale / letters.size, float(rng.normal(0, 0.12))
    end = x + by * edges[-1]
    if end > SIDE - 8:
        return float(SIDE)
    above, height = round(32 * scale), round(44 * scale)
    mask = Image.new("L", (round(by * edges[-1]) + 14, height))
    drawn = Image.new("L", (round(edges[-1]) + 14, height))
    ImageDraw.Draw(drawn).text(
        (6, above), text, font=letters, fill=255, anchor="ls", stroke_width=_WEIGHTS[rng.integers(4)]
    )
    # Where a place of the mask comes from: narrower or wider, and slanted about the baseline.
    mask = drawn.transform(mask.size, Image.Transform.AFFINE, (1 / by, slant / by, -above * slant / by, 0, 1, 0), 2)
    page.image.paste(ink, (round(x), round(baseline) - above), mask)
    middle = 0.3 * letters.size
    xs = round(x) + by * (edges[1:] + edges[:-1]) / 2 + slant * middle
    page.words.append(Word(text, xs, round(baseline) - middle))
    return end


def _loose(alphabet: Alphabet, rng: np.random.Generator) -> str:
    words = alphabet.words if rng.random() < 0.5 else alphabet.listed
    word, number = words[rng.integers(len(words))], int(10 ** rng.uniform(0, 5))
    forms = (
        word, word, word, word, word, word, f"{word}:", f"{word}.", f"{word},",
        str(number), f"{number}", f"{number / 100:.2f}", f"${number / 100:.2f}", f"{number % 100}%", f"({number % 99})",
        f"{rng.integers(1, 29):02}{'-./'[rng.integers(3)]}{rng.integers(1, 13):02}", f"{rng.integers(0, 24)}:00", "-",
    )  # fmt: skip
    return forms[rng.integers(len(forms))]


def laid_page(split: Split, rng: np.random.Generator, words: Words | None = None, among: Sequence[Face] = ()) -> Page:
    """A document of a split; charts, which take longest to draw, are rarer.

    Args:
        split: whose layouts and styles it has, and words and fonts unless others are given.
        rng: draws all of it.
        words: to be written.
        among: faces, as in `FONTS`.
    """
    kind: Kind = KINDS[min(int(rng.integers(2 * len(KINDS) - 1)) // 2, len(KINDS) - 1)]
    return draw_document(split, kind, rng, words, among).page


def any_words(alphabet: Alphabet, rng: np.random.Generator) -> Words:
    """Word lists in which every word of the alphabet may be a name, a city or a field.

    Documents that say words of their split only teach to expect them: titles of other words were read as its.
    """

    def some(count: int) -> tuple[str, ...]:
        mixed = dict.fromkeys(w[i] for w in (alphabet.listed, alphabet.words) for i in rng.permutation(len(w))[:count])
        return tuple(word for word in mixed if word.isalpha())

    return Words(**{each.name: some(len(getattr(WORDS["train"], each.name))) for each in fields(Words)})


def strained(page: Page, rng: np.random.Generator) -> Page:
    """The page squeezed or stretched, its letters thicker or thinner: a few fonts are few to learn from."""
    from PIL import Image, ImageChops

    right = max((word.xs.max() for word in page.words), default=SIDE / 2)
    by = float(rng.uniform(0.75, min(1.25, (SIDE - 16) / right)))
    corner, old = page.image.getpixel((1, 1)), page.image
    image = Image.new("RGB", old.size, corner)
    image.paste(old.resize((round(SIDE * by), SIDE), Image.Resampling.BILINEAR))
    thick = float(rng.uniform(-0.35, 0.7))
    image = ImageChops.blend(image, Image.fromarray(_grown(np.asarray(image), thick < 0)), abs(thick))
    return Page(image, [Word(word.text, word.xs * by, word.y) for word in page.words])


def _grown(pixels: NDArray[np.uint8], light: bool) -> NDArray[np.uint8]:
    """The lightest or darkest value within a pixel of each, [height, width, colours], as PIL's filters of size 3.

    They take ten times as long.
    """
    pick = np.maximum if light else np.minimum
    wide = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = pick(pick(wide[:-2], wide[1:-1]), wide[2:])
    return pick(pick(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


class Reader(nn.Module):
    """Tower, projector, and a head on the tower's stage before the last that names letters, which teaches it early.

    Args:
        model: the LLaVA whose tower and projector are trained.
        tokens: the alphabet's token numbers.
    """

    table: Tensor

    def __init__(self, model: Any, tokens: list[int]) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.head = nn.Linear(model.config.vision_config.hidden_size // 2, LETTERS)
        self.register_buffer("table", model.get_input_embeddings().weight[tokens].detach().float(), persistent=False)
        self.middle = torch.empty(0)
        self.tower.encoder.stages[-2].layers[-1].register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.middle = output

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        """What it says, [batch, `IMAGE_TOKENS`, width], and letters, [batch, 4 * `IMAGE_TOKENS`, `LETTERS`]."""
        said = self.projector(self.tower(pixels, output_hidden_states=True).hidden_states[-1])
        return said.float(), self.head(self.middle).float()

    def distances(self, said: Tensor) -> Tensor:
        """Minus the squared distance to each token of the alphabet, less what does not depend on it."""
        with torch.autocast(said.device.type, torch.bfloat16):
            return (2 * said @ self.table.T).float() - self.table.square().sum(-1)

    def spoken(self, said: Tensor, tokens: Int[Tensor, "batch places"]) -> Tensor:
        """How far what is said is from the tokens: cross-entropy and distance; empty places count a fifth."""
        near = (said - self.table[tokens]).square().sum(-1)
        return named(self.distances(said), tokens, tokens > 1) + 0.1 * weighted(near, tokens > 1)


def weighted(values: Tensor, written: Tensor) -> Tensor:
    """The mean of values, in which those where nothing is written count a fifth."""
    weight = torch.where(written, 1.0, 0.2)
    return (values * weight).sum() / weight.sum()


def named(logits: Float[Tensor, "batch places classes"], right: Tensor, written: Tensor) -> Tensor:
    """Cross-entropy per place, in which places where nothing is written count a fifth."""
    return weighted(F.cross_entropy(logits.transpose(1, 2), right, reduction="none"), written)


def batch(pages: Sequence[Page], alphabet: Alphabet, processor: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels as bytes, for `seen`; index in the alphabet per place, letter per quarter of a place."""
    index = {token: n for n, token in enumerate(alphabet.tokens)}
    grids = np.stack([tokens_of(page, alphabet).flatten() for page in pages])
    tokens = torch.tensor([[index.get(int(i), 0) for i in grid] for grid in grids])
    signs = torch.tensor(np.stack([letters_of(page).flatten() for page in pages]))
    resized = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    pixels = processor.image_processor(images=[page.image for page in pages], **resized)["pixel_values"]
    return pixels, tokens, signs


def seen(pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """What the processor makes of bytes, which travel between processes at a quarter of the size: -1 to 1."""
    return pixels / 127.5 - 1


@torch.no_grad()
def reading(reader: Reader, pages: list[Page], alphabet: Alphabet, processor: Any) -> dict[str, float]:
    """How much of pages is read, in [0, 1]: places with a token, empty places, and letters."""
    right, empty, letters = [], [], []
    for page in pages:
        pixels, tokens, signs = (part.to(reader.table.device) for part in batch([page], alphabet, processor))
        with torch.autocast(pixels.device.type, torch.bfloat16):
            said, letter = reader(seen(pixels))
        hit = reader.distances(said).argmax(-1) == tokens
        right.append(hit[tokens > 1].float())
        empty.append(hit[tokens == 0].float())
        letters.append((letter.argmax(-1) == signs)[signs > 0].float())
    return {
        name: round(torch.cat(v).mean().item(), 4)
        for name, v in (("tokens", right), ("empty", empty), ("letters", letters))
    }


class TowerSteps(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """What each step of the first stage sees, documents and loose words, by the step's number alone.

    Args:
        alphabet: what the tower learns to say.
        processor: the model's.
        size: pages of a step.
        among: faces of loose words, as in `FONTS`.
    """

    def __init__(self, alphabet: Alphabet, processor: Any, size: int, among: Sequence[Face]) -> None:
        self.alphabet, self.processor, self.size, self.among = alphabet, processor, size, among

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([1, step])
        pages = [
            loose_page(self.alphabet, rng, self.among)
            if rng.random() < LOOSE
            else laid_page("train", rng, any_words(self.alphabet, rng), self.among)
            for _ in range(self.size)
        ]
        return batch([strained(page, rng) for page in pages], self.alphabet, self.processor)


def in_turn(steps: Dataset[Any], first: int, end: int, workers: int, device: torch.device) -> Iterator[Any]:
    """Data of the steps from `first` up to `end`, drawn ahead by other processes where there are some.

    Each of them draws whole steps, in one thread, and begins at once.
    """
    order, pin = range(first, end), device.type == "cuda"
    return iter(DataLoader(steps, batch_size=None, sampler=order, num_workers=workers, pin_memory=pin))


def train_tower(
    model: Any,
    processor: Any,
    folder: Path,
    steps: int,
    size: int = 2,
    workers: int = 0,
    log: Log = print,
    among: Sequence[Face] = OWN,
    deadline: float = math.inf,
    cooldown: bool = False,
) -> Reader:
    """Train tower and projector up to a step; `log.jsonl` has what is read of held-out pages.

    Args:
        model: the LLaVA; its tower and projector are changed.
        processor: the model's.
        folder: the checkpoint, from which it goes on, and the log.
        steps: in all, those of earlier sittings included.
        size: pages of a step.
        workers: processes that draw pages ahead.
        log: receives a line now and then.
        among: faces of loose words, as in `FONTS`.
        deadline: when it stops before, by `time.monotonic()`.
        cooldown: let the rate fall to zero towards the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet, device = Alphabet(processor.tokenizer), model.device
    reader = Reader(model, alphabet.tokens).requires_grad_(True).train().to(device)
    # Muon takes the maps from width to width, for which it needs a third of AdamW's steps here.
    maps = [p for name, p in reader.named_parameters() if p.ndim == 2 and not name.startswith("head.")]
    rest = [p for name, p in reader.named_parameters() if p.ndim != 2 or name.startswith("head.")]
    optimizers = [
        torch.optim.Muon(maps, lr=PEAK, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.02),
    ]
    done, sitting = load_state(folder, {"reader": reader}, *optimizers), Sitting(steps, deadline, cooldown)
    if sitting.over(done):
        return reader.eval()
    drawn = in_turn(TowerSteps(alphabet, processor, size, among), done, steps, workers, device)
    held_out = {
        split: [laid_page(split, np.random.default_rng([7, number])) for number in range(HELD_OUT)]
        for split in ("train", "calibration")
    }
    running = torch.zeros((), device=device)
    for step, parts in enumerate(drawn, start=done):
        pixels, tokens, signs = (part.to(device, non_blocking=True) for part in parts)
        with torch.autocast(device.type, torch.bfloat16):
            said, letters = reader(seen(pixels))
        loss = reader.spoken(said, tokens) + named(letters, signs, signs > 0)
        reader.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = sitting.rate(step, PEAK, warmup=100, flat=1000)
            optimizer.step()
        # Stays on the device: to read a number there waits for the step.
        running = loss.detach() if step == done else 0.95 * running + 0.05 * loss.detach()
        last = sitting.over(step + 1)
        if (step + 1) % LOG_EVERY == 0 or last:
            pace = (time.monotonic() - sitting.began) / (step + 1 - done)
            log(f"tower {step + 1}/{steps} loss {running.item():.3f} {pace:.2f} s/step")
        if sitting.due() or last:
            save_state(folder, step + 1, {"reader": reader}, *optimizers)
        if (step + 1) % MEASURE_EVERY == 0 or last:
            reader.eval()
            read = {split: reading(reader, pages, alphabet, processor) for split, pages in held_out.items()}
            reader.train()
            record = json.dumps({"step": step + 1, "loss": round(running.item(), 4), **read})
            log(record)
            with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(record + "\n")
        if last:
            break
    return reader.eval()
