"""What the command line's MODEL and DATA may be."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skipit.router import InputError
from skipit.router.checkpoint import load_dense

REFERENCE = "reference"
_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_model(source: str, **options: Any) -> tuple[Any, Any]:
    """A dense model and its processor: `reference`, a folder, or a Hub id.

    Args:
        source: see above.
        **options: of transformers' `from_pretrained`, such as `dtype`; without one weights are as they are stored.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    return load_dense(resolve_model(source), **options)


def resolve_model(source: str) -> str:
    """The folder of `reference`, or the source itself."""
    if source != REFERENCE:
        return source
    from skipit.train.reference.model import WEIGHTS

    return str(WEIGHTS)


def name_model(source: str) -> str:
    """How a record names a model so that it is found from any folder."""
    return str(Path(source).resolve()) if source != REFERENCE and Path(source).is_dir() else source


def name_data(source: str) -> str:
    """How a record names data so that it is known from any folder."""
    return str(Path(source).resolve()) if source != REFERENCE and Path(source).exists() else source


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
        source: `reference`, a folder made by `Dataset.save_to_disk`, a .jsonl, .json or .parquet file, or a Hub id.
        split: of the data set; the reference has train, calibration and test. A file is one split.
        samples: at most this many rows; None is all (1,000 for the reference).
        seed: of the reference's random grids, and of the shuffle.
        streaming: rows are read one by one as they are asked for, and never all held; what is returned then has no
            length, and what cannot be read is found when it is reached.
        shuffle_buffer: of a stream, rows among which the next is drawn before `samples` are taken; 0 keeps the order.
        columns: the source's own names of `images`, `prompt`, `completion` and `answer`, where they differ.

    Raises:
        InputError: it cannot be read, or has no rows, or not the columns.
    """
    if columns:
        rows = load_data(source, split, samples, seed, streaming=streaming, shuffle_buffer=shuffle_buffer)
        return _renamed(rows, columns, source)
    if shuffle_buffer and not streaming:
        raise InputError(f"a shuffle buffer of {shuffle_buffer} rows is of a stream: add --streaming.")
    if streaming:
        rows = load_data(source, split, samples, seed) if source == REFERENCE else _read(source, split, streaming)
        stream = rows.to_iterable_dataset() if hasattr(rows, "to_iterable_dataset") else rows
        stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else stream
        return stream.take(samples) if samples else stream
    if source == REFERENCE:
        from skipit.train.reference.data import reference_dataset

        try:
            return reference_dataset(split, samples or 1000, seed)  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(str(error)) from error
    rows = _read(source, split)
    if len(rows) == 0:
        raise InputError(f"data {source!r}, split {split!r}: no rows.")
    return rows.select(range(min(samples, len(rows)))) if samples else rows


def _renamed(rows: Any, columns: Mapping[str, str], source: str) -> Any:
    has = list(rows.column_names or next(iter(rows), {}))  # a stream may not know them before its first row
    for ours, theirs in columns.items():
        if theirs not in has:
            raise InputError(f"data {source!r} has no column {theirs!r} for `{ours}`; found: {', '.join(has)}.")
        if ours in has and ours != theirs:
            raise InputError(f"data {source!r}: `{ours}` is to be {theirs!r}, but it has a column {ours!r} already.")
    return rows.rename_columns({theirs: ours for ours, theirs in columns.items() if ours != theirs})


def load_held_out(
    source: str | None, data: str, split: str, samples: int, seed: int, columns: Mapping[str, str] | None = None
) -> Any:
    """Rows that training does not see.

    Args:
        source: where they are; None is another split of `data`.
        data: what is trained on.
        split: of the source.
        samples: at most this many rows.
        seed: of the reference's random grids.
        columns: see `load_data`.

    Raises:
        InputError: they cannot be read, or `data` has one split only.
    """
    path = Path(data)
    if source is None and data != REFERENCE and (path.is_file() or (path / "dataset_info.json").is_file()):
        raise InputError(f"data {data!r} has one split, which is trained on. Name held-out rows: --calibration-data.")
    return load_data(source or data, split, samples, seed, columns=columns)


def _read(source: str, split: str, streaming: bool = False) -> Any:
    import datasets

    path = Path(source)
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
        raise InputError(
            f"data {source!r}, split {split!r}, cannot be read: {type(error).__name__}: {error}\n"
            "Give `reference`, a folder made by save_to_disk, a .jsonl or .parquet file, or a Hub id."
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise InputError(f"data {source!r} has no split {split!r}; found: {', '.join(loaded)}.")
    return loaded[split]


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
