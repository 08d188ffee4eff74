"""Two processes never write one folder, and what a killed one left is cleared by the next."""

import os
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from skipit.router import CheckpointError
from skipit.router.folders import check_out, claimed, new_directory, save_json, save_tensors
from skipit.router.lock import beside, locked


def child(do: Callable[[], None]) -> int:
    """Run something in a process of its own; returns its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            do()
        except CheckpointError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write(out: Path, text: str, overwrite: bool = False) -> None:
    with new_directory(out, overwrite) as folder:
        (folder / "a.txt").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_a_thread(out: Path) -> BaseException | None:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(write, out, "second").exception()


def test_one_wins_and_the_other_is_refused_by_name(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("first")
        assert "out is in use: another skipit is writing it. Wait until it is" in str(in_a_thread(tmp_path / "out"))
        assert in_a_thread(tmp_path / "other") is None
    assert names(tmp_path) == ["other", "out"]
    assert (tmp_path / "out" / "a.txt").read_text() == "first"


def test_a_name_is_a_name_from_wherever_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len({beside(Path(name), "lock") for name in ("x", f"{tmp_path}/x", "link/x", "./x", "y/../x")}) == 1


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    def die() -> None:
        with locked(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert child(die) == -signal.SIGKILL
    assert names(tmp_path) == [".out.skipit-lock"]
    write(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]


def test_it_can_be_held_again_inside_and_is_free_at_the_end(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as first, locked(tmp_path / "out") as second:
        assert (first, second) == (True, False)
        assert isinstance(in_a_thread(tmp_path / "out"), CheckpointError)
    assert not names(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "os.open", "shutil.rmtree", "pathlib.Path.mkdir"])
def test_killed_at_any_call_the_next_one_clears_and_recovers(
    call: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies before its first, second, ... call of a kind, until it lives through them all."""
    out = tmp_path / "out"
    for number in range(100):
        if overwrite:
            write(out, "old")

        def die(number: int = number) -> None:
            left = number

            def last(*arguments: object, **options: object) -> object:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return usual(*arguments, **options)

            module, _, name = call.rpartition(".")
            owner = {"os": os, "shutil": __import__("shutil"), "pathlib.Path": Path}[module]
            usual = getattr(owner, name)
            setattr(owner, name, last)
            write(out, "new", overwrite)

        status = child(die)
        with claimed(out, lambda: check_out(out, True)):  # whatever comes next
            assert names(tmp_path) in (["out", ".out.skipit-lock"], [".out.skipit-lock", "out"], [".out.skipit-lock"])
            assert not out.exists() or (out / "a.txt").read_text() in ("old", "new")
            assert out.exists() or not overwrite, "what was there is there"
        assert names(tmp_path) in (["out"], [])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        write(out, "new", overwrite=True)
        assert (out / "a.txt").read_text() == "new"
        check_out(out, True)
        (out / "a.txt").unlink()
        out.rmdir()
    assert number > 0
    assert (out / "a.txt").read_text() == "new"


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def meanwhile() -> None:
        with new_directory(out) as folder:
            (folder / "a.txt").write_text("ours")
            out.mkdir()
            (out / "a.txt").write_text("of someone who asks nobody")

    with pytest.raises(CheckpointError, match="out exists"):
        meanwhile()
    assert (out / "a.txt").read_text() == "of someone who asks nobody"
    assert names(tmp_path) == ["out"]


def test_parents_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_directory(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert not names(tmp_path)


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full() -> None:
        with new_directory(tmp_path / "out") as folder:
            save_tensors(folder / "a.safetensors", {"a": torch.ones(9999)})

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"/out/a.safetensors cannot be written: .*File too large"):
            full()
        with pytest.raises(CheckpointError, match=r"/a.json cannot be written: .*File too large"):
            save_json(tmp_path / "a.json", ["x" * 9999])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not names(tmp_path)


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after a rename must not leave empty files under the new name."""
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def seen(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr("os.fsync", seen)
    monkeypatch.setattr("os.replace", renamed)
    with new_directory(tmp_path / "out") as folder:
        (folder / "in").mkdir()
        (folder / "in" / "a.txt").write_text("a")
    assert calls == ["in", "a.txt", ".out.skipit-new", "rename to out", tmp_path.name]
