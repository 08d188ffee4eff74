"""Started by test_standalone.py where skipit is not installed: loads checkpoints with their own code and runs them.

Prints, as JSON, for each folder named: the class of the model, where its router comes from, the generated tokens, and
how many tokens ran in all layers of each step; the latter two also at the budget "none", named in three ways.
"""

import importlib
import json
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, GenerationConfig

assert sys.prefix != sys.base_prefix, "this is no virtual environment"
assert find_spec("skipit") is None, "skipit can be imported here"
assert not [found.name for found in distributions() if found.name == "skipit"], "skipit is installed here"
assert find_spec("jaxtyping") is None or "jaxtyping" not in sys.modules
torch.set_num_threads(1)


def run(model, folder, **options):
    code = type(router_of(model)).__module__.rpartition(".")[0]
    trace = importlib.import_module(f"{code}.call").Trace()
    settings = {"max_new_tokens": 5, "do_sample": False} if "generation_config" not in options else {}
    with importlib.import_module(f"{code}.running").running(trace=trace):
        tokens = model.generate(**load_file(folder / "inputs.safetensors"), **settings, **options)
    return {"tokens": tokens.tolist(), "ran": [int(step.run.sum()) for step in trace.steps]}


def router_of(model):
    (router,) = [hook for hook in model._forward_pre_hooks.values() if hasattr(hook, "config")]
    return router


results = []
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    at_none = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, budget="none")
    config = GenerationConfig(max_new_tokens=5, do_sample=False, budget="none")
    results.append(
        {
            "class": f"{type(model).__module__}.{type(model).__name__}",
            "code": type(router_of(model)).__module__.rpartition(".")[0],
            "dtype": str(model.dtype),
            **run(model, folder),
            "by_budget": run(model, folder, budget="none"),
            "by_config": run(model, folder, generation_config=config),
            "at_load": run(at_none, folder),
        }
    )
assert "skipit" not in sys.modules
assert "jaxtyping" not in sys.modules
print(json.dumps(results))
