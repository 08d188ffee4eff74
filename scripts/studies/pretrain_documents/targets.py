"""What the tower is to say of a page: which of the decoder's tokens belongs to each of its image tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipit.train.reference.documents.model import COLUMNS, HEIGHT, ROWS, TOKEN, WIDTH
from skipit.train.reference.documents.page import SIDE, Page
from skipit.train.reference.documents.words import WORDS

PUNCTUATION = "$ . , : ; - / ( ) % # & + = ? ! * @ '"
LABELS = (
    "Total Sum TOTAL Amount Balance Total due To pay Date Cashier Invoice To Item Quantity Street Open Call Tickets"
)
SENTENCES = "is are years old. lives in and works the of Average Largest Smallest Year Value Number total price"


@dataclass(frozen=True)
class Alphabet:
    """The tokens that the tower learns to read, as an alphabet of words.

    Args:
        tokenizer: the decoder's.
        common: how many of its most frequent words are among them, beside those of all word lists, digits and signs.
            A later sitting may name more: nothing in the model depends on it.
    """

    tokenizer: Any
    common: int = 800

    def ids(self, word: str) -> list[int]:
        """A word's tokens as after a space; a space that is a token of its own is left out."""
        ids = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return [i for i in ids if i != self.space]

    @cached_property
    def space(self) -> int:
        """The token of an empty place."""
        return int(self.tokenizer(" ", add_special_tokens=False)["input_ids"][0])

    @cached_property
    def newline(self) -> int:
        """The token at the end of every row."""
        return int(self.tokenizer("\n", add_special_tokens=False)["input_ids"][0])

    @cached_property
    def listed(self) -> list[str]:
        """Every word of the lists of all splits, and what layouts write beside them."""
        lists = [word for words in WORDS.values() for f in fields(words) for word in getattr(words, f.name)]
        return [*dict.fromkeys([*lists, *LABELS.split(), *SENTENCES.split()])]

    @cached_property
    def words(self) -> list[str]:
        """What pages of loose words are made of."""
        frequent = sorted(
            (number, token[1:])
            for token, number in self.tokenizer.get_vocab().items()
            if 3 <= len(token) <= 11 and token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha()
        )
        return [*dict.fromkeys([*self.listed, *(word for _, word in frequent[: self.common])])]

    @cached_property
    def unlisted(self) -> list[str]:
        """Frequent words that are on no list."""
        return self.words[len(self.listed) :]

    @cached_property
    def tokens(self) -> list[int]:
        """All token numbers, that of an empty place first."""
        signs = [piece for sign in PUNCTUATION.split() for piece in (f"a{sign}", f"{sign}1", f"1{sign}")]
        texts = [*self.words, *(f"{word}:" for word in self.listed), *signs, *"0123456789", "5%)", "5),", "x."]
        return [*dict.fromkeys([self.space, self.newline, *(i for text in texts for i in self.ids(text))])]


def tokens_of(page: Page, alphabet: Alphabet) -> NDArray[np.int64]:
    """The token at each image token, [`ROWS`, `COLUMNS`]: where its first character is, or the next free place.

    Digits are tokens of their own and narrower than an image token, so that a number runs on into the empty places
    behind it; the last place of a row is a line break.
    """
    grid = np.full((ROWS, COLUMNS), alphabet.space, dtype=np.int64)
    grid[:, -1] = alphabet.newline
    free = [0] * ROWS
    for word in page.words:
        row, at = _row(word.y), 0
        for token in alphabet.ids(word.text):
            column = max(free[row], _column(word.xs[min(at, len(word.xs) - 1)]))
            at += len(alphabet.tokenizer.decode([token]).strip())
            if column < COLUMNS - 1:
                grid[row, column] = token
                free[row] = column + 1
    return grid


def letters_of(page: Page) -> NDArray[np.int64]:
    """The character in each quarter of an image token, [2 * `ROWS`, 2 * `COLUMNS`]: 0 for none, else code - 31."""
    grid = np.zeros((2 * ROWS, 2 * COLUMNS), dtype=np.int64)
    for word in page.words:
        for letter, x in zip(word.text, word.xs, strict=True):
            grid[_row(word.y, 2), _column(x, 2)] = ord(letter) - 31
    return grid


def _row(y: float, parts: int = 1) -> int:
    return int(np.clip(y * HEIGHT / SIDE / TOKEN * parts, 0, ROWS * parts - 1))


def _column(x: float, parts: int = 1) -> int:
    return int(np.clip(x * WIDTH / SIDE / TOKEN * parts, 0, COLUMNS * parts - 1))


def shown(grid: NDArray[np.int64], alphabet: Alphabet) -> str:
    """A grid of tokens as text, for people."""
    rows: Sequence[Sequence[int]] = grid.tolist()
    tokens = alphabet.tokenizer.convert_ids_to_tokens
    return "\n".join("".join(tokens(row)[:-1]).replace("Ġ", " ").rstrip() for row in rows)
