"""Verbs of the model itself: `generate`, `export`, `bench`, `pretrain-pocket`."""

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.accounting import predict
from experiments.run_folder import files
from experiments.settings.record import POCKET
from experiments.task.model import trained, trained_model
from experiments.verbs.common import adapter_of, gather, print_json, wrote
from lora import load_adapter, merge
from qwen_min import FlopMeter, Qwen, Tokenizer
from qwen_min.generate import stream
from qwen_min.habits import turns
from qwen_min.load import expanded, resolve


def generate(args: Namespace) -> None:
    settings, chat, as_json = gather(args), hasattr(args, "chat"), hasattr(args, "json")
    text = _asked(args)
    tokenizer = Tokenizer.from_pretrained(settings.model, settings.revision or None, settings.offline)
    model = trained_model(settings, adapter_of(args))
    tokenizer.check_fits(model.config.vocab_size)
    ids, new = tokenizer.encode(text), list[int]()
    if not ids:
        raise ValueError("the prompt is empty: expected text")
    if chat and settings.is_pocket:
        print("the pocket model cannot chat, it was never taught to: what follows is no answer", file=sys.stderr)

    def shown() -> Iterator[int]:
        prompt = torch.tensor([ids], device=model.device)
        options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.sample_seed}
        for step in stream(model, prompt, args.max_new_tokens, **options):
            new.append(int(step))
            if new[-1] in model.stop_ids:
                return
            yield new[-1]

    written = []
    try:
        with FlopMeter() as meter:
            for piece in tokenizer.stream(shown()):
                written.append(piece)
                print(end="" if as_json else piece, flush=True)
    except ValueError as e:  # of what its weights lead to
        raise ValueError(f"{settings.model}: {e}") from None
    if as_json:
        most = predict.generation(model.config, 1, len(ids), args.max_new_tokens, **trained(model))
        counts = {"prompt_tokens": len(ids), "new_tokens": len(new), "stopped": bool({*model.stop_ids} & {*new})}
        print_json({"text": "".join(written), **counts, "flops": meter.total, "most_flops": most})
    else:
        print()
    if settings.label:
        print(f"[{settings.label}]", file=sys.stderr)


def _asked(args: Namespace) -> str:
    """What the model reads: --prompt, standard input, or the conversation of --chat in Qwen's format."""
    given, system, where = (getattr(args, name, None) for name in ("prompt", "system", "chat"))
    if given is not None and where is not None:
        raise ValueError(f"--prompt stands beside --chat {where}: expected one of the two")
    if given is where is None and sys.stdin.isatty():
        raise ValueError("there is no prompt: expected --prompt TEXT, --chat FILE, or text on standard input")
    text = given if given is not None else _text(where or "-")
    if not hasattr(args, "chat"):
        if system is not None:
            raise ValueError("--system stands without --chat: expected both")
        return text.removesuffix("\n") if given is None else text
    name = "--prompt" if given is not None else "standard input" if where in (None, "-") else where
    try:
        messages = turns(json.loads(text)) if where else [("user", text)]
        if system is not None and messages[0][0] == "system":
            raise ValueError("it has a system message: expected none beside --system")
        return Tokenizer.chat(messages if system is None else [("system", system), *messages])
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{name}: not valid JSON: expected a list of messages") from None
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None


def _text(where: str) -> str:
    """The text of a file, or of standard input for "-"."""
    name = "standard input" if where == "-" else where
    try:
        return sys.stdin.read() if where == "-" else expanded(where).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not UTF-8: expected text") from None
    except OSError as e:
        raise ValueError(f"{name}: {e.strerror or e}: expected a file to read") from None


def bench(args: Namespace) -> None:
    from experiments.bench import scaling, session, table

    given, scales = vars(args), hasattr(args, "scaling")
    named = ("repeats", "dtype", "device", "compile", "series", "draft", "quick", "peer")
    asked: dict[str, Any] = {"peer": "none"} if scales else {}
    asked |= {"repeats": 1, "series": 6} if hasattr(args, "quick") else {}
    asked |= {name: given[name] for name in named if name in given}
    if hasattr(args, "what"):
        asked["whats"] = tuple(name for names in args.what for name in names.split(",") if name)
    folder = resolve(getattr(args, "model", POCKET), offline=hasattr(args, "offline"))
    options, out = session.Options(folder, **asked), Path(getattr(args, "out", "runs")) / "bench"
    measure, text = (scaling.scale, table.scaling_text) if scales else (session.bench, table.text)
    report = measure(options, out, lambda line: print(f"bench: {line}", file=sys.stderr, flush=True))
    if hasattr(args, "json"):
        print_json(report)
        return
    print(text(report), end="\n\n")
    wrote(out, *(("scaling.json", "scaling.csv", "scaling.png") if scales else ("bench.json", "bench.md", "bench.png")))


COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt"),
    *("generation_config.json", "LICENSE"),
)
"""What goes with the weights, where the base model's folder has it."""


def export(args: Namespace) -> None:
    """A base model with its adapter merged into it, as a folder that Hugging Face's libraries open."""
    settings, out, adapter = gather(args), Path(args.out), adapter_of(args)
    files.check_own(out, ("config.json", "model.safetensors", *COPIED))
    base = resolve(settings.model, settings.revision or None, settings.offline)
    model = Qwen.from_pretrained(base, settings.kept_in)
    if adapter:
        merge(load_adapter(model, adapter))
    with files.atomic_folder(out) as new:
        model.save_pretrained(new)
        for name in COPIED:
            if (base / name).is_file():
                shutil.copyfile(base / name, new / name)
        written = sorted(path.name for path in new.iterdir())
    wrote(out, *written)


def pretrain_pocket(args: Namespace) -> None:
    from experiments.training.pocket import pretrain

    options: dict[str, Any] = {name: getattr(args, name) for name in ("steps", "seed") if hasattr(args, name)}
    options |= {"start": Path(args.start)} if hasattr(args, "start") else {}
    out = Path(getattr(args, "out", POCKET))
    # Trained attention makes numbers so small that a step takes three times as long (measured). Threads that have begun
    # keep their way: so before all else.
    torch.set_flush_denormal(True)
    try:
        pretrain(out, progress=lambda line: print(line, file=sys.stderr, flush=True), **options)
    finally:
        torch.set_flush_denormal(False)
