"""One picture, however a row has it: the pixels of transformers' `load_image`, or an error that says what is wrong."""

import base64
import io
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from skipit.eval.measure.answer import open_images
from skipit.router import InputError
from skipit.train.data.pictures import BesideData, read_picture
from skipit.train.data.rows import Broken, RowStream, films, pictures

UPRIGHT = Image.fromarray(np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3) * 2)


def saved(path: Path, image: Image.Image = UPRIGHT, turned: bool = True) -> str:
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    image.save(path, exif=exif)
    return str(path)


def transparent() -> Image.Image:
    image = UPRIGHT.convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(30, dtype=np.uint8).reshape(6, 5) * 8))
    return image


KINDS = {
    "RGB": UPRIGHT,
    "grey": UPRIGHT.convert("L"),
    "palette": UPRIGHT.convert("P"),
    "transparent": transparent(),
    "grey and transparent": transparent().convert("LA"),
    "one bit": UPRIGHT.convert("1"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turned", [False, True])
def test_every_way_gives_the_same_pixels(kind: str, turned: bool, tmp_path: Path, monkeypatch: Any) -> None:
    name = saved(tmp_path / "a photo.png", KINDS[kind], turned)
    data = Path(name).read_bytes()
    right = np.asarray(load_image(name))
    assert right.shape == ((5, 6, 3) if turned else (6, 5, 3))
    column = datasets.Dataset.from_dict({"images": [[name]]}).cast_column("images", datasets.List(datasets.Image()))
    stream = RowStream(column.to_iterable_dataset(), lambda row: row, Broken())
    monkeypatch.chdir(tmp_path)
    ways = {
        "name": name,
        "name from here": "a photo.png",
        "path": Path(name),
        "file URL": f"file://{name}",
        "beside the data": BesideData("a photo.png", tmp_path),
        "bytes": data,
        "bytearray": bytearray(data),
        "datasets, bytes": {"bytes": data, "path": None},
        "datasets, path": {"bytes": None, "path": name},
        "data URL": "data:image/png;base64," + base64.b64encode(data).decode(),
        "PIL, lazy": Image.open(name),
        "array": right,
        "tensor": torch.from_numpy(right.copy()),
        "channels first": np.moveaxis(right, -1, 0),
        "column": column[0]["images"][0],
        "stream": next(iter(stream))["images"][0],
        "command line": open_images([Path(name)])[0],
    }
    for way, given in ways.items():
        (read,) = pictures({"images": given}, "row 0")
        assert read.mode == "RGB"
        assert np.array_equal(np.asarray(read), right), way
        assert np.array_equal(np.asarray(pictures({"images": [given]}, "row 0")[0]), right), way
        assert np.array_equal(np.asarray(read_picture(read)), right), "reading again changes nothing"


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled(ending: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{ending}")
    for given in (tmp_path / f"ramp.{ending}", Image.fromarray(ramp), ramp):
        read = np.asarray(read_picture(given))
        assert np.array_equal(read, np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1))


@pytest.mark.parametrize("pixels", [np.zeros((4, 4), np.int32), np.zeros((4, 4), np.float32)])
def test_numbers_without_a_white_are_refused(pixels: Any) -> None:
    with pytest.raises(InputError, match="of which nothing says which is white"):
        read_picture(Image.fromarray(pixels))
    with pytest.raises(InputError, match=r"an array \[4, 4\] of (int32|float32); expected uint8 or uint16"):
        read_picture(pixels)


def refused(given: Any) -> str:
    with pytest.raises(InputError) as found:
        pictures({"images": [UPRIGHT, given]}, "row 7")
    assert str(found.value).startswith("row 7: image 1 cannot be read: ")
    assert len(str(found.value)) < 600
    return str(found.value)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    whole = io.BytesIO()
    UPRIGHT.save(whole, format="png")
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(bomb)
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    assert "could be decompression bomb" in refused(bomb)
    assert "could be decompression bomb" in refused({"bytes": bomb.read_bytes(), "path": None})
    assert "0 bytes" in refused(tmp_path / "empty.png")
    assert "0 bytes" in refused({"bytes": b"", "path": None})
    assert "is missing (None)" in refused(None)
    assert "is missing (None)" in refused({"bytes": None, "path": None})
    assert "is no file" in refused(tmp_path / "pipe.png"), "nothing is waited for"
    assert "is no file" in refused(tmp_path)
    for cut in (20, 45, 50):
        refused(whole.getvalue()[:cut])
    assert "is a URL, and only files are read" in refused("https://example.com/cat.png")
    assert "a data URL of 20022 characters is not base64" in refused("data:image/png;base64," + "?" * 20000)
    assert "No such file" in refused("x" * 5000)
    assert "No such file" in refused("a\0b.png")


def test_a_name_is_looked_for_here_and_beside_the_data(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    saved(folder / "cat.png")
    assert read_picture(BesideData("cat.png", folder)).size == (6, 5)
    said = refused(BesideData("cta.png", folder))
    assert f"No such file: neither cta.png nor {folder}/cta.png. Did you mean {folder}/cat.png?" in said
    saved(tmp_path / "cat.png", turned=False)
    assert read_picture(BesideData("cat.png", folder)).size == (5, 6), "what is here comes first"
    copied = pickle.loads(pickle.dumps(BesideData("cat.png", folder)))
    assert (copied, copied.folder) == ("cat.png", folder)


def test_videos(tmp_path: Path) -> None:
    name = saved(tmp_path / "frame.png")
    (film,) = films({"videos": [[name, UPRIGHT.transpose(Image.Transpose.ROTATE_270)]]}, "row 0")
    assert film.shape == (2, 5, 6, 3)
    (tmp_path / "film.mp4").write_bytes(b"x")
    assert films({"videos": BesideData("film.mp4", tmp_path)}, "row 0") == [str(tmp_path / "film.mp4")]
    for bad, message in (
        ([[name, UPRIGHT]], "row 0: video 0 cannot be read: its frames are not of one size"),
        ([[name, "no.png"]], "row 0: a frame of video 0 cannot be read: No such file"),
        ("no.mp4", "row 0: video 0 cannot be read: No such file"),
    ):
        with pytest.raises(InputError, match=message):
            films({"videos": bad}, "row 0")
