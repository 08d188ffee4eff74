"""vLLM answers and counts as `skipit.generate` does: in batches, in chunks, with cached prefixes, after preemption."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: tests/environments/vllm makes an environment with it")
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

from tiny_served import BUDGETS, FAMILIES, NEW, Question, forbidden, make, questions, vocabulary
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError

import skipit.vllm
from skipit.router import RouterConfigError

pytestmark = pytest.mark.slow
BY_DATA = [{} if budget is None else {"skipit_budget": budget} for budget in BUDGETS]
BY_INPUT = [{"skipit_budget": share, "skipit_budget_per": "input"} for share in (0.9, 0.6)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make(family, tmp_path_factory.mktemp(family) / "checkpoint") for family in FAMILIES}


@pytest.fixture(scope="module", autouse=True)
def asked(folders: dict[str, Path]) -> dict[str, list[Question]]:
    """All questions with their answers, before vLLM changes the decoder classes of this process."""
    return {family: questions(family, folder, [*BY_DATA, *BY_INPUT]) for family, folder in folders.items()}


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[Any]:
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 32, "block_size": 32}
    llm = LLM(str(folder), limit_mm_per_prompt={"image": 2}, seed=0, disable_log_stats=False, **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(llm: Any, family: str, questions: list[Question]) -> list[Any]:
    allowed = sorted(set(range(vocabulary(family))) - set(forbidden(family)))
    how = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "detokenize": False, "allowed_token_ids": allowed}
    params = [SamplingParams(extra_args=question.extra, **how) for question in questions]
    return llm.generate([question.prompt for question in questions], params, use_tqdm=False)


def check(llm: Any, family: str, questions: list[Question], cached: bool = False) -> None:
    """Answers are equal, and so is what was executed, but for what cached prefixes spare."""
    answers = ask(llm, family, questions)
    spent, *_ = llm.apply_model(skipit.vllm.executed)
    for answer, question in zip(answers, questions, strict=True):
        assert answer.prompt_token_ids == question.ids
        assert list(answer.outputs[0].token_ids) == question.answer, question.extra
        own = next(it for name, it in spent.items() if name.split("-")[0] == answer.request_id)
        if not cached:
            assert own.tokens == len(question.ids) + NEW - 1
            assert own.token_layers == question.token_layers
            assert own.share == pytest.approx(question.share, abs=1e-9)


def metric(llm: Any, name: str) -> float:
    return sum(it.value for it in llm.get_metrics() if it.name == name)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers_in_chunks_and_with_cached_prefixes(
    folders: dict[str, Path], asked: dict[str, list[Question]], family: str
) -> None:
    by_data = [question for question in asked[family] if "skipit_budget_per" not in question.extra]
    assert len({tuple(question.answer) for question in by_data}) > len(by_data) / 2, "budgets make no difference"
    with served(folders[family], max_num_batched_tokens=64) as llm:
        for question in by_data:  # one after the other: what another budget has cached must not be used
            check(llm, family, [question], cached=True)
        hits = metric(llm, "vllm:prefix_cache_hits")
        check(llm, family, by_data, cached=True)
        assert metric(llm, "vllm:prefix_cache_hits") > hits
    with served(folders[family], max_num_batched_tokens=64, enable_prefix_caching=False) as llm:
        check(llm, family, by_data)  # 32 at once, and three that wait


def test_preempted_requests_answer_and_count_as_others(
    folders: dict[str, Path], asked: dict[str, list[Question]]
) -> None:
    long = [
        question for question in asked["llava"] if len(question.ids) > 60 and "skipit_budget_per" not in question.extra
    ]
    with served(folders["llava"], num_gpu_blocks_override=13, enable_prefix_caching=False) as llm:
        check(llm, "llava", long)
        assert metric(llm, "vllm:num_preemptions") > 0


def test_a_budget_per_input(folders: dict[str, Path], asked: dict[str, list[Question]]) -> None:
    # Prompts in which no token comes twice: of equal logits, rounding says which is the last that fits.
    by_input = [it for it in asked["llava"] if "skipit_budget_per" in it.extra and len(it.ids) < 60]
    with served(folders["llava"], enable_chunked_prefill=False, max_num_batched_tokens=256) as llm:
        check(llm, "llava", by_input)
        check(llm, "llava", by_input)  # no prefix of another prompt is used
        least = Question(by_input[0].prompt, {"skipit_budget": 0.01, "skipit_budget_per": "input"}, [], [], 0, 0)
        with pytest.raises(VLLMValidationError, match="expected more than 0"):
            ask(llm, "llava", [least])
    with served(folders["llava"]) as llm, pytest.raises(VLLMValidationError, match="--no-enable-chunked-prefill"):
        ask(llm, "llava", by_input[:1])


def test_what_is_refused(
    folders: dict[str, Path], asked: dict[str, list[Question]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(folders["llava"]) as llm:
        for extra, message in (({"skipit_budget": 0.3}, "calibrated for: 0.75, 0.5"), ({"skipit_bugdet": 1}, "bugdet")):
            with pytest.raises(VLLMValidationError, match=message):
                ask(llm, "llava", [Question(asked["llava"][0].prompt, extra, [], [], 0, 0)])
    with pytest.raises(ValueError, match="without --pipeline-parallel-size"):
        LLM(str(folders["llava"]), pipeline_parallel_size=2)
    router = tmp_path / "checkpoint" / "router_config.json"
    tmp_path.joinpath("checkpoint").symlink_to(folders["llava"])
    text = router.read_text()
    try:
        router.write_text(text.replace('"retain"', '"evict"'))
        skipit.vllm.hooks._served.cache_clear()
        skipit.vllm.served.served.cache_clear()
        with pytest.raises(RouterConfigError, match="got 'evict', under vLLM gates run with 'retain'"):
            LLM(str(folders["llava"]))
    finally:
        router.write_text(text)


def test_turned_off(
    folders: dict[str, Path], asked: dict[str, list[Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = [question for question in asked["llava"] if question.extra.get("skipit_budget") == "all"]
    monkeypatch.setenv("SKIPIT_VLLM", "0")
    with served(folders["llava"], model_impl="transformers") as llm:
        answers = ask(llm, "llava", dense)
        assert not hasattr(llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model(), "decisions")
    assert [list(answer.outputs[0].token_ids) for answer in answers] == [question.answer for question in dense]


def test_compiled(folders: dict[str, Path], asked: dict[str, list[Question]]) -> None:
    by_data = [question for question in asked["llava"] if "skipit_budget_per" not in question.extra]
    with served(folders["llava"], enforce_eager=False, max_num_batched_tokens=64) as llm:
        from vllm.config import CompilationMode

        compilation = llm.llm_engine.vllm_config.compilation_config
        assert compilation.mode != CompilationMode.NONE
        assert "skipit::packed_mlp" in compilation.splitting_ops
        check(llm, "llava", by_data, cached=True)


def test_two_processes_of_one_model(
    folders: dict[str, Path], asked: dict[str, list[Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_data = [question for question in asked["llava"] if "skipit_budget_per" not in question.extra]
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")  # each takes a core of one node
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to be asked what they have executed
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with served(
        folders["llava"], tensor_parallel_size=2, max_num_batched_tokens=64, enable_prefix_caching=False
    ) as llm:
        check(llm, "llava", by_data)
