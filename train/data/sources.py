"""What the command line's MODEL and DATA may be."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from skipit.router import InputError
from skipit.router.checkpoint import load_dense
from skipit.router.paths import is_path, missing

from .pictures import BesideData
from .rows import DAMAGE

REFERENCE, DOCUMENTS, CONVERSATIONS = "reference", "documents", "conversations"
BUILT_IN = (REFERENCE, DOCUMENTS)  # models and data that need no file; a folder of that name is `./documents`
BUILT_IN_DATA = (*BUILT_IN, CONVERSATIONS)  # the last are several questions about each page of `documents`
_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_MEDIA = ("images", "videos")
_KINDS = (
    "Give `reference`, `documents`, `conversations`, a folder made by save_to_disk, a .jsonl or .parquet file, or a "
    "Hub id."
)


def load_model(source: str, **options: Any) -> tuple[Any, Any]:
    """A dense model and its processor: `reference`, `documents`, a folder, or a Hub id.

    Args:
        source: see above.
        **options: of transformers' `from_pretrained`, such as `dtype`; without one weights are as they are stored.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    return load_dense(resolve_model(source), **options)


def on_gpu(model: Any) -> Any:
    """A model where the command line runs it: on the first GPU that PyTorch sees, if it sees one."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model


def resolve_model(source: str) -> str:
    """The folder of `reference` or of `documents`, which is made at the first use, or the source itself.

    Raises:
        CheckpointError: `documents` cannot be made; says why.
    """
    if source == REFERENCE:
        from skipit.train.reference import WEIGHTS

        return str(WEIGHTS)
    if source == DOCUMENTS:
        from skipit.train.reference.documents.folder import documents_folder

        return str(documents_folder())
    return source


def name_model(source: str) -> str:
    """How a record names a model so that it is found from any folder."""
    return str(Path(source).resolve()) if source not in BUILT_IN and Path(source).is_dir() else source


def name_data(source: str) -> str:
    """How a record names data so that it is known from any folder."""
    return str(Path(source).resolve()) if source not in BUILT_IN_DATA and Path(source).exists() else source


def load_data(
    source: str,
    split: str,
    samples: int | None = None,
    seed: int = 0,
    *,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    columns: Mapping[str, str] | None = None,
) -> Any:
    """Rows in the conversational vision format.

    Args:
        source: `reference`, `documents`, `conversations`, a folder made by `Dataset.save_to_disk`, a .jsonl, .json or
            .parquet file, or a Hub id.
        split: of the data set; the built-in ones have train, calibration and test. A file is one split.
        samples: at most this many rows; None is all (1,000 of what is built in).
        seed: of what is built in, and of the shuffle.
        streaming: rows are read one by one as they are asked for, and never all held; what is returned then has no
            length, and what cannot be read is found when it is reached.
        shuffle_buffer: of a stream, rows among which the next is drawn before `samples` are taken; 0 keeps the order.
        columns: the source's own names of `images`, `prompt`, `completion` and `answer`, where they differ.

    Raises:
        InputError: it cannot be read, or has no rows, or not the columns.
    """
    rows = _rows(source, split, samples, seed, streaming, shuffle_buffer)
    rows = _renamed(rows, columns, source) if columns else rows
    path = Path(source)
    if source in BUILT_IN_DATA or not path.exists():
        return rows
    return _beside(rows, path if path.is_dir() else path.parent)


def _rows(source: str, split: str, samples: int | None, seed: int, streaming: bool, shuffle_buffer: int) -> Any:
    if shuffle_buffer and not streaming:
        raise InputError(f"a shuffle buffer of {shuffle_buffer} rows is of a stream: add --streaming.")
    if streaming:
        held = source in BUILT_IN_DATA
        rows = _rows(source, split, samples, seed, False, 0) if held else _read(source, split, streaming)
        stream = rows.to_iterable_dataset() if hasattr(rows, "to_iterable_dataset") else rows
        stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else stream
        return stream.take(samples) if samples else stream
    if source in BUILT_IN_DATA:
        from skipit.train.reference.data import reference_dataset
        from skipit.train.reference.documents.data import conversations_dataset, documents_dataset

        drawn: dict[str, Callable[..., Any]] = {
            REFERENCE: reference_dataset,
            DOCUMENTS: documents_dataset,
            CONVERSATIONS: conversations_dataset,
        }
        try:
            return drawn[source](split, samples or 1000, seed)
        except ValueError as error:
            raise InputError(str(error)) from error
    rows = _read(source, split)
    if len(rows) == 0:
        raise InputError(f"data {source!r}, split {split!r}: no rows.")
    return rows.select(range(min(samples, len(rows)))) if samples else rows


def _renamed(rows: Any, columns: Mapping[str, str], source: str) -> Any:
    # A stream may not know them before its first row.
    has = list(rows.column_names or next((row for row in rows if DAMAGE not in row), columns.values()))
    for ours, theirs in columns.items():
        if theirs not in has:
            raise InputError(f"data {source!r} has no column {theirs!r} for `{ours}`; found: {', '.join(has)}.")
        if ours in has and ours != theirs:
            raise InputError(f"data {source!r}: `{ours}` is to be {theirs!r}, but it has a column {ours!r} already.")
    names = {theirs: ours for ours, theirs in columns.items() if ours != theirs}
    # Rows of a stream without features need not all have every column.
    return rows.map(partial(_rename, names=names)) if rows.features is None else rows.rename_columns(names)


def _rename(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in row.items()}


def _beside(rows: Any, folder: Path) -> Any:
    """Rows whose files' names, where they have such, are looked for in a folder too."""
    features = rows.features
    if features is None:
        return rows.map(partial(_place_row, folder=folder))
    named = [name for name in _MEDIA if name in features and not _decodes(features[name])]
    if not named:
        return rows
    if hasattr(rows, "with_transform"):
        return rows.with_transform(partial(_place_row, folder=folder))
    return rows.map(partial(_place_row, folder=folder))


def _decodes(feature: Any) -> bool:
    """Whether `datasets` itself makes pictures of a column."""
    return _decodes(feature.feature) if hasattr(feature, "feature") else hasattr(feature, "decode_example")


def _place_row(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row, or a batch of them."""
    return {name: _placed(value, folder) if name in _MEDIA else value for name, value in row.items()}


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return BesideData(value, folder)
    if isinstance(value, list):
        return [_placed(one, folder) for one in value]
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return {**value, "path": BesideData(value["path"], folder)}
    return value


def load_held_out(
    source: str | None, data: str, split: str, samples: int, seed: int, columns: Mapping[str, str] | None = None
) -> Any:
    """Rows that training does not see.

    Args:
        source: where they are; None is another split of `data`.
        data: what is trained on.
        split: of the source.
        samples: at most this many rows.
        seed: of what is built in.
        columns: see `load_data`.

    Raises:
        InputError: they cannot be read, or `data` has one split only.
    """
    path = Path(data)
    if source is None and data not in BUILT_IN_DATA and (path.is_file() or (path / "dataset_info.json").is_file()):
        raise InputError(f"data {data!r} has one split, which is trained on. Name held-out rows: --calibration-data.")
    return load_data(source or data, split, samples, seed, columns=columns)


def _read(source: str, split: str, streaming: bool = False) -> Any:
    import datasets

    path = Path(source)
    refusal, gone = f"data {source!r}, split {split!r}, cannot be read: ", missing(path)
    if gone and (path.suffix in _FILES or is_path(source)):
        raise InputError(f"{refusal}{gone}\n{_KINDS}")
    if streaming and path.suffix == ".jsonl" and path.is_file():
        return datasets.IterableDataset.from_generator(_lines, gen_kwargs={"path": str(path)})
    try:
        with _quietly():
            if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
                loaded = datasets.load_from_disk(source)
            elif path.suffix in _FILES and path.exists():
                # A file is one split, whatever one wants to call it.
                loaded = datasets.load_dataset(
                    _FILES[path.suffix], data_files=source, split="train", streaming=streaming
                )
            else:
                loaded = datasets.load_dataset(source, split=split, streaming=streaming)
    except Exception as error:  # `datasets` raises errors of many libraries
        if "corresponds to no data" in str(error):
            raise InputError(f"data {source!r}, split {split!r}: no rows.") from error
        if path.suffix == ".jsonl" and (bad := next((row for row in _lines(source) if DAMAGE in row), None)):
            raise InputError(f"{refusal}{bad[DAMAGE]}\n{_KINDS}") from error
        raise InputError(f"{refusal}{gone}{gone and ' '}{type(error).__name__}: {error}\n{_KINDS}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise InputError(f"data {source!r} has no split {split!r}; found: {', '.join(loaded)}.")
    return loaded[split]


def _lines(path: str) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file; one that says why stands for a damaged line."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
                if row is not None and not isinstance(row, dict):
                    raise ValueError(f"got a {type(row).__name__}, expected an object: {{...}}")
            except (ValueError, RecursionError) as error:
                row = {DAMAGE: f"{path}, line {number}: {error}: {line[:60]!r}"}
            if row is not None:
                yield row


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the bars and log lines of `datasets`; what goes wrong is in its errors, and downloads keep their bars."""
    import datasets
    from datasets.utils import logging

    level, bars = logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
