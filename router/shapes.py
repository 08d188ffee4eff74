"""Stands in for jaxtyping in the code inside a checkpoint, which needs only torch and transformers."""

from typing import Any


class _Shaped:
    """`Float[Tensor, "batch seq"]` is `Tensor`: the shape is for the reader."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


Bool = Float = Int = Shaped = _Shaped
