"""The documents model as a folder that transformers loads: the decoder and our weights, put together once."""

import hashlib
from pathlib import Path

from skipit.router import CheckpointError
from skipit.router.folders import new_directory

from .decoder import cache_folder, load_decoder
from .model import build_model, build_processor
from .weights import add_weights

OURS = Path(__file__).with_name("ours.safetensors")  # tower, projector and LoRA, fp16
RUN = Path(__file__).with_name("run")  # of `skipit train`: gates and LoRA


def documents_folder() -> Path:
    """The folder of the documents model, a plain Hugging Face checkpoint in bf16 in the cache folder.

    The first call makes it, for which the decoder may have to be fetched; see `load_decoder`.

    Raises:
        CheckpointError: the decoder cannot be had, or our weights are not here.
    """
    if not OURS.is_file():
        raise CheckpointError(f"no {OURS}. Make it with `scripts/study pretrain-documents --weights {OURS}`.")
    folder = cache_folder() / f"documents-{hashlib.sha256(OURS.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        decoder, tokenizer = load_decoder()
        processor = build_processor(tokenizer)
        model = add_weights(build_model(decoder, processor), OURS).to(decoder.dtype)
        with new_directory(folder, overwrite=True) as new:
            model.save_pretrained(new)
            processor.save_pretrained(new)
    return folder
