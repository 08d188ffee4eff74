"""A model plugin for lmms-eval: `lmms_eval --model skipit --model_args pretrained=DIR,budget=0.5 --tasks ...`."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from rich.progress import Progress

from skipit.eval.measure.runner import leave_out_finished
from skipit.eval.measure.traced import ONE_PASS
from skipit.router import InputError, Trace, find_router, running
from skipit.router.errors import short
from skipit.theory.cost import CostModel, trace_compute
from skipit.train.adapter import load
from skipit.train.data.pictures import read_picture

MAX_NEW_TOKENS = 1024  # where a task does not say; lmms-eval's own default for LLaVA
_SAMPLING = ("temperature", "top_p", "top_k")


def manifest() -> ModelManifest:
    """What lmms-eval finds under the entry point group `lmms_eval.models`."""
    return ModelManifest(model_id="skipit", chat_class_path="skipit.lmms.SkipIt")


class SkipIt(lmms):
    """A gated checkpoint or adapter as lmms-eval asks it: conversations in, texts out.

    Args:
        pretrained: folder made by `skipit export`, or the Hub id of a gated checkpoint.
        budget: a calibrated operating point, by its number or its name; None is the default one.
        dense: run every layer for every token, to compare with.
        base: of an adapter: a copy of the model it was trained from.
        batch_size: requests per call of `generate`; those of one call have the same generation settings.
        device: such as "cuda" or "cpu"; None takes the process's own, as `accelerate launch` gives it.
        dtype: of the weights; "auto" is the checkpoint's.
        max_batch_size: of lmms-eval's `--batch_size auto`, which is not offered here.
        **options: passed to transformers' `from_pretrained`, such as `device_map`.

    Raises:
        CheckpointError: not a gated checkpoint, or damaged.
        RouterConfigError: not a calibrated budget.
        InputError: `budget` of a dense run, or a batch size that is no number.
    """

    is_simple = False  # conversations, not a prompt with images beside it

    def __init__(
        self,
        pretrained: str,
        budget: float | str | None = None,
        dense: bool = False,
        base: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if dense and budget is not None:
            raise InputError("a dense run executes every layer for every token: leave out `budget`.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"`batch_size`: got {short(batch_size)}, expected a whole number, at least 1.")
        self.accelerator = Accelerator()
        place = self.accelerator.device if device is None or self.accelerator.num_processes > 1 else device
        options = {"device_map": str(place), "dtype": dtype, **options}
        self.model, self.processor = load(pretrained, base, **options)
        router = find_router(self.model)[1]
        router.config.threshold_at(budget)  # an unknown one is refused now
        self.costs = CostModel.of(self.model, router.config.layers)
        self.budget, self.dense, self.batch_size = budget, dense, int(batch_size)
        self.device = self.model.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer every request, in their order; the executed share of FLOPs goes to lmms-eval's log and results."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        answers = [""] * len(requests)
        executed = dense = 0.0
        tokens, seconds = 0, 0.0
        with Progress(disable=self.rank != 0) as progress:
            bar = progress.add_task("skipit", total=len(requests))
            for batch in self._batches(requests):
                texts, new, took, spent = self._answer([requests[number].args for number in batch])
                for number, text in zip(batch, texts, strict=True):
                    answers[number] = text
                tokens, seconds = tokens + new, seconds + took
                executed, dense = executed + spent[0], dense + spent[1]
                progress.advance(bar, len(batch))
        share = executed / dense if dense else 1.0
        speed = tokens / seconds if seconds else 0.0
        log_metrics(seconds, tokens, speed, {"executed_flops_share": share, "total_requests": len(requests)})
        # Every process says its own part. They cannot add up: lmms-eval's cache may answer all requests of one.
        print(f"skipit: executed {share:.1%} of the dense decoder's FLOPs over {len(requests)} requests.")
        return answers

    def _batches(self, requests: list[Any]) -> Iterator[list[int]]:
        """Numbers of requests that are answered together."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(number)
        for group in groups.values():
            yield from (group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size))

    @torch.no_grad()
    def _answer(self, arguments: list[Any]) -> tuple[list[str], int, float, tuple[float, float]]:
        """Texts of one batch, how many tokens they have, seconds of `generate`, and FLOPs executed and dense."""
        settings = arguments[0][2]
        conversations = [
            conversation(to_messages(self.task_dict[task][split][doc]))
            for _, to_messages, _, doc, task, split in arguments
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.device, self.model.dtype)
        trace = Trace()
        start = time.perf_counter()
        with running(trace=trace, budget=self.budget, mode="dense" if self.dense else None):
            output = self.model.generate(**inputs, **{**ONE_PASS, **generation_settings(settings)})
        new = output[:, inputs["input_ids"].shape[1] :].cpu()  # waits for the device
        took = time.perf_counter() - start
        spent = (0.0, 0.0)
        if trace.steps:
            if settings.get("num_beams", 1) == 1:  # beams change rows
                leave_out_finished(trace.steps, new.to(self.device), self.model.generation_config.eos_token_id)
            compute = trace_compute(self.costs, trace.steps)
            spent = float(compute.executed.sum()), float(compute.dense.sum())
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        special = torch.isin(new, torch.tensor(self.processor.tokenizer.all_special_ids))
        return [cut(text, settings.get("until")) for text in texts], int((~special).sum()), took, spent

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not offered: gates decide token by token of an answer that is being generated."""
        raise InputError("skipit answers `generate_until` tasks only, this one asks for log likelihoods.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered."""
        raise InputError("skipit answers `generate_until` tasks only, this one has several rounds.")


def conversation(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of lmms-eval, whose parts hold media under `url`, as processors want them.

    Example:
        >>> conversation([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])
        [{'role': 'user', 'content': [{'type': 'video', 'video': 'a.mp4'}]}]
    """
    return [{"role": turn["role"], "content": [_part(part) for part in turn["content"]]} for turn in messages]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "video"):
        raise InputError(f"a task has a part of type {short(kind)}; skipit takes text, images and videos.")
    return {"type": kind, kind: read_picture(part["url"]) if kind == "image" else part["url"]}


def generation_settings(task: dict[str, Any]) -> dict[str, Any]:
    """What a task sets, as `generate` takes it; keys that are about other models are left out.

    Example:
        >>> generation_settings({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "until": ["."]})
        {'max_new_tokens': 16, 'num_beams': 1, 'do_sample': False}
    """
    settings = {
        "max_new_tokens": task.get("max_new_tokens", MAX_NEW_TOKENS),
        "num_beams": task.get("num_beams") or 1,
        "do_sample": bool(task.get("do_sample", True) and task.get("temperature")),
    }
    if settings["do_sample"]:
        settings |= {name: task[name] for name in _SAMPLING if task.get(name) is not None}
    return settings


def cut(text: str, until: str | list[str] | None) -> str:
    r"""A text up to the first of the strings it is generated until.

    lmms-eval gives every task the separator of its few-shot examples, which is no end of a model's answer: as in
    lmms-eval's own Qwen models, it does not count.

    Example:
        >>> cut("four. And so on", ["."]), cut("a list:\n\n1", ["\n\n"])
        ('four', 'a list:\n\n1')
    """
    for stop in [until] if isinstance(until, str) else until or []:
        if stop and stop != "\n\n":
            text = text.split(stop)[0]
    return text.strip()
