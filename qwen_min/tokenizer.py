"""Qwen's byte-level BPE tokenizer, read from `tokenizer.json`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from torch import Tensor

from qwen_min import habits, load
from qwen_min.config import how_to_fetch, read_object

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
"""The system message that Qwen2.5's own chat template puts where none is given."""

ROLES = ("system", "user", "assistant")
OF_A_TURN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""The tokens that begin and end what somebody says; none may stand in a message."""

ANSWER = "<|im_start|>assistant\n"
"""What the assistant's answer follows."""

OTHERS = ("WordLevel", "WordPiece", "Unigram")
"""Kinds of tokenizer that the library knows besides BPE."""


class Tokenizer:
    """Text to token ids and back.

    Args:
        path: a `tokenizer.json`.

    Raises:
        ValueError: the file is missing or is not a tokenizer; the message names it.
    """

    def __init__(self, path: str | Path):
        self.path = path = load.expanded(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file: expected a model's tokenizer.json{how_to_fetch(path)}")
        try:
            text = path.read_bytes().decode()
            fault = _fault(json.loads(text))
            if not fault:
                self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the library raises bare Exception, and a panic of its Rust is not even that
            fault = f"not a tokenizer ({' '.join(str(e).split())[:200]})"
        if fault:
            raise ValueError(f"{path}: {fault}: expected Qwen's, a BPE")
        # A file may ask for truncation or padding; ids here are the text's, all of it and nothing else.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

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

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """The text of token ids, special tokens left out by default; bytes that are not UTF-8 become U+FFFD."""
        numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return self._tokenizer.decode(numbers, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, rows: Sequence[Sequence[int] | Tensor] | Tensor, skip_special_tokens: bool = True
    ) -> list[str]:
        """The text of each row of token ids, as `decode`."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __call__(
        self, text: str | Sequence[str], *, return_tensors: str | None = None, padding: bool = False, **others: Any
    ) -> habits.Encoding:
        """`input_ids` and `attention_mask` of a text, or of each of several.

        Args:
            text: one or several.
            return_tensors: "pt" for tensors (B, T), None for lists.
            padding: to one length, at the start of a row, where `generate` wants it.
        """
        habits.refuse("tokenizer(text)", others)
        rows = [self.encode(one) for one in ([text] if isinstance(text, str) else text)]
        return habits.encoding(rows, isinstance(text, str), return_tensors, padding, self.pad_token_id)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = None,
        **others: Any,
    ) -> Any:
        """A conversation in Qwen2.5's chat format: see `chat`, whose errors these are.

        Args:
            conversation: messages {"role": "user", "content": TEXT}.
            tokenize: False for the text, True for its ids.
            add_generation_prompt: end where the assistant's answer begins.
            return_dict: ids as `tokenizer(text)` returns them; False for them alone.
            return_tensors: "pt" for tensors (1, T), None for lists.
        """
        habits.refuse("apply_chat_template", others)
        text = self.chat(habits.turns(conversation))
        text = text if add_generation_prompt else text.removesuffix(ANSWER)
        if not tokenize:
            return text
        ids = self(text, return_tensors=return_tensors)
        return ids if return_dict else ids.input_ids

    def token_id(self, token: str) -> int:
        """The id of one token, such as "<|im_end|>"; ValueError where the vocabulary lacks it."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{self.path}: has no token {token!r}: expected the tokenizer of a Qwen2.5")
        return number

    @cached_property
    def eos_token(self) -> str:
        """The token that ends a text: that of the tokenizer_config.json beside the file, or "<|im_end|>"."""
        beside = self.path.with_name("tokenizer_config.json")
        token = read_object(beside, "a JSON object").get("eos_token") if beside.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else "<|im_end|>"

    @property
    def eos_token_id(self) -> int:
        return self.token_id(self.eos_token)

    @property
    def pad_token_id(self) -> int:
        return self.token_id("<|endoftext|>")

    def check_fits(self, vocab_size: int) -> None:
        """Raise ValueError where an id is beyond a model's vocabulary, as with the tokenizer of another model."""
        if self._largest >= vocab_size:
            rule = f"ids below {vocab_size}, the model's vocab_size"
            raise ValueError(f"{self.path}: has the id {self._largest}: expected {rule}")

    @cached_property
    def _largest(self) -> int:
        return max(self._tokenizer.get_vocab().values(), default=0)

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
        """Qwen2.5's chat format (ChatML) for (role, text) pairs, ending where the assistant's answer begins.

        Raises:
            ValueError: another role, or a text that holds a token which ends its turn: what follows would be read as
                said by somebody else. Transformers' template lets it through.
        """
        for role, text in messages:
            if role not in ROLES:
                raise ValueError(f"role is {role!r:.60}: expected one of {', '.join(ROLES)}")
            for token in OF_A_TURN:
                if token in text:
                    raise ValueError(f"the text of the {role} holds {token}: expected none of {', '.join(OF_A_TURN)}")
        if not messages or messages[0][0] != "system":
            messages = [("system", SYSTEM), *messages]
        turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)
        return turns + ANSWER


def _fault(file: Any) -> str:
    """What is wrong with a tokenizer.json that the library would panic at, or worse: "" if nothing.

    It slices the second part of a merge by the length of the prefix, and writes what a merge makes into a buffer as
    long as the longest token, both unchecked: some files end the process.
    """
    model = file.get("model") if isinstance(file, dict) else None
    if not isinstance(model, dict) or "merges" not in model and "type" not in model:
        return "not a tokenizer (it has no model)"
    if (kind := model.get("type", "BPE")) != "BPE":
        return f"is a {kind} tokenizer" if kind in OTHERS else f"not a tokenizer (its type is {ascii(kind):.40})"
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            return f"its {name} is {model[name]!r:.40}, not null"
    tokens, merges = model.get("vocab"), model.get("merges")
    if not isinstance(tokens, dict) or not isinstance(merges, list):
        return "not a tokenizer (it has no vocab and merges)"
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    for pair in pairs:
        if len(pair) != 2 or pair[0] + pair[1] not in tokens:
            return f"not a tokenizer (the merge {ascii(pair):.60} makes no token)"
    return ""
