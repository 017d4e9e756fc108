"""Official safetensors weights into the model, strictly: a folder or hub id, one file or sharded. No pickle is read."""

import errno
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_min.config import QwenConfig, how_to_fetch, read_object
from qwen_min.habits import from_pretrained_options
from qwen_min.tensors import check_names, to_bytes, unreadable

_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
_FILES += ["*.safetensors", "model.safetensors.index.json"]
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def resolve(name_or_folder: str | Path, revision: str | None = None, offline: bool = False) -> Path:
    """The local folder of a model: the folder itself, or where the hub's cache keeps the id (fetched if it must be).

    Only config, tokenizer and safetensors files are fetched; the hub's library checks their digests and keeps each
    commit in a folder of its own, whose name is the pinned revision.

    Raises:
        ValueError: there is no such folder, or the id is not cached and cannot be fetched.
        OSError: the hub's cache cannot be written.
    """
    folder = expanded(name_or_folder)
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        rule = "a model's folder or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        raise ValueError(f"{name}: no such folder: expected {rule}")
    # Imported here: it takes a third of a second, and a local model needs nothing of it.
    from huggingface_hub import HfApi, constants, snapshot_download

    problem: Exception | None = None
    if not offline:
        try:  # asked with a time limit: the download has none, and waits minutes for a network that drops what is sent
            HfApi().repo_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as e:  # the library's own errors, its HTTP client's, and what changes with their versions
            problem = e
    try:
        local = offline or problem is not None
        return Path(snapshot_download(name, revision=revision, local_files_only=local, allow_patterns=_FILES))
    except Exception as e:
        if isinstance(e, OSError) and e.errno in _OF_THE_DISK:
            raise
        problem = problem or e
    # Outside of the handlers, so that the library's text is in no traceback either: it may quote a request's headers.
    why = "not cached, and offline was asked for" if offline else _reason(problem, revision)
    command = f"'hf download {name}'" + (f" with '--revision {revision}'" if revision else "")
    raise ValueError(f"{name}: {why}: expected the network or a cached copy; {command} fetches it, or name a folder")


def expanded(path: str | Path) -> Path:
    """The path, with a leading `~` as the user's home folder."""
    return Path(os.path.expanduser(path))


def _reason(problem: Exception, revision: str | None) -> str:
    """Why the hub's library found nothing: by the error's kind alone."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    kind, answer = type(problem).__name__, getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, RepositoryNotFoundError):
        return "the hub has no such model, or it is private"
    if isinstance(problem, RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it"
    if answer is not None:
        return f"could not be fetched: the hub answered {answer}"
    if {"ConnectionError", "TransportError", "Timeout"} & {base.__name__ for base in type(problem).__mro__}:
        return f"could not be fetched: the network could not be reached ({kind})"
    return f"could not be fetched ({kind})"


def from_pretrained(cls, name_or_folder, dtype, device, revision, offline, compute_dtype, others):
    """See `Qwen.from_pretrained`, whose arguments these are."""
    dtype, device, offline = from_pretrained_options(dtype, device, offline, others)
    dtype, compute_dtype = _float("dtype", dtype), _float("compute_dtype", compute_dtype)
    folder = resolve(name_or_folder, revision, offline)
    config = QwenConfig.from_file(folder / "config.json")
    with torch.device("meta"):  # shapes without memory; the mapped tensors then become the parameters
        model = cls(config)
    expected = model.state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    tensors = read_tensors(folder, expected, dtype, device)
    model.load_state_dict(tensors, strict=False, assign=True)  # read_tensors was strict already
    model.tie_weights()
    model.stop_ids = stop_ids(folder, config.vocab_size)
    if compute_dtype is not None:
        model.model.embed_tokens.compute_dtype = compute_dtype
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases: a few kilobytes, which each forward would widen again
                parameter.data = parameter.to(compute_dtype)
    return model.eval()


def stop_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, or of config.json; without those that are no token of the model."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        if path.is_file() and (given := read_object(path, "a JSON object").get("eos_token_id")) is not None:
            ids = given if isinstance(given, list) else [given]
            if not all(type(number) is int for number in ids):
                raise ValueError(f"{path}: eos_token_id is {given!r:.200}: expected a token's id, or a list of them")
            return tuple(number for number in ids if 0 <= number < vocab_size)
    return ()


def save_pretrained(model, folder: Path) -> None:
    """See `Qwen.save_pretrained`."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    own = [name for name in state if name == "logit_bias" or name.rpartition(".")[2].startswith("lora_")]
    if own:
        raise ValueError(f"the model has {own[0]}, which is no weight of Qwen2: expected LoRA merged, no logit bias")
    stored = str(state["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    ids = list(model.stop_ids)
    stops = {"eos_token_id": ids if len(ids) > 1 else ids[0]} if ids else {}
    config = json.dumps(model.config.to_dict() | {"torch_dtype": stored} | stops, indent=2)
    (folder / "config.json").write_text(f"{config}\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(to_bytes(state))


def _float(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A type that weights can be kept in, given as such or by its name; None is that of their file, as "auto"."""
    known = {"auto": None} | {str(kind).removeprefix("torch."): kind for kind in _FLOATS.values()}
    if dtype not in (*known, *known.values()):
        raise ValueError(f"{name} is {dtype!r:.200}: expected one of {', '.join(known)}")
    return known[dtype] if isinstance(dtype, str) else dtype


def read_tensors(
    folder: Path, expected: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device | str
) -> dict[str, Tensor]:
    """Every tensor of `expected`, and nothing else, from `folder`, as `dtype` (None: as stored) on `device`.

    The files are mapped: a tensor that is wanted as it is stored is never copied, another is converted one by one,
    so that one copy of the weights is held.
    """
    files = weight_files(folder)
    where: dict[str, Path] = {}
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in where:
                    twice = f"{listed([name])} stands in {where[name].name} too"
                    raise ValueError(f"{path}: tensor {twice}: expected it once")
                where[name] = path
    odd = {"missing": expected.keys() - where.keys(), "unexpected": where.keys() - expected.keys()}
    if complaints := [f"{what} {listed(names)}" for what, names in odd.items() if names]:
        held, rule = files[0] if len(files) == 1 else folder, f"those of the {len(expected)} that config.json asks for"
        raise ValueError(f"{held}: tensors {'; '.join(complaints)}: expected {rule}")
    tensors: dict[str, Tensor] = {}
    misshapen = []
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                shape, kind = list(stored.get_shape()), stored.get_dtype()
                if kind not in _FLOATS:
                    raise ValueError(f"{path}: tensor {name} is of type {kind}: expected one of {', '.join(_FLOATS)}")
                if shape != list(expected[name].shape):
                    misshapen.append(f"{name} {shape}, not {list(expected[name].shape)}")
                elif not misshapen:
                    # Moved, then converted: in one call a GPU's tensor would be converted here first, in a copy.
                    tensors[name] = file.get_tensor(name).to(device).to(dtype or _FLOATS[kind])
    if misshapen:
        raise ValueError(f"{folder}: misshapen tensors {listed(misshapen)}: expected the shapes of config.json")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: those its index names, or `model.safetensors`."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        rule = f"it, or {index.name} and the files it names{how_to_fetch(single)}"
        raise ValueError(f"{single}: no such file: expected {rule}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not an index: expected a JSON object with a weight_map") from None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{index}: names the file {name!r}: expected the plain name of a .safetensors file")
        if not (folder / name).is_file():
            rule = f"it, as {index.name} names it{how_to_fetch(index)}"
            raise ValueError(f"{folder / name}: no such file: expected {rule}")
    if not names:
        raise ValueError(f"{index}: names no file: expected at least one")
    return [folder / name for name in names]


def _open(path: Path):
    try:
        file = safe_open(path, framework="pt")
        check_names(path)
        return file
    except (SafetensorError, OSError) as e:
        raise unreadable(path, e) from None


def listed(names) -> str:
    """The first four; a name comes from a file, so what would break the line or fill the screen is escaped and cut."""
    names = sorted(names)
    shown = [name if name.isprintable() and len(name) < 200 else ascii(name[:200]) for name in names[:4]]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
