"""What is wrapped of vLLM is what is expected there, or the error says which version has something else."""

from typing import Any

import pytest

from skipit.vllm import hooks


class Engine:
    def step(self, scheduled: int, more: int = 0) -> int:
        return scheduled + more


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_version", lambda: "9.9.9")


def test_a_function_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "step", Engine.step)  # put back at the end

    def double(original: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * original(*args, **kwargs)

    for _ in range(2):
        hooks._wrap(Engine, "step", ["self", "scheduled"], double)
    assert Engine().step(3, more=1) == 8


@pytest.mark.parametrize(("name", "wanted"), [("run", ["self"]), ("step", ["self", "batch"])])
def test_another_vllm_is_named(name: str, wanted: list[str]) -> None:
    with pytest.raises(ImportError, match=r"this vLLM is 9\.9\.9 and has no `Engine\..*Tested is vLLM 0\.32\.0"):
        hooks._wrap(Engine, name, wanted, print)


@pytest.mark.parametrize("setting", ["pipeline_parallel_size", "use_ubatching"])
def test_settings_that_gates_cannot_follow(setting: str) -> None:
    class Config:
        class parallel_config:
            pipeline_parallel_size = 2 if setting == "pipeline_parallel_size" else 1
            use_ubatching = setting == "use_ubatching"

        class model_config:
            enable_prompt_embeds = False

        speculative_config = lora_config = None

    option = {"pipeline_parallel_size": "--pipeline-parallel-size", "use_ubatching": "--enable-dbo"}[setting]
    with pytest.raises(ValueError, match=rf"served without {option}\. Leave that out, or set SKIPIT_VLLM=0"):
        hooks.Settings.verify_and_update_config(Config)
