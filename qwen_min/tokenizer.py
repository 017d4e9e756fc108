"""Qwen's byte-level BPE tokenizer, read from `tokenizer.json`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from qwen_min import load

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
"""The system message that Qwen2.5's own chat template puts where none is given."""


class Tokenizer:
    """Text to token ids and back.

    Args:
        path: a `tokenizer.json`.

    Raises:
        ValueError: the file is missing or is not a tokenizer; the message names it.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file: expected a model's tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            reason = " ".join(str(e).split())[:200]
            raise ValueError(f"{path}: not a tokenizer ({reason}): expected a model's tokenizer.json") from None
        # A file may ask for truncation or padding; ids here are the text's, all of it and nothing else.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.path = path

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, revision: str | None = None, offline: bool = False
                        ) -> "Tokenizer":
        """The tokenizer of a folder or hub id; arguments as `Qwen.from_pretrained`."""
        return cls(load.resolve(name_or_folder, revision, offline) / "tokenizer.json")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added, special tokens written out in it are recognised."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of one token, such as "<|im_end|>"; ValueError where the vocabulary lacks it."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{self.path}: has no token {token!r}")
        return number

    def __len__(self) -> int:
        """How many tokens there are, special ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """The text of ids as they come, held back while a character's bytes are incomplete."""
        pending: list[int] = []
        for number in ids:
            pending.append(number)
            text = self.decode(pending)
            if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(pending) > 8:
                yield text
                pending = []
        if pending:
            yield self.decode(pending)

    @staticmethod
    def chat(messages: Sequence[tuple[str, str]]) -> str:
        """Qwen2.5's chat format (ChatML) for (role, text) pairs, ending where the assistant's answer begins."""
        if not messages or messages[0][0] != "system":
            messages = [("system", SYSTEM), *messages]
        turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)
        return turns + "<|im_start|>assistant\n"
