"""What people type who come from Hugging Face: its names for options of ours, and what to write where there is none."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_min import generate as plain

INSTEAD = {
    "max_length": "max_new_tokens, which counts new tokens alone",
    "num_beams": "greedy choice or a temperature",
    "num_return_sequences": "the prompt several times in the batch",
    "streamer": "qwen_min.generate.stream, which yields each step's tokens",
    "generation_config": "its values as arguments",
    "stopping_criteria": "stop, the ids of tokens that end a text",
    "use_cache": "nothing: there is always a cache",
    "trust_remote_code": "nothing: no code of a model is ever run",
    "attn_implementation": "nothing, or qwen_min.fast.off() for the plain maths",
    "quantization_config": 'dtype="bfloat16"',
    "cache_dir": "the variable HF_HUB_CACHE of the environment",
    "truncation": "a slice of the text, or of its ids",
    "tools": "their description in the system message",
    "chat_template": "the text itself, to tokenizer(text): the template is Qwen2.5's",
}
"""Options of Hugging Face's that are none here, and what to write instead."""


class Encoding(dict[str, Any]):
    """Token ids of texts: `input_ids` and `attention_mask` (1 for a token, 0 for padding), as keys and attributes."""

    @property
    def input_ids(self) -> Any:
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        return self["attention_mask"]

    def to(self, device: torch.device | str) -> "Encoding":
        """A copy with its tensors on a device."""
        return Encoding({name: value.to(device) for name, value in self.items()})


def encoding(rows: list[list[int]], single: bool, return_tensors: str | None, padding: bool, pad_id: int) -> Encoding:
    """The ids of texts as lists, or as tensors (B, T); padding comes first in a row, where `generate` wants it."""
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors is {return_tensors!r:.200}: expected 'pt', or None for lists")
    if padding or return_tensors:
        longest = max(map(len, rows), default=0)
        if not padding and any(len(row) != longest for row in rows):
            raise ValueError("the texts have unequal numbers of tokens: expected padding=True")
    mask = [[1] * len(row) for row in rows]
    if padding:
        mask = [[0] * (longest - len(row)) + one for row, one in zip(rows, mask, strict=True)]
        rows = [[pad_id] * (longest - len(row)) + row for row in rows]
    if return_tensors:
        return Encoding(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask))
    return Encoding(input_ids=rows[0] if single else rows, attention_mask=mask[0] if single else mask)


def turns(conversation: Any) -> list[tuple[str, str]]:
    """(role, text) of each message {"role": ..., "content": ...}; ValueError names the first that is another thing."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise ValueError(f"the conversation is {conversation!r:.80}: expected a list of messages")
    for number, message in enumerate(conversation, 1):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            rule = '{"role": "user", "content": TEXT} and nothing else'
            raise ValueError(f"message {number} is {message!r:.80}: expected {rule}")
        if more := sorted(map(str, message.keys() - {"role", "content"})):
            raise ValueError(f"message {number} has {more[0]!r:.80}: expected role and content alone")
    return [(message["role"], message["content"]) for message in conversation]


def refuse(function: str, options: Mapping[str, Any]) -> None:
    """Raise TypeError, as Python does, for options that a function does not have; it says what to write instead."""
    for name in options:
        hint = f": expected {INSTEAD[name]}" if name in INSTEAD else ""
        raise TypeError(f"{function} has no option {name!r}{hint}")


def from_pretrained_options(dtype: Any, device: Any, offline: bool, others: Mapping[str, Any]) -> tuple[Any, Any, bool]:
    """(dtype, device, offline), where `others` may give them as torch_dtype, device_map and local_files_only."""
    others = dict(others)
    dtype, offline = others.pop("torch_dtype", dtype), others.pop("local_files_only", offline)
    device = others.pop("device_map", device)
    refuse("from_pretrained", others)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str | torch.device | int):
        raise ValueError(f"device_map is {device!r:.200}: expected one device, such as 'cuda'")
    return dtype, device, offline


def generate(
    model,
    ids: Tensor | Sequence[Sequence[int]] | Encoding | None = None,
    max_new_tokens: int | None = None,
    *,
    stop: Sequence[int] | int | None = None,
    pad_id: int | None = None,
    temperature: float | None = None,
    do_sample: bool | None = None,
    input_ids: Tensor | Sequence[Sequence[int]] | None = None,
    attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
    eos_token_id: Sequence[int] | int | None = None,
    pad_token_id: int | None = None,
    **options: Any,
) -> Tensor | list[list[int]]:
    """Prompt and new tokens up to one that ends the text, greedy by default: `generate.generate` by other names too.

    Args:
        model: a `Qwen`.
        ids, input_ids: (B, T) prompts of one length, a list of prompts of any lengths, or what a tokenizer returned.
        max_new_tokens: new tokens per prompt.
        stop, eos_token_id: tokens that end a prompt's generation; `model.stop_ids` by default, () for none.
        pad_id, pad_token_id: what fills a row after its stop token; the first of `stop` by default, 0 where it is ().
        temperature: 0 is greedy; 0 by default, 1 with `do_sample=True`.
        do_sample: whether to sample; by default as the temperature says.
        attention_mask: (B, T), 0 for padding at the start of a row, 1 for the rest.
        options, and what is returned: as in `generate.generate`.

    Raises:
        ValueError: as there, or options that contradict each other.
        TypeError: an option that there is not; it says what to write instead.
    """
    known = {"seed", "top_k", "top_p", "repetition_penalty"}
    refuse("generate", {name: value for name, value in options.items() if name not in known})
    if isinstance(ids, Encoding):
        attention_mask = ids.attention_mask
        ids = ids.input_ids
    prompts = _one("ids", ids, "input_ids", input_ids)
    if prompts is None or max_new_tokens is None:
        raise ValueError("generate has no " + ("prompts" if prompts is None else "max_new_tokens") + ": expected both")
    stop = _one("stop", stop, "eos_token_id", eos_token_id)
    stop = model.stop_ids if stop is None else (stop,) if isinstance(stop, int) else stop
    pad_id = _one("pad_id", pad_id, "pad_token_id", pad_token_id)
    pad_id = pad_id if pad_id is not None else stop[0] if stop else 0
    if temperature is None:
        temperature = 1.0 if do_sample else 0.0
    elif do_sample is not None and do_sample != (temperature > 0):
        raise ValueError(f"do_sample is {do_sample} and temperature {temperature}: expected one of the two alone")
    options |= {"stop": stop, "pad_id": pad_id, "temperature": temperature}
    if attention_mask is None:
        return plain.generate(model, prompts, max_new_tokens, **options)
    rows = _without_padding(prompts, attention_mask)
    made = plain.generate(model, rows, max_new_tokens, **options)
    if not isinstance(prompts, Tensor):
        return made
    new = [all_[len(row) :] for all_, row in zip(made, rows, strict=True)]
    width = max(map(len, new))
    filled = [row + [pad_id] * (width - len(row)) for row in new]
    return torch.cat((prompts, torch.tensor(filled, dtype=prompts.dtype, device=prompts.device)), 1)


def _one(ours: str, value: Any, theirs: str, other: Any) -> Any:
    """The one of two names of an option that is given."""
    if value is not None and other is not None:
        raise ValueError(f"{ours} and {theirs} are both given: expected one, as they are the same")
    return other if value is None else value


def _without_padding(prompts: Any, mask: Any) -> list[list[int]]:
    """The tokens of each row that its mask has a 1 for."""
    rows, ones = (x.tolist() if isinstance(x, Tensor) else list(x) for x in (prompts, mask))
    if not all(isinstance(row, Sequence) for row in (*rows, *ones)):
        raise ValueError("ids or attention_mask are not rows: expected those of tokenizer([TEXT, ...])")
    if [len(row) for row in rows] != [len(row) for row in ones]:
        raise ValueError("attention_mask has another shape than the ids: expected a 0 or 1 for each")
    if any(list(row) != [0] * row.count(0) + [1] * row.count(1) for row in ones):
        raise ValueError("attention_mask is not 0, then 1 in each row: expected padding at the start alone")
    return [list(row[one.count(0) :]) for row, one in zip(rows, ones, strict=True)]
