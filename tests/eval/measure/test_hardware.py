"""The hardware in words: the processor's name where the system tells it, and something everywhere else."""

from pathlib import Path

from skipit.eval.measure.hardware import hardware


def test_the_processor_is_named(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nmodel name\t: Some CPU @ 2.00GHz\n")
    assert "Some CPU @ 2.00GHz, " in hardware(info)
    assert "PyTorch threads: 1" in hardware(info)


def test_it_is_never_empty(tmp_path: Path) -> None:
    assert not hardware(tmp_path / "none").startswith(",")
