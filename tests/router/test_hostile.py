"""A checkpoint that is damaged or means harm is refused by file and key; nothing in it is run."""

import ast
import json
import os
import pickle
import re
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import processor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import build

import skipit
from skipit.router import CheckpointError, RouterConfig, SkipItError, attach
from skipit.router.checkpoint import GATES_FILE, ROUTER_FILE, load, load_dense, save_gated

INDEX = "model.safetensors.index.json"


class Bomb:
    """A pickle of this writes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "executed")


def make(folder: Path, **options: Any) -> Path:
    model = build("llava")
    attach(model, RouterConfig())
    save_gated(model, processor("llava"), folder, **options)
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make(tmp_path / "plain")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make(tmp_path / "shards", max_shard_size="40KB")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weight(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    tensors = load_file(folder / "model.safetensors")
    return next(name for name in sorted(tensors) if name.endswith("q_proj.weight")), tensors


def refused(folder: Path, *parts: str) -> None:
    """Loading fails with one of our errors whose message has all of `parts`."""
    with pytest.raises(SkipItError) as caught:
        load(folder)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_the_undamaged_ones_load(plain: Path, shards: Path) -> None:
    for folder in (plain, shards):
        model, loaded = load(folder)
        assert model._forward_pre_hooks
        assert type(loaded) is type(processor("llava"))
    assert len(list(shards.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 0.5, 0.999])
def test_truncated_weights(plain: Path, keep: float) -> None:
    for name in ("model.safetensors", GATES_FILE):
        whole = (plain / name).read_bytes()
        (plain / name).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
        refused(plain, str(plain / name), "is not a readable safetensors file")
        (plain / name).write_bytes(whole)


def test_a_truncated_or_missing_shard(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(shards, str(shard), "is not a readable safetensors file")
    shard.unlink()
    refused(shards, str(shard), "does not exist")


def test_wrong_shapes(plain: Path) -> None:
    name, tensors = weight(plain)
    save_file(tensors | {name: torch.zeros(3, 5)}, plain / "model.safetensors", {"format": "pt"})
    refused(plain, str(plain), "layers.0.self_attn.q_proj.weight` has shape (3, 5), but config.json makes it (32, 32).")


def test_missing_and_unknown_weights(plain: Path) -> None:
    name, tensors = weight(plain)
    save_file({key: value for key, value in tensors.items() if key != name}, plain / "model.safetensors")
    refused(plain, "lacks `model.language_model.layers.0.self_attn.q_proj.weight` (1 such weights)")
    with pytest.raises(CheckpointError, match="lacks"):
        load_dense(plain)  # transformers alone would leave it random, and warn
    save_file(tensors | {"surplus": torch.zeros(2)}, plain / "model.safetensors")
    refused(plain, "has, without a place for it, `surplus` (1 such weights)")


@pytest.mark.parametrize(
    "place", ["../../x.safetensors", "/etc/passwd", "a/../b.safetensors", "..", "", "x.bin", "a\0.safetensors", 3, None]
)
def test_an_index_that_leaves_the_folder(shards: Path, place: Any) -> None:
    index = json.loads((shards / INDEX).read_text())
    key = sorted(index["weight_map"])[0]
    index["weight_map"][key] = place
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, str(shards / INDEX), f"`{key}`", f"got {place!r}, expected a .safetensors file of this folder.")


def test_an_index_that_does_not_match(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    key, place = sorted(index["weight_map"].items())[0]
    edit(shards / INDEX, weight_map=index["weight_map"] | {"surplus": place})
    refused(shards, str(shards / place), "has no `surplus`")
    edit(shards / INDEX, weight_map={k: v for k, v in index["weight_map"].items() if k != key})
    refused(shards, str(shards / place), f"has, without a line in the index, `{key}`")
    for broken in ({}, [], None, 3):
        edit(shards / INDEX, weight_map=broken)
        refused(shards, str(shards / INDEX), f"`weight_map`: got {broken!r}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_loaded(plain: Path, tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    (plain / "model.safetensors").unlink()
    (plain / name).write_bytes(pickle.dumps(Bomb(trace)))
    refused(plain, str(plain), f"It has {name}, which skipit does not read")
    (plain / "model.safetensors").write_bytes((plain / name).read_bytes())  # nor under another name
    refused(plain, str(plain / "model.safetensors"), "is not a readable safetensors file")
    (plain / GATES_FILE).write_bytes((plain / name).read_bytes())
    refused(plain, str(plain / GATES_FILE), "is not a readable safetensors file")
    assert not trace.exists()


def test_code_of_its_own_is_never_run(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    trace = tmp_path / "trace"
    (plain / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoModelForImageTextToText", "AutoImageProcessor")
    code = dict.fromkeys(names, "evil.Evil")
    for file in plain.glob("*config.json"):
        if file.name not in (ROUTER_FILE, "generation_config.json"):
            edit(file, auto_map=code)
    before = set(sys.modules)
    for options in ({}, {"trust_remote_code": True}):
        model, _ = load(plain, **options)
        assert type(model).__module__.startswith("transformers.models.llava")
    edit(plain / "config.json", model_type="evil")  # a family that only the code would know
    refused(plain, str(plain), "cannot be loaded")
    assert not trace.exists()
    assert not [name for name in set(sys.modules) - before if name.endswith("evil")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformers_weights": "../x.safetensors"}, "`transformers_weights`: got '../x.safetensors'"),
        (
            {"_attn_implementation": "someone/kernel"},
            "`_attn_implementation`: got 'someone/kernel', code from elsewhere",
        ),
        ({"text_config": {"attn_implementation": "a/b@c"}}, "`text_config.attn_implementation`: got 'a/b@c'"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "`text_config.num_hidden_layers`: got 1000000000, expected at"),
    ],
)
def test_a_configuration_that_asks_for_too_much(plain: Path, changes: dict[str, Any], message: str) -> None:
    edit(plain / "config.json", **changes)
    refused(plain, str(plain / "config.json"), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": 4},
            "`format_version`: got 4, this skipit reads 1 to 3. Load the checkpoint with the skipit",
        ),
        ({"format_version": True}, "`format_version`: got True"),
        ({"code": "evil"}, "unknown keys code"),
        ({"threshold": 10**400}, "threshold 'threshold': got 1000"),
        ({"operating_points": {"0.5": None}}, "threshold '0.5': got None, expected a finite number"),
        ({"layers": "model.nowhere"}, "no decoder layers at `layers='model.nowhere'`"),
        ({"layers": ""}, "no decoder layers"),
    ],
)
def test_router_settings(plain: Path, changes: dict[str, Any], message: str) -> None:
    edit(plain / ROUTER_FILE, **changes)
    refused(plain, message)


def test_settings_that_are_no_settings(plain: Path) -> None:
    for content in (
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"threshold": NaN}',
        b'{"threshold": ' + b"9" * 5000 + b"}",
    ):
        (plain / ROUTER_FILE).write_bytes(content)
        refused(plain, str(plain / ROUTER_FILE))


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(shards: Path, name: str) -> None:
    for content in (b"", b"[]", b"\xff\xfe", b"[" * 100_000, b"null", b'{"a": ' + b"9" * 5000 + b"}"):
        (shards / name).write_bytes(content)
        refused(shards, str(shards / name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["weight"].fill_(torch.nan), "`weight` has values that are not finite"),
        (lambda t: t["bias"].fill_(torch.inf), "`bias` has values that are not finite"),
        (lambda t: t.update(bias=t["bias"].long()), "`bias` has dtype torch.int64, expected a floating one"),
        (lambda t: t.update(bias=t["bias"].to(torch.float8_e4m3fn)), "`bias` has dtype torch.float8_e4m3fn"),
        (lambda t: t.update(weight=t["weight"][:, :, :3].clone()), "gates: got shapes (4, 2, 3) and (4, 2)"),
        (lambda t: t.update(more=t["bias"].clone()), "got tensors ['bias', 'more', 'weight']"),
    ],
)
def test_gates(plain: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    gates = load_file(plain / GATES_FILE)
    change(gates)
    save_file(gates, plain / GATES_FILE)
    refused(plain, str(plain / GATES_FILE), message)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b'{"weight": 3}',
        b'{"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 99]}}',
        b'{"weight": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"weight": {"dtype": "F32", "shape": [9223372036854775807, 9223372036854775807], "data_offsets": [0, 8]}}',
        b'{"weight": {"dtype": "PY", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"weight": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
    ],
)
def test_headers(plain: Path, header: bytes) -> None:
    for name in (GATES_FILE, "model.safetensors"):
        whole = (plain / name).read_bytes()
        for length in (len(header), 2**63, len(header) + 100):
            (plain / name).write_bytes(struct.pack("<Q", length) + header + bytes(8))
            refused(plain, str(plain / name))
        (plain / name).write_bytes(whole)


def test_our_reader_sees_what_safetensors_sees(plain: Path) -> None:
    from skipit.router.folders import read_header

    with safe_open(plain / "model.safetensors", "pt") as file:
        assert set(read_header(plain / "model.safetensors")) == set(file.keys())
    with pytest.raises(CheckpointError, match=re.escape(f"{plain / 'no'} does not exist.")):
        read_header(plain / "no")


def rename_key(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.json", '"model_type"', '"model_type": "evil", "model_type"'),
        ("config.json", '"hidden_size"', '"hidden_size": 7, "hidden_size"'),  # in an object inside another
        (ROUTER_FILE, '"kv"', '"kv": "evict", "kv"'),
        ("generation_config.json", '"transformers_version"', '"a": 1, "a": 2, "transformers_version"'),
        ("processor_config.json", '"image_token"', '"image_token": "x", "image_token"'),
        ("tokenizer_config.json", '"backend"', '"backend": "x", "backend"'),
        ("tokenizer.json", '"version"', '"version": "x", "version"'),
    ],
)
def test_a_key_that_stands_twice(plain: Path, name: str, old: str, new: str) -> None:
    assert old in (plain / name).read_text()
    rename_key(plain / name, old, new)
    refused(plain, str(plain / name), f"the key {new.split(':')[0].strip(chr(34))!r} stands there twice")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["config.json", ROUTER_FILE, "generation_config.json", "tokenizer_config.json"])
def test_a_number_that_json_does_not_have(plain: Path, name: str, number: str) -> None:
    rename_key(plain / name, "{", f'{{"x": {number},')
    refused(plain, str(plain / name), f"the number {number} is not finite")


def test_a_header_that_names_a_tensor_twice(plain: Path) -> None:
    whole = (plain / GATES_FILE).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].strip()
    bias = json.dumps(json.loads(header)["bias"])
    doubled = b'{"bias":' + bias.encode() + b"," + header[1:]
    (plain / GATES_FILE).write_bytes(struct.pack("<Q", len(doubled)) + doubled + whole[8 + length :])
    refused(plain, str(plain / GATES_FILE), "the key 'bias' stands there twice")


def into_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def into_device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def into_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def into_nothing(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


@pytest.mark.parametrize("change", [into_pipe, into_device, into_nothing])
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", ROUTER_FILE, GATES_FILE, "model.safetensors", INDEX, "generation_config.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"),
    ],
)
def test_what_is_no_file_is_not_opened(plain: Path, name: str, change: Callable[[Path], None]) -> None:
    change(plain / name)
    started = time.monotonic()
    refused(plain, name)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("name", ["config.json", ROUTER_FILE, GATES_FILE, "model.safetensors", "tokenizer.json"])
def test_a_folder_in_place_of_a_file(plain: Path, name: str) -> None:
    into_folder(plain / name)
    refused(plain, str(plain / name) if name != ROUTER_FILE else f"has no {ROUTER_FILE}")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "x"}}, "audio_tokenizer"),
        ("preprocessor_config.json", {"audio_tokenizer": "x"}, "`audio_tokenizer`: got 'x'"),
        ("config.json", {"configuration_files": ["config.4.json"]}, "`configuration_files`: got 'config.4.json'"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.json"]}, "`fast_tokenizer_files`: got"),
        ("tokenizer_config.json", {"gguf_file": "../x.gguf"}, "`gguf_file`: got '../x.gguf'"),
        ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, "which fetches other models"),
        ("processor_config.json", {"processor_class": "MgpstrProcessor"}, "which fetches other models"),
        ("processor_config.json", {"processor_class": "Nonsense"}, "`processor_class`: got 'Nonsense', transformers"),
        (
            "processor_config.json",
            {"image_processor": {"image_processor_type": "OneFormerImageProcessor", "repo_path": "a/b"}},
            "image_processor.",
        ),
        ("config.json", {"_attn_implementation": {"": "sdpa", "vision_config": "a/b"}}, "code from elsewhere"),
        ("config.json", {"text_config": {"_attn_implementation": "flash_attention_2"}}, "code from elsewhere"),
        ("config.json", {"experts_implementation": "deepgemm"}, "`experts_implementation`: got 'deepgemm'"),
        ("config.json", {"quantization_config": {"quant_method": "mxfp4"}}, "`quantization_config.quant_method`"),
        ("config.json", {"vision_config": {"architecture": "hf-hub:a/b"}}, "a model from elsewhere"),
        ("config.json", {"vision_config": {"model_args": {"checkpoint_path": "x.pth"}}}, "`checkpoint_path`"),
        ("generation_config.json", {"dola_layers": "high"}, "`dola_layers`: got 'high'"),
        ("generation_config.json", {"penalty_alpha": 0.6, "top_k": 4}, "`penalty_alpha`: got 0.6"),
    ],
)
def test_doors_out_of_a_folder(
    plain: Path, file: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("skipit.router.files.find_spec", lambda _: None)  # no flash attention is installed
    (plain / file).touch()
    (plain / file).write_text(json.dumps(json.loads((plain / file).read_text() or "{}") | changes))
    refused(plain, str(plain / file), message)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "audio_tokenizer_config.json", "shard-00000-model-00000-of-00001.safetensors"]
)
def test_files_that_transformers_would_read_unasked(plain: Path, name: str) -> None:
    (plain / name).write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"transformers would read it instead of model\.safetensors, or beside it"
    ):
        load_dense(plain)


def test_what_a_processor_loads_in_its_turn_does_not_ask(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A door that the list above lacks: code in a subfolder, for which transformers is not told what is trusted."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("skipit.router.files._FETCHING", ("none",))
    trace = plain / "trace"
    for below in ("question_encoder_tokenizer", "generator_tokenizer"):
        (plain / below).mkdir()
        (plain / below / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
        code = {"auto_map": {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}, "model_type": "evil"}
        for file in ("tokenizer_config.json", "config.json"):
            (plain / below / file).write_text(json.dumps(code))
    edit(plain / "tokenizer_config.json", tokenizer_class="RagTokenizer")
    edit(plain / "config.json", model_type="rag")
    refused(plain, "cannot be loaded")
    assert not trace.exists()


def test_whatever_is_loaded_by_an_auto_class_is_told_to_run_no_code() -> None:
    root = Path(skipit.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and ast.unparse(called.value).startswith("Auto"):
                told = any(word.arg in (None, "trust_remote_code") for word in node.keywords)  # type: ignore[attr-defined]
                assert told or called.attr not in ("from_pretrained", "from_config"), f"{path}:{called.lineno}"


# What a file of transformers calls to get something that is not among its arguments, outside its documentation.
REACHES = ("from_pretrained", "hf_hub_download", "cached_file", "snapshot_download", "get_kernel", "create_model")
KNOWN_TO_REACH = {
    *(
        "bark",
        "encoder_decoder",
        "mgp_str",
        "musicgen",
        "musicgen_melody",
        "oneformer",
        "rag",
        "speech_encoder_decoder",
    ),
    *(
        "vision_encoder_decoder",
        "vision_text_dual_encoder",
        "wav2vec2",
        "csm",
        "fuyu",
        "kyutai_speech_to_text",
    ),  # by arguments, not by files
    *("timm_backbone", "timm_wrapper", "rwkv", "yoso", "mra", "sam3_video", "pix2struct"),  # fixed names, or refused
    *("qwen2_5_omni", "ernie4_5_vl_moe", "diffusion_gemma"),  # inside the folder
}


def test_no_other_family_reaches_out_of_its_folder() -> None:
    """A version of transformers with a new door fails here, and the list of doors is looked at again."""
    import transformers

    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/*.py"):
        if path.parent.name == "auto" or path.name.startswith("convert_"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in REACHES:
                    found.add(path.parent.name)
    assert found <= KNOWN_TO_REACH, sorted(found - KNOWN_TO_REACH)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 10**9},
        {"text_config": {"num_labels": 10**9}},
        {"vision_config": {"num_attention_heads": 10**9}},
        {"text_config": {"num_hidden_layers": 4000}},
        {"text_config": {"n_layer": 10**6}},
        {"text_config": {"vocab_size": 10**12}},
        {"vision_config": {"image_size": 10**7}},
        {"text_config": {"hidden_size": 10**9}},
        {"vision_config": {"num_channels": 10**9}},
    ],
)
def test_configurations_that_would_take_all_memory(plain: Path, changes: dict[str, Any]) -> None:
    config = json.loads((plain / "config.json").read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (plain / "config.json").write_text(json.dumps(config))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused(plain, str(plain))
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**21  # in kB: 2 GB


def sparse(path: Path, header: dict[str, Any]) -> None:
    """A file whose header promises what the disk does not hold."""
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))


def test_sparse_gates(plain: Path) -> None:
    count = 5 * 2**30 // 4
    shape, size = [4, 2, count // 8], count // 8 * 8 * 4
    sparse(
        plain / GATES_FILE,
        {
            "weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]},
            "bias": {"dtype": "F32", "shape": [4, 2], "data_offsets": [size, size + 32]},
        },
    )
    started = time.monotonic()
    refused(plain, str(plain / GATES_FILE), "promises 1,342,177,288 numbers, more than the gates of any model")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_that_is_no_number(plain: Path, value: float, dtype: torch.dtype) -> None:
    name, tensors = weight(plain)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    refused(plain, "q_proj.weight` has values that are not finite: the file is damaged")
    with pytest.raises(CheckpointError, match="not finite"):
        load_dense(plain)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("every", [True, False])
def test_weights_in_a_type_that_is_not_theirs(plain: Path, dtype: torch.dtype, every: bool) -> None:
    name, tensors = weight(plain)
    changed = {key: tensor.to(dtype) if every or key == name else tensor for key, tensor in tensors.items()}
    save_file(changed, plain / "model.safetensors", {"format": "pt"})
    refused(plain, str(plain), "expected floating-point numbers")
    with pytest.raises(CheckpointError, match="expected floating-point numbers"):
        load_dense(plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_types_are_read(plain: Path, dtype: torch.dtype) -> None:
    _, tensors = weight(plain)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    load(plain)


def test_gates_among_the_weights_are_not_lost_in_silence(plain: Path) -> None:
    _, tensors = weight(plain)
    gate = "model.language_model.layers.0.layer_gate.bias"
    save_file(tensors | {gate: torch.zeros(2)}, plain / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="has the gates of another model among its weights, `model"):
        load_dense(plain)


@pytest.mark.parametrize("threshold", [10**19, -(10**19), 10**300, 1e308])
def test_a_threshold_beyond_torchs_whole_numbers(plain: Path, threshold: float) -> None:
    edit(plain / ROUTER_FILE, threshold=threshold, operating_points={"0.5": threshold})
    model, _ = load(plain, budget=0.5)
    ids = torch.tensor([[5, 6, 7]])
    skips = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert skips.shape[1] > 3


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("generation_config.json", {"eos_token_id": "x"}, "`eos_token_id`: got 'x', expected a whole number"),
        ("generation_config.json", {"eos_token_id": [2, "x"]}, "`eos_token_id`: got 'x', expected a whole number"),
        ("generation_config.json", {"eos_token_id": 10**9}, "`eos_token_id`: got 1000000000, but the model has"),
        ("generation_config.json", {"num_beams": 0}, "`num_beams`: got 0, expected a positive whole number"),
        ("generation_config.json", {"use_cache": "no"}, "`use_cache`: got 'no', expected true or false"),
        ("generation_config.json", {"repetition_penalty": 0}, "`repetition_penalty`: got 0, expected a positive"),
        ("generation_config.json", {"max_new_tokens": "x"}, "`max_new_tokens`: got 'x', expected a positive"),
        ("processor_config.json", {"patch_size": 0}, "`patch_size`: got 0, expected a positive whole number"),
        ("processor_config.json", {"rescale_factor": 0}, "`rescale_factor`: got 0, expected a positive number"),
        ("processor_config.json", {"image_std": [0, 0, 0]}, "`image_std`: got 0, expected a positive number"),
        ("processor_config.json", {"size": {"height": 10**9}}, "`size.height`: got 1000000000, expected a positive"),
        ("processor_config.json", {"do_resize": "x"}, "`do_resize`: got 'x', expected true or false"),
    ],
)
def test_settings_that_would_fail_while_it_answers(
    plain: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(plain / file, **changes)
    refused(plain, str(plain), message)


@pytest.mark.parametrize(
    "changes",
    [
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"eos_token_id": [1, 2]},
        {"pad_token_id": -1},
        {"num_beams": 2},
        {"do_sample": True, "temperature": 0.5, "top_k": 5},
        {"penalty_alpha": None, "constraints": None},
        {"unheard_of": {"a": [1, "b"]}},
    ],
)
def test_settings_that_are_odd_but_legal(plain: Path, changes: dict[str, Any]) -> None:
    edit(plain / "generation_config.json", **changes)
    model, _ = load(plain)
    model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def test_a_configuration_of_a_model_far_larger_than_its_weights(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    del config["text_config"]  # the family's default has 32 layers of 4,096
    (plain / "config.json").write_text(json.dumps(config))
    refused(plain, str(plain / "config.json"), "is of a model with", "weights, but its files hold")
