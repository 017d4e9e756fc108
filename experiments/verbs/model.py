"""Verbs of the model itself: `generate`, `export`, `bench`, `pretrain-pocket`."""

import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.run_folder import files
from experiments.settings.record import POCKET
from experiments.task.model import trained_model
from experiments.verbs.common import adapter_of, gather, print_json, wrote
from lora import load_adapter, merge
from qwen_min import Qwen, Tokenizer
from qwen_min.generate import stream
from qwen_min.load import resolve


def generate(args: Namespace) -> None:
    settings, chat = gather(args), hasattr(args, "chat")
    tokenizer = Tokenizer.from_pretrained(settings.model, settings.revision or None, settings.offline)
    model = trained_model(settings, adapter_of(args))
    tokenizer.check_fits(model.config.vocab_size)
    ids = tokenizer.encode(Tokenizer.chat([("user", args.prompt)]) if chat else args.prompt)
    if not ids:
        raise ValueError("--prompt is empty: expected text")
    stops = {tokenizer.token_id(name) for name in ("<|im_end|>", "<|endoftext|>")}
    if chat and settings.is_pocket:
        print("the pocket model was never taught to chat: what follows is no answer", file=sys.stderr)

    def new() -> Iterator[int]:
        prompt = torch.tensor([ids], device=model.device)
        options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.sample_seed}
        for step in stream(model, prompt, args.max_new_tokens, **options):
            if (token := int(step)) in stops:
                return
            yield token

    try:
        for piece in tokenizer.stream(new()):
            print(piece, end="", flush=True)
    except ValueError as e:  # of what its weights lead to
        raise ValueError(f"{settings.model}: {e}") from None
    print()
    if settings.label:
        print(f"[{settings.label}]", file=sys.stderr)


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

    options = {name: getattr(args, name) for name in ("steps", "seed") if hasattr(args, name)}
    out = Path(getattr(args, "out", POCKET))
    # Trained attention makes numbers so small that a step takes three times as long (measured). Threads that have begun
    # keep their way: so before all else.
    torch.set_flush_denormal(True)
    pretrain(out, progress=lambda line: print(line, file=sys.stderr, flush=True), **options)
