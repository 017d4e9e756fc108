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
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the library raises bare Exception, and a panic of its Rust is not even that
            reason = " ".join(str(e).split())[:200]
            raise ValueError(f"{path}: not a tokenizer ({reason}): expected a model's tokenizer.json") from None
        if not isinstance(self._tokenizer.model, tokenizers.models.BPE):
            raise ValueError(f"{path}: is a {type(self._tokenizer.model).__name__} tokenizer: expected Qwen's, a BPE")
        # A file may ask for truncation or padding; ids here are the text's, all of it and nothing else.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.path = path

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, revision: str | None = None, offline: bool = False
    ) -> "Tokenizer":
        """The tokenizer of a folder or hub id; arguments as `Qwen.from_pretrained`."""
        return cls(load.resolve(name_or_folder, revision, offline) / "tokenizer.json")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added, special tokens written out in it are recognised.

        Raises:
            ValueError: it is no text: it holds a lone surrogate, which Python makes of bytes that are not UTF-8.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as e:
            raise ValueError(f"{ascii(text)[:80]} cannot be encoded ({e}): expected Unicode text") from None

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
        """The text of ids as they come, a character held back until its bytes are complete: pieces of `decode(ids)`."""
        pending: list[int] = []
        shown = 0  # characters of the pending ids' text that are out already
        for number in ids:
            pending.append(number)
            text = self.decode(pending)
            # Of the bytes to come only the last U+FFFD can change: it is a character's beginning, or never will be one.
            certain = text.removesuffix("\N{REPLACEMENT CHARACTER}")
            if len(certain) > shown:
                yield certain[shown:]
            shown = max(shown, len(certain))
            if certain == text:
                pending, shown = [], 0
        rest = self.decode(pending)[shown:]
        if rest:
            yield rest

    @staticmethod
    def chat(messages: Sequence[tuple[str, str]]) -> str:
        """Qwen2.5's chat format (ChatML) for (role, text) pairs, ending where the assistant's answer begins."""
        if not messages or messages[0][0] != "system":
            messages = [("system", SYSTEM), *messages]
        turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)
        return turns + "<|im_start|>assistant\n"
