"""Speed of gated execution on a LLaVA-shaped model with random weights: python -m skipit.eval.bench.

Speed does not depend on what the weights say. Skips are spread evenly over tokens and layers, so nothing is flattered
by whole layers falling away. Every figure is a median of interleaved repeats against the untouched model.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from skipit.router import Decision, Trace, attach, running
from skipit.router.artefact import provenance, save_json
from skipit.router.call import Call
from skipit.router.config import KVPolicy
from skipit.router.gates import TokenGate
from skipit.theory.cost import CostModel, trace_compute

from .latency import Subject, time_models
from .metrics import time_saved

IMAGE_TOKEN = 3


@dataclass(frozen=True)
class EvenShare:
    """Runs a share of the tokens of every layer, spread evenly and differently in each layer."""

    share: float

    def decide(self, layer: int, hidden: Tensor, call: Call, gate: TokenGate) -> Decision:
        """Run where a low-discrepancy sequence over (token, layer) lies below the share."""
        golden = (call.position.float() * 0.6180339887 + layer * 0.7548776662) % 1
        return Decision(golden < self.share)


def bench_small(hidden: int = 1024, layers: int = 12, image_tokens: int = 576) -> Any:
    """A LLaVA of the reference shape `bench-small`, random weights, with a tower too small to matter."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    side = round(image_tokens**0.5)
    if side * side != image_tokens:
        raise ValueError(f"`image_tokens`: got {image_tokens}, expected a square number.")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=14 * side,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=int(hidden * 2.75),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def prompt(image_tokens: int, text_tokens: int, batch: int) -> dict[str, Tensor]:
    """A batch of one image and a text each."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 1000, (batch, text_tokens), generator=generator)
    image = torch.full((batch, image_tokens), IMAGE_TOKEN)
    ids = torch.cat([text[:, :8], image, text[:, 8:]], dim=1)
    side = 14 * round(image_tokens**0.5)
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def bench(
    shares: tuple[float, ...], batch: int, repeats: int, image_tokens: int = 576, text_tokens: int = 64
) -> list[dict[str, Any]]:
    """Time prefill and decoding at several shares of tokens run, for both K/V policies."""
    dense = bench_small(image_tokens=image_tokens)
    gated = bench_small(image_tokens=image_tokens)
    attach(gated)
    costs = CostModel.of(dense)
    inputs = prompt(image_tokens, text_tokens, batch)
    subjects = {"untouched": Subject(dense), "gates attached, all run": Subject(gated)}
    saved: dict[str, float] = {"untouched": 0.0, "gates attached, all run": 0.0}
    for kv in get_args(KVPolicy):
        for share in shares:
            name = f"{kv}, {1 - share:.0%} skipped"
            context = _context(share, kv)
            subjects[name] = Subject(gated, context)
            trace = Trace()
            with torch.no_grad(), context(), running(trace=trace):
                gated(**inputs, use_cache=True, logits_to_keep=1)
            saved[name] = 1 - float(trace_compute(costs, trace.steps).share)
    times = time_models(subjects, inputs, repeats=repeats, decode_steps=8)
    base = times["untouched"]
    rows = []
    for name, latency in times.items():
        time = time_saved(base.prefill_ms, latency.prefill_ms)
        efficiency = time / saved[name] if saved[name] > 0.01 else None
        rows.append(
            {"name": name, "batch": batch, "flops_saved": saved[name], "prefill_saved": time, "efficiency": efficiency}
            | latency.to_json()
        )
    return rows


def _context(share: float, kv: KVPolicy) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: running(policy=EvenShare(share), kv=kv)


def main() -> None:
    """Print a table and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default 1)")
    parser.add_argument("--repeats", type=int, default=7, help="(default %(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="tokens that run each layer")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    arguments = parser.parse_args()
    rows = [row for batch in arguments.batch for row in bench(tuple(arguments.shares), batch, arguments.repeats)]
    print(f"{torch.get_num_threads()} threads, fp32, 576 image + 64 text tokens, hidden 1024, 12 layers")
    heads = f"{'FLOPs saved':>13}{'prefill ms':>12}{'time saved':>12}{'efficiency':>12}{'decode ms':>11}"
    print(f"{'':28}{'batch':>6}{heads}")
    for row in rows:
        efficiency = f"{row['efficiency']:.2f}" if row["efficiency"] is not None else "-"
        print(
            f"{row['name']:28}{row['batch']:>6}{row['flops_saved']:>13.1%}{row['prefill_ms']:>12.1f}"
            f"{row['prefill_saved']:>12.1%}{efficiency:>12}{row['decode_ms']:>11.2f}"
        )
    if arguments.out is not None:
        save_json(arguments.out, {"rows": rows, "threads": torch.get_num_threads(), "made_by": provenance()})


if __name__ == "__main__":
    main()
