"""How many tokens a .jsonl of training examples holds: by a tokenizer, or by a stated rule of characters per token."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError

CHARS_PER_TOKEN = 4.0
"""Of English text, about (OpenAI, "What are tokens and how to count them?"); other languages and code take more."""

# What a line may hold, in the order in which it is looked for: the columns that TRL 1.16 reads (dataset formats
# "language modeling" and "prompt-completion"), then those of common instruction sets.
_CHAT = ("messages", "conversations")
_TEXTS = (("text",), ("prompt", "completion"), ("instruction", "input", "output"), ("question", "answer"), ("content",))
_CONTENT = ("content", "value")


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Lengths of a file's examples, in tokens."""

    path: str
    lengths: tuple[tuple[int, int], ...]
    """(tokens, examples of that length), shortest first."""
    rule: str
    """How they were counted, to be shown."""

    @property
    def num_samples(self) -> int:
        return sum(count for _, count in self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(length * count for length, count in self.lengths)

    @property
    def longest(self) -> int:
        return self.lengths[-1][0]

    def num_longer_than(self, seq_len: int) -> int:
        """Examples that will be cut."""
        return sum(count for length, count in self.lengths if length > seq_len)

    def truncated(self, seq_len: int) -> TokenCounts:
        """The same with every example cut to `seq_len` tokens."""
        cut: Counter[int] = Counter()
        for length, count in self.lengths:
            cut[min(length, seq_len)] += count
        return TokenCounts(self.path, tuple(sorted(cut.items())), self.rule)

    def padded_length(self, micro_batch_size: int) -> float:
        """Expected length of the longest of `micro_batch_size` examples drawn at random, to which the others are
        padded: the sum over lengths l of l * (F(l)**n - F(l-)**n), F the share of examples no longer than l."""
        total, below, expected = self.num_samples, 0, 0.0
        for length, count in self.lengths:
            share = ((below + count) / total) ** micro_batch_size - (below / total) ** micro_batch_size
            expected += length * share
            below += count
        return expected


def count_tokens(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    chars_per_token: float = CHARS_PER_TOKEN,
    text_field: str | None = None,
) -> TokenCounts:
    """Token counts of every line of `path`, one JSON object each.

    Args:
        path: the .jsonl file.
        tokenizer: a tokenizer.json or its folder (read by the package `tokenizers`); without one, characters are
            divided by `chars_per_token`. What a chat template adds is not counted.
        chars_per_token: the rule where there is no tokenizer.
        text_field: the key that holds the text, where it is none of the usual ones.

    Raises:
        MemplanError: the file or tokenizer cannot be read, or a line is not an example, named by its number.
    """
    if not chars_per_token > 0:
        raise MemplanError(f"characters per token must be above zero, not {chars_per_token:g}")
    path = Path(path)
    length = _tokenizer(tokenizer) if tokenizer is not None else _rule(chars_per_token)
    lengths: Counter[int] = Counter()
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    lengths[length(_text(line, f"{path}: line {number}", text_field))] += 1
    except OSError as error:
        raise MemplanError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise MemplanError(f"{path}: not UTF-8 text", hints=["a dataset is JSON lines, one example a line"]) from None
    if not lengths or not any(lengths):
        raise MemplanError(f"{path}: no tokens in it")
    rule = f"tokenizer {Path(tokenizer).name}" if tokenizer is not None else f"{chars_per_token:g} characters a token"
    return TokenCounts(str(path), tuple(sorted(lengths.items())), rule)


def _rule(chars_per_token: float) -> Callable[[str], int]:
    return lambda text: -int(-len(text) // chars_per_token)


def _tokenizer(where: str | Path) -> Callable[[str], int]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MemplanError(
            "counting with a tokenizer needs the package `tokenizers`",
            hints=["pip install tokenizers", f"or leave it out: {CHARS_PER_TOKEN:g} characters count as a token"],
        ) from None
    path = Path(where)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        made = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a missing or broken file
        raise MemplanError(
            f"{path}: no tokenizer can be read from it: {str(error).splitlines()[0]}",
            hints=["give a tokenizer.json, or the folder that holds it"],
        ) from None
    return lambda text: len(made.encode(text))


def _text(line: str, where: str, text_field: str | None) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise MemplanError(f"{where}: not JSON: {_reason(error)}") from None
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise MemplanError(f"{where}: not an object")
    parts = list(_parts(row, text_field))
    if not parts:
        wanted = f"`{text_field}`" if text_field else "`text`, `messages`, `prompt` and `completion`, …"
        keys = ", ".join(f"`{key}`" for key in list(row)[:8]) or "no keys"
        raise MemplanError(f"{where}: none of {wanted} in it, but {keys}", hints=["name the key with --text-field"])
    return "\n".join(parts)


def _reason(error: ValueError) -> str:
    """Where in the line, which the decoder counts from 1 again."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos + 1}"
    return str(error)


def _parts(row: dict[str, Any], text_field: str | None) -> Iterator[str]:
    """The texts of one example."""
    if text_field is not None:
        yield from _strings(row.get(text_field))
        return
    for name in _CHAT:
        if isinstance(row.get(name), list):
            yield from _strings(row[name])
            return
    for names in _TEXTS:
        if any(name in row for name in names):
            for name in names:
                yield from _strings(row.get(name))
            return


def _strings(value: Any) -> Iterator[str]:
    """A text; a list of texts or messages; a message, whose text is under `content` or `value`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for name in (*_CONTENT, "text"):
            if name in value:
                yield from _strings(value[name])
                return
