"""Verbs of the model itself: `generate`, `bench`, `pretrain-pocket`."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.settings.record import POCKET
from experiments.task.model import trained_model
from experiments.verbs.common import gather, print_json, wrote
from qwen_min import Tokenizer
from qwen_min.generate import stream
from qwen_min.load import resolve


def generate(args: Namespace) -> None:
    settings, chat = gather(args), hasattr(args, "chat")
    tokenizer = Tokenizer.from_pretrained(settings.model, settings.revision or None, settings.offline)
    model = trained_model(settings, getattr(args, "adapter", None))
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


def pretrain_pocket(args: Namespace) -> None:
    from experiments.training.pocket import pretrain

    options = {name: getattr(args, name) for name in ("steps", "seed") if hasattr(args, name)}
    out = Path(getattr(args, "out", POCKET))
    pretrain(out, progress=lambda line: print(line, file=sys.stderr, flush=True), **options)
