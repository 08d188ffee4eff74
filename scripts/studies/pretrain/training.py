"""Pretrain the reference VLM from random weights.

Every image carries several questions at once. They are packed behind one shared image prefix under a
block-diagonal attention mask, each with its own position ids, so that every question sees exactly what it
will see at inference: the image and itself. "Read the whole grid" is always among them; without this dense
supervision look-up stays at chance for over a thousand steps.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipit.train.reference.digits import CELL, GRID, IMAGE_SIZE, Scans, Split, draw_grid, load_scans
from skipit.train.reference.questions import Kind, ask
from studies.architecture import IMAGE_TOKENS, PATCH, build_model, build_processor
from studies.state import load_state, save_state

# Harder kinds are asked more often; one "grid" per image is the dense supervision that look-up needs.
QUESTIONS_PER_IMAGE: dict[Kind, int] = {"grid": 1, "row": 1, "cell": 1, "compare": 3, "sum": 3, "count": 4}


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that determines a pretraining run."""

    seed: int = 0
    tower_steps: int = 400
    tower_batch: int = 64
    steps: int = 3200
    batch: int = 24
    learning_rate: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.05
    digit_loss: float = 0.3  # weight of the auxiliary "which digit is in this patch's cell"
    checkpoint_every: int = 250


def augment(cells: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly shift, scale, rotate and shear scans [n, 8, 8] in [0, 1], and vary their contrast."""
    n = len(cells)

    def uniform(half_width: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * half_width

    angle, scale_x, scale_y, shear = uniform(0.2), 1 + uniform(0.15), 1 + uniform(0.15), uniform(0.15)
    cos, sin = angle.cos(), angle.sin()
    top = torch.stack([cos * scale_x, -sin * scale_x + shear, uniform(0.2)], dim=1)
    bottom = torch.stack([sin * scale_y, cos * scale_y, uniform(0.2)], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), [n, 1, 8, 8], align_corners=False)
    moved = F.grid_sample(cells[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
    contrast = (1 + uniform(0.15))[:, None, None]
    noise = torch.randn(moved.shape, generator=generator) * 0.03
    return (moved * contrast + noise).clamp(0, 1)


def to_pixel_values(cells: Tensor) -> Tensor:
    """Scans [batch, 9, 8, 8] in [0, 1] to normalized images [batch, 3, 48, 48], as `render` and the processor do."""
    big = cells.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    image = big.view(-1, GRID, GRID, CELL, CELL).transpose(2, 3).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return ((image - 0.5) / 0.5).expand(-1, 3, -1, -1)


class Packer:
    """Draws batches of grids with several packed questions each."""

    def __init__(self, scans: Scans, seed: int, augmented: bool = True) -> None:
        self.scans = scans
        self.augmented = augmented
        self.pixels = torch.from_numpy(scans.pixels).float() / 255
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.tokenizer = build_processor().tokenizer
        self._ids: dict[str, list[int]] = {}
        self.prefix = self.ids("<s> USER: " + "<image>" * IMAGE_TOKENS)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, remembered: there are few different questions."""
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    def images(self, batch: int) -> tuple[Tensor, Tensor, list[tuple[int, ...]]]:
        """Images [batch, 3, 48, 48], digits [batch, 9], and the digits as tuples."""
        grids = [draw_grid(self.scans, self.rng) for _ in range(batch)]
        index = torch.tensor([grid.scans for grid in grids])
        cells = self.pixels[index.flatten()]
        if self.augmented:
            cells = augment(cells, self.generator)
        return (
            to_pixel_values(cells.view(batch, GRID * GRID, 8, 8)),
            torch.tensor([g.digits for g in grids]),
            [g.digits for g in grids],
        )

    def batch(self, size: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Model inputs, loss weight per token [batch, seq], and digits [batch, 9].

        Every kind of question has one length in tokens, so every batch has the same shape.
        """
        pixel_values, digits, tuples = self.images(size)
        rows = [self._pack(row) for row in tuples]
        ids, segment, position = (torch.tensor([row[part] for row in rows]) for part in range(3))
        weight = torch.tensor([row[3] for row in rows])
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        self.segment = segment[0]
        same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
        mask = (causal & same)[:, None]
        inputs = {"input_ids": ids, "pixel_values": pixel_values, "attention_mask": mask, "position_ids": position}
        return inputs, weight, digits

    def _pack(self, digits: tuple[int, ...]) -> tuple[list[int], list[int], list[int], list[float]]:
        ids, segment = list(self.prefix), [0] * len(self.prefix)
        position, weight = list(range(len(ids))), [0.0] * len(ids)
        number = 0
        for kind, count in QUESTIONS_PER_IMAGE.items():
            for _ in range(count):
                number += 1
                question = ask(kind, digits, self.rng)
                prompt = self.ids(question.text + " ASSISTANT:")
                answer = self.ids(question.answer + "</s>")
                n = len(prompt) + len(answer)
                ids += prompt + answer
                segment += [number] * n
                position += range(len(self.prefix), len(self.prefix) + n)
                # A long answer counts more than a short one, but not in proportion to its length.
                weight += [0.0] * len(prompt) + [len(answer) ** -0.5] * len(answer)
        return ids, segment, position, weight


_SEGMENT_KINDS: list[Kind] = [kind for kind, count in QUESTIONS_PER_IMAGE.items() for _ in range(count)]


@torch.no_grad()
def exact_match(model: Any, split: Split, images: int = 256, seed: int = 1) -> dict[str, float]:
    """Exact-match accuracy in [0, 1] per kind of question, on images without augmentation.

    Answers are scored under teacher forcing: an answer is right when every token is the arg max given the
    correct tokens before it, which holds exactly when greedy generation gives the whole answer.
    """
    packer = Packer(load_scans(split), seed, augmented=False)
    right: dict[str, list[float]] = {kind: [] for kind in QUESTIONS_PER_IMAGE}
    for _ in range(0, images, 32):
        inputs, weight, _ = packer.batch(32)
        predicted = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
        wrong = (predicted != inputs["input_ids"][:, 1:]) & (weight[:, 1:] > 0)
        segment = packer.segment[1:]
        for number, kind in enumerate(_SEGMENT_KINDS, start=1):
            right[kind] += (~wrong[:, segment == number].any(-1)).float().tolist()
    return {kind: float(np.mean(values)) for kind, values in right.items()}


def patch_labels(digits: Tensor) -> Tensor:
    """The digit in each patch's cell: [batch, 9] to [batch, 36]."""
    per_side = CELL // PATCH
    grid = digits.view(-1, GRID, GRID)
    return grid.repeat_interleave(per_side, 1).repeat_interleave(per_side, 2).flatten(1)


def one_cycle(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, progress))))


def pretrain(
    config: PretrainConfig,
    folder: Path,
    log: Callable[[str], None] = print,
    compile_decoder: bool = True,
) -> Any:
    """Train the reference VLM, checkpointing to `folder`; resumes when `folder` holds a checkpoint.

    Args:
        config: the run; the same config and seed give the same draws of data.
        folder: checkpoints and `log.jsonl` go here.
        log: receives one line per progress report.
        compile_decoder: run the decoder through `torch.compile` (1.7x faster on 2 cores; needs a C++ compiler).

    Returns:
        The trained `LlavaForConditionalGeneration`, in eval mode.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2))
    torch.manual_seed(config.seed)
    model = build_model(config.seed).train()
    head = nn.Linear(model.config.vision_config.hidden_size, 10)
    modules: dict[str, nn.Module] = {"model": model, "head": head}
    decayed = [p for m in modules.values() for p in m.parameters() if p.dim() >= 2]
    plain = [p for m in modules.values() for p in m.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    done = load_state(folder, modules, optimizer)
    packer = Packer(load_scans("train"), seed=config.seed * 1_000_003 + done)

    def digit_loss(features: Tensor, digits: Tensor) -> Tensor:
        return F.cross_entropy(head(features).flatten(0, 1), patch_labels(digits).flatten())

    captured: dict[str, Tensor] = {}
    handle = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _module, args: captured.__setitem__("features", args[0])
    )
    if done == 0:
        for step in range(config.tower_steps):
            pixel_values, digits, _ = packer.images(config.tower_batch)
            model.get_image_features(pixel_values)
            loss = digit_loss(captured["features"], digits)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, (step + 1) / 50)
            optimizer.step()
            if step % 50 == 49:
                accuracy = (head(captured["features"]).argmax(-1) == patch_labels(digits)).float().mean()
                log(f"tower {step + 1}/{config.tower_steps} loss {loss.item():.3f} patch accuracy {accuracy:.3f}")

    plain_model = build_model(config.seed)  # evaluated and returned: without the compiled decoder
    if compile_decoder:
        model.model.language_model.compile(dynamic=False)
    started, running = time.time(), 0.0
    with (folder / "log.jsonl").open("a") as history:
        for step in range(done, config.steps):
            inputs, weight, digits = packer.batch(config.batch)
            logits = model(**inputs, use_cache=False).logits
            target = inputs["input_ids"][:, 1:]
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), target, reduction="none")
            answer_loss = (losses * weight[:, 1:]).sum() / weight[:, 1:].sum()
            loss = answer_loss + config.digit_loss * digit_loss(captured["features"], digits)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"loss is {loss.item()} at step {step}; the last checkpoint in {folder} is good."
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for m in modules.values() for p in m.parameters()], 1.0)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * one_cycle(step, config)
            optimizer.step()
            running = answer_loss.item() if step == done else 0.98 * running + 0.02 * answer_loss.item()
            if (step + 1) % 50 == 0:
                rate = (time.time() - started) / (step + 1 - done)
                log(f"step {step + 1}/{config.steps} answer loss {running:.4f} {rate:.2f} s/step")
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                save_state(folder, step + 1, modules, optimizer)
                plain_model.load_state_dict(model.state_dict())
                record = {"step": step + 1, "answer_loss": running, **exact_match(plain_model, "calibration")}
                history.write(json.dumps(record) + "\n")
                history.flush()
                log(json.dumps(record))
    handle.remove()
    plain_model.load_state_dict(model.state_dict())
    return plain_model
