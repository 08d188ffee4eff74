"""Code inside a gated checkpoint, to run it gated where skipit is not installed: copies of the router's own files."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .folders import load_json, save_json

CODE = "skipit_router"  # the folder's name inside a checkpoint
_AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def add_code(folder: Path) -> None:
    """Put the router's code into a folder that `save_pretrained` has written, and its name into `config.json`.

    With `trust_remote_code=True`, transformers then loads the gated model; without, the dense one, and asks nothing:
    it has a class of its own for the model type.

    Raises:
        CheckpointError: there is no readable `config.json`.
    """
    (folder / CODE).mkdir()
    for file in code_files():
        # The one import that is neither torch, transformers nor what they need themselves.
        text = file.read_text(encoding="utf-8").replace("from jaxtyping import", "from .shapes import")
        (folder / CODE / file.name).write_text(text, encoding="utf-8")
    config = load_json(folder / "config.json")
    config["auto_map"] = dict.fromkeys(_AUTO_CLASSES, f"{CODE}/modeling.GatedModel")
    save_json(folder / "config.json", config)


def code_files() -> list[Path]:
    """The files that loading a gated model needs, as transformers follows their imports, and those of a server."""
    here = Path(__file__).parent
    files = [here / name for name in ("modeling.py", "shapes.py", "server.py")]
    files += map(Path, get_relative_import_files(here / "modeling.py"))
    return sorted(set(files))
