"""What a GPU runs: products in bfloat16, compiled blocks and loss, a captured step. On the CPU here; on CUDA too.

Here torch's compiler traces everything and leaves the kernels to torch (the backend "aot_eager"); the endurance run has
it write them. A captured step runs without its graph.
"""

import json
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from waves import tiny_model

from data.grammar import Grammar
from data.llmtime import Codec
from experiments import run as command_line
from experiments.forecasting import forecast as evaluate
from experiments.settings.record import POCKET, Settings
from experiments.task.constrain import Constrained
from experiments.task.task import Task
from lora import add_logit_bias, add_lora, merge
from lora.layer import lora_layers
from qwen_min import FlopMeter, Qwen, Tokenizer, fast, ops
from qwen_min.cache import KVCache, Prefill
from qwen_min.fast import captured, maths
from qwen_min.fast import compiled as compiled_blocks
from qwen_min.fast.captured import CapturedStep
from qwen_min.generate import decode, left_padded, prefill
from qwen_min.loss import continuation_losses

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]
# Torch's compiler asks for things that torch warns of; outside of tests it keeps that to itself.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("should not be instantiated:DeprecationWarning", "not a leaf Tensor is being accessed:UserWarning")
]

DROPPED = [0, 3, 5]
"""How many of each row's first tokens are padding."""


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def close(got, expected, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def with_lora(model: Qwen, device: str = "cpu") -> Qwen:
    """LoRA whose B is not zero, so that every gradient counts."""
    add_lora(model, 3, targets=("q_proj", "v_proj", "o_proj", "down_proj"), seed=0)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    return model.to(device)


def step(model: Qwen, ids: Tensor, padding: Tensor | None = None, vocabulary: Tensor | None = None) -> dict:
    """Loss, gradients and charges of a training step, and those of an evaluation."""
    model.zero_grad()
    with FlopMeter() as trained:
        total, count = model.loss(ids[:, :-1], ids[:, 1:], padding, vocabulary)
        (total / count).backward()
    with FlopMeter() as evaluated, torch.no_grad():
        each = model.token_losses(ids[:, :-1], ids[:, 1:], padding, vocabulary)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {
        "values": [total.detach(), each, gradients],
        "count": count,
        "charges": [sorted(map(str, meter.charges())) for meter in (trained, evaluated)],
    }


def narrowed(model: Qwen, dtype: torch.dtype) -> Qwen:
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.to(dtype)
    return model


def same(got: dict, expected: dict, tolerance: float = 1e-5) -> None:
    close(got["values"], expected["values"], tolerance)
    assert len(expected["values"][2]) > 1 and all(g.abs().max() > 0 for g in expected["values"][2].values())
    assert (got["count"], got["charges"]) == (expected["count"], expected["charges"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("biased", "padded"), [(False, True), (True, False)])
def test_a_compiled_step_has_the_loss_gradients_and_charges_of_a_plain_one(biased, padded, device, random_model):
    model = random_model()
    if biased:
        add_logit_bias(model)
    model = with_lora(model, device)
    ids = torch.randint(97, (3, 18), device=device)
    padding = torch.tensor(DROPPED, device=device) if padded else None
    vocabulary = None if padded else ids.unique()
    expected = step(model, ids, padding, vocabulary)
    model.compile(backend="aot_eager")
    for _ in range(2):  # the second runs what the first has compiled
        same(step(model, ids, padding, vocabulary), expected)


@pytest.mark.endurance
@pytest.mark.filterwarnings("default")  # what the compiler imports warns of its own past
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_what_the_compiler_writes_itself_is_equal_too(dtype, tolerance, random_model):
    model, ids = narrowed(with_lora(random_model()), dtype), torch.randint(97, (3, 18))
    expected = step(model, ids)
    model.compile()
    same(step(model, ids), expected, tolerance)


def test_blocks_of_a_kind_share_what_the_first_was_compiled_to(random_model):
    model, ids = with_lora(random_model(num_hidden_layers=12)), torch.randint(97, (3, 18))
    compiled = CompileCounterWithBackend("aot_eager")
    model.compile(backend=compiled)
    before = compiled.frame_count
    model.model(ids).sum().backward()
    assert compiled.frame_count - before == 2  # the first block's input wants no gradient
    model.model(ids).sum().backward()
    assert compiled.frame_count - before == 2


def test_charges_follow_what_becomes_of_a_compiled_model(random_model):
    """LoRA that comes later or is merged, parameters that are frozen, another length: each has charges of its own."""
    model, plain = random_model(num_hidden_layers=1), random_model(num_hidden_layers=1)
    ids = torch.randint(97, (2, 12))
    model.compile(backend="eager")
    for change in (
        lambda m: None,
        lambda m: m.model.layers[0].mlp.requires_grad_(False),
        lambda m: m.requires_grad_(False),
        lambda m: add_lora(m, 2),
        lambda m: merge(m),
    ):
        for changed in (model, plain):
            change(changed)
        for some in (ids, ids[:, :7]):
            charges = []
            for each in (model, plain):
                with FlopMeter("exact") as meter:
                    each.model(some)
                charges.append((meter.backward, meter.by_module()))
            assert charges[0] == charges[1]


def test_over_a_cache_nothing_is_compiled(random_model):
    model, ids = random_model(), torch.randint(97, (2, 12))
    expected = model.generate(ids, 5)
    compiled = CompileCounterWithBackend("eager")
    model.compile(backend=compiled)
    before = compiled.frame_count
    assert torch.equal(model.generate(ids, 5), expected) and compiled.frame_count == before


def test_a_compiler_that_does_not_work_is_named_before_anything_runs(random_model):
    def broken(graph, inputs):
        raise OSError("no C++ compiler\nand more lines")

    model = random_model()
    with pytest.raises(ValueError, match="^torch's compiler fails on cpu .*: expected a C[+][+] compiler") as raised:
        model.compile(backend=broken)
    assert "\n" not in str(raised.value) and "forward" not in vars(model.model.layers[0])


def test_a_run_that_cannot_be_compiled_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    check = compiled_blocks.check
    monkeypatch.setattr(compiled_blocks, "check", lambda device: check(device, backend=lambda *_: 1 / 0))
    assert command_line.main(["train", "--steps", "1", "--offline", "--compile", "--out", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torch's compiler fails on cpu (") and "division by zero" in line
    assert not list(tmp_path.iterdir())


def test_a_run_with_compile_has_the_losses_and_the_flops_of_one_without(tmp_path, monkeypatch, capsys):
    compile_, compiled = Qwen.compile, CompileCounterWithBackend("eager")  # seconds, not minutes
    monkeypatch.setattr(Qwen, "compile", lambda model: compile_(model, backend=compiled))
    monkeypatch.setattr(compiled_blocks, "check", lambda device, **options: None)
    argv = "train --steps 2 --context 64 --batch-size 2 --val-series 2 --val-every 0 --seed 3 --model model".split()
    tiny_model(tmp_path / "model")
    results = {}
    for flags in ([], ["--compile"]):
        assert command_line.main([*argv, *flags, "--out", f"run{len(flags)}"]) == 0
        (path,) = (tmp_path / f"run{len(flags)}").rglob("lr*/result.json")
        results[len(flags)] = json.loads(path.read_text())
        assert (compiled.frame_count > 0) == bool(flags)
    assert results[0]["flops"] == results[1]["flops"] and results[0]["flops"]["training"] > 0
    assert results[0]["validation_loss"] == pytest.approx(results[1]["validation_loss"], rel=1e-5)
    assert command_line.main([*argv, "--out", "run1"]) == 2
    assert "compiled was True, is False: expected the same, or --allow-drift" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "rows"), [("cpu", 32), ("cuda", 256)])
def test_as_many_series_are_forecast_at_once_as_keep_the_device_busy(device, rows):
    task = Task.prepare(Settings(device=device, points=8, horizon=2), Tokenizer.from_pretrained(POCKET))
    sizes = [len(batch.places) for batch in evaluate._batches(task, range(300))]
    assert max(sizes) == sizes[0] == rows and sum(sizes) == 300


# A captured step


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> str:
    monkeypatch.setattr(captured, "DEVICES", (request.param,))
    return request.param


@pytest.fixture
def plain(monkeypatch):
    def call(work):
        with monkeypatch.context() as patch:
            patch.setattr(captured, "DEVICES", ())
            return work()

    return call


def spoil(read: Prefill) -> None:
    """Fill the places that no token has with what new memory may hold."""
    with torch.inference_mode():
        read.cache.store[..., read.cache.length :, :] = float("nan")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_captured_steps_give_the_tokens_and_charges_of_growing_ones(samples, padded, way, device, plain, random_model):
    model = random_model().to(device)
    ids = torch.randint(97, (3, 18), device=device)
    padding = torch.tensor(DROPPED, device=device) if padded else None

    def work() -> tuple[Tensor, list[str], dict[str, int]]:
        read = prefill(model, ids, 40, padding)
        spoil(read)
        with FlopMeter("exact") as meter:
            tokens = torch.stack(list(decode(model, read, 40, samples=samples, temperature=0.7, seed=1)), 1)
        return tokens, sorted(map(str, meter.charges())), meter.by_module()

    (expected, *charged), (tokens, *again) = plain(work), work()
    assert torch.equal(tokens, expected) and len(tokens.unique()) > 10
    assert again == charged


def test_a_captured_steps_hidden_states_equal_growing_ones_to_rounding(device, plain, random_model):
    model = random_model().to(device)
    ids, padding = left_padded([[5, 6, 7], [9] * 8], device=device)
    new = torch.randint(97, (2, 6, 1), device=device)

    @torch.inference_mode()
    def work() -> Tensor:
        read = prefill(model, ids, 6, padding)
        spoil(read)
        cache = read.rewound()
        run = captured.forward_of_one(model.model, cache, padding)
        assert isinstance(run, CapturedStep) == bool(captured.DEVICES)
        return torch.cat([run(new[:, i]).clone() for i in range(6)], 1)

    close(work(), plain(work))


def test_a_prefill_can_be_used_again_after_captured_steps(device, plain, random_model):
    model = random_model().to(device)
    ids, targets = torch.randint(97, (2, 9), device=device), torch.randint(97, (2, 5), device=device)

    def work() -> list[Tensor]:
        read = prefill(model, ids, 8)
        first = torch.stack(list(decode(model, read, 8)))
        losses = continuation_losses(model, read, targets)
        return [first, losses, torch.stack(list(decode(model, read, 8)))]

    got, expected = work(), plain(work)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[0], got[2])
    close(got[1], expected[1])


def test_a_draft_gives_the_same_tokens_between_captured_steps(device, random_model):
    """A draft that guesses every other time, so that steps alone and trees take turns over one cache."""
    model, ids = random_model().to(device), torch.randint(97, (1, 9), device=device)
    expected = torch.stack(list(decode(model, prefill(model, ids, 20), 21)))

    class Sometimes:
        taken = 0

        def guess(self) -> list[tuple[int, int]]:
            ahead = expected[self.taken : self.taken + 2].flatten().tolist()
            return list(enumerate(ahead)) if self.taken % 4 < 2 else []

        def advance(self, token: int) -> None:
            self.taken += 1

    read = prefill(model, ids, 22)
    spoil(read)
    assert torch.equal(torch.stack(list(decode(model, read, 21, draft=Sometimes()))), expected)


def test_captured_steps_are_constrained_as_growing_ones(device, plain, random_model):
    model, ids = random_model().to(device), [3, 90, 17, 50, 51, 52, 8, 7, 96, 0, 33, 44, 21]

    def work() -> Tensor:
        constraint = Constrained(Grammar(Codec(2), 2, 2), ids, 97, 2, 3, device, measure=False)
        read = prefill(model, torch.tensor([[21, 9, 44], [1, 2, 21]], device=device), 29)
        return torch.stack(list(decode(model, read, 30, constraint=constraint)), 1)

    assert torch.equal(work(), plain(work))


def test_a_captured_step_refuses_what_a_growing_one_does(device, plain, random_model):
    model = random_model(max_position_embeddings=6).to(device)

    def work(room: int, new: int) -> str:
        read = prefill(model, torch.zeros(1, 4, dtype=torch.int64, device=device), room)
        with pytest.raises(ValueError) as raised:
            list(decode(model, read, new))
        return str(raised.value)

    for case, said in (((1, 3), "the cache is to hold 4 + 2 tokens"), ((9, 5), "8 tokens are too long")):
        assert said in work(*case) and work(*case) == plain(partial(work, *case))
    cache = KVCache(model.config, 1, 5, device=device)
    cache.advance(4)
    step = CapturedStep(model.model, cache, None)
    with torch.inference_mode():
        step(torch.zeros(1, 1, dtype=torch.int64, device=device))
        with pytest.raises(ValueError, match="hold 5 [+] 1 tokens: expected at most 5"):
            step(torch.zeros(1, 1, dtype=torch.int64, device=device))


# Attention and bfloat16


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_key_heads_written_out_under_a_mask_give_the_same(heads, monkeypatch, fast_again):
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, heads, 9, 8), torch.randn(2, heads, 9, 8)
    mask = (torch.rand(2, 1, 5, 9) < 0.5) | torch.eye(5, 9, dtype=torch.bool)
    monkeypatch.setattr(maths, "HEADS_ALWAYS_SHARED", ())
    fast.off()
    close(maths.attend(q, k, v, mask), ops.attend(q, k, v, mask))
    whole = q.repeat(1, 1, 2, 1)[:, :, :9], k, v
    close(maths.attend(*whole, None), ops.attend(*whole, None))


@pytest.mark.parametrize("device", DEVICES)
def test_products_in_bfloat16_keep_lora_and_the_loss_in_float32_and_float64(device, random_model):
    """8 bits of mantissa: a loss to a percent and gradients that point the same way, in the types that hold them."""
    model, ids = with_lora(random_model(), device), torch.randint(97, (3, 18), device=device)
    _, _, expected = step(model, ids)["values"]
    loss = (model.loss(ids[:, :-1], ids[:, 1:])[0]).item()
    assert narrowed(model, torch.bfloat16).compute_dtype == torch.bfloat16
    total, each, gradients = step(model, ids)["values"]
    assert total.dtype == each.dtype == torch.float64 and total.item() == pytest.approx(loss, rel=1e-2)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0) > 0.99, name
    model.compile(backend="aot_eager")
    close(step(model, ids)["values"], [total, each, gradients], 2e-2)  # a logit of 7 is rounded by .016 to .03
    read = prefill(model, ids, 4)
    assert read.cache.store.dtype == read.hidden.dtype == torch.bfloat16
    assert torch.stack(list(decode(model, read, 5))).shape == (5, 3)
