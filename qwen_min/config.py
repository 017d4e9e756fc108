"""The shape of a Qwen2.5 model, under Hugging Face's field names, read from `config.json` or known by name."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The first six fields of a config and whether the head is tied, from the releases' own config.json
SIZES = {
    "0.5B": ((151936, 896, 4864, 24, 14, 2), True),
    "1.5B": ((151936, 1536, 8960, 28, 12, 2), True),
    "3B": ((151936, 2048, 11008, 36, 16, 2), True),
    "7B": ((152064, 3584, 18944, 28, 28, 4), False),
    "14B": ((152064, 5120, 13824, 48, 40, 8), False),
    "32B": ((152064, 5120, 27648, 64, 40, 8), False),
    "72B": ((152064, 8192, 29568, 80, 64, 8), False),
}


@dataclass(frozen=True)
class QwenConfig:
    """The hyperparameters of a dense Qwen2.5 decoder; every field is spelled as in Hugging Face's `config.json`.

    Raises:
        ValueError: a field is missing, of the wrong kind, inconsistent, or asks for what is not implemented; the
            message names the field, what it holds and what was expected.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        for name in (name for name, field in self.__dataclass_fields__.items() if field.type is int):
            value = getattr(self, name)
            # Bounds far above any model: a damaged file must not ask for a billion layers, or overflow a shape.
            most = 1024 if name == "num_hidden_layers" else 2**24
            if type(value) is not int or not 0 < value <= most:
                raise ValueError(f"{name} is {value!r:.200}: expected a positive whole number, at most {most}")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 1e300:
                raise ValueError(f"{name} is {value!r:.200}: expected a positive number below 1e300")
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError(f"tie_word_embeddings is {self.tie_word_embeddings!r:.200}: expected true or false")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            rule = f"an even head size for each of the {heads} heads of num_attention_heads"
            raise ValueError(f"hidden_size is {self.hidden_size}: expected {rule}")
        if heads % groups:
            rule = f"a divisor of num_attention_heads, which is {heads}"
            raise ValueError(f"num_key_value_heads is {groups}: expected {rule}")

    @property
    def head_dim(self) -> int:
        """D = hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def named(cls, name: str) -> "QwenConfig":
        """One of the seven released sizes, without weights: "Qwen2.5-0.5B", ..., "Qwen2.5-72B" ("-Instruct" too)."""
        size = name.removeprefix("Qwen/").removeprefix("Qwen2.5-").removesuffix("-Instruct")
        if size not in SIZES or "Qwen2.5-" not in name:
            known = ", ".join(f"Qwen2.5-{size}" for size in SIZES)
            raise ValueError(f"{name!r} is not a known size: expected one of {known}")
        sizes, tied = SIZES[size]
        return cls(*sizes, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=32768, tie_word_embeddings=tied)

    @classmethod
    def from_file(cls, path: Path) -> "QwenConfig":
        """Read a `config.json`, as transformers 4 or 5 writes it. Errors start with the file's name."""
        fields = read_object(path, f"a model's config.json{how_to_fetch(path)}")
        try:
            return cls.from_dict(fields)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "QwenConfig":
        """The fields of a `config.json`; what would change the maths and is not implemented is refused by name."""
        if fields.get("model_type") != "qwen2":
            raise ValueError(f"model_type is {fields.get('model_type')!r:.200}: expected 'qwen2'")
        _refuse_unsupported(fields)
        required = [name for name in cls.__dataclass_fields__ if name not in ("rope_theta", "tie_word_embeddings")]
        if missing := [name for name in required if name not in fields]:
            raise ValueError(f"{', '.join(missing)} missing: expected every size of the model")
        known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        # Hugging Face leaves out what equals its default, and its default for this flag is false.
        known.setdefault("tie_word_embeddings", False)
        config = cls(**(known | {"rope_theta": _rope_theta(fields)}))
        if fields.get("head_dim") not in (None, config.head_dim):
            rule = f"hidden_size / num_attention_heads, which is {config.head_dim}"
            raise ValueError(f"head_dim is {fields['head_dim']!r:.200}: expected {rule}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """A `config.json` that this class and transformers (4 and 5) read."""
        return asdict(self) | {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
        }


def read_object(path: str | Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file; ValueError names the file, what is wrong and what was `expected`."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}: expected {expected}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not valid JSON: expected {expected}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: holds {type(fields).__name__}: expected a JSON object")
    return fields


def how_to_fetch(path: Path, again: bool = False) -> str:
    """What to say of a file that a snapshot of the hub's cache lacks (or, with `again`, has): how it is fetched.

    Nothing for a file elsewhere.
    """
    found = re.fullmatch(r"models--(\w[\w.-]*?)--(\w[\w.-]*)", path.parents[2].name if len(path.parents) > 2 else "")
    if found is None or path.parents[1].name != "snapshots" or (path.exists() and not again):
        return ""
    return f"; 'hf download {found[1]}/{found[2]}' fetches it"


def _rope_theta(fields: dict[str, Any]) -> float:
    """The rotary base: `rope_parameters.rope_theta` (transformers 5) or `rope_theta` (4). No default is assumed."""
    if fields.get("rope_parameters") and fields.get("rope_scaling"):  # of which transformers would take the second
        raise ValueError(f"rope_scaling is {fields['rope_scaling']!r:.200}: expected null beside rope_parameters")
    given: list[Any] = [fields.get("rope_theta")]
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"{name} is {rope!r:.200}: expected an object, the same for every layer")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{name}.rope_type is {kind!r:.200}: expected 'default', the only one implemented")
        given.append(rope.get("rope_theta"))
    given = [theta for theta in given if theta is not None]
    if not given:
        raise ValueError("rope_theta is missing: expected it, or rope_parameters.rope_theta")
    if any(theta != given[0] for theta in given[1:]):
        raise ValueError(f"rope_theta is given as {' and '.join(map(repr, given)):.200}: expected one number")
    return given[0]


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    expected = {
        "hidden_act": ("silu", None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "attention_dropout": (0, None),
        "is_causal": (True, None),
    }
    for name, allowed in expected.items():
        if fields.get(name) not in allowed:
            rule = f"{json.dumps(allowed[0])}, the only one implemented"
            raise ValueError(f"{name} is {fields[name]!r:.200}: expected {rule}")
    kinds = fields.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"layer_types is {kinds!r:.200}: expected 'full_attention' in every layer")
