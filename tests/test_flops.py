"""The meter against a brute-force count, torch's own counter and autograd; to the last FLOP."""

import csv
import itertools
from collections import Counter

import brute_force_flops
import pytest
import torch
from brute_force_flops import backward, dispatched, forward
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from experiments.accounting.predict import generation, predict
from lora import LoRALinear, add_logit_bias, add_lora
from lora.layer import lora_layers
from qwen_min import FlopMeter, Qwen, QwenConfig, fast, ops
from qwen_min.cache import KVCache
from qwen_min.costs import component
from qwen_min.flops import Metered, unmetered
from qwen_min.generate import decode, left_padded, prefill
from qwen_min.loss import continuation_losses
from qwen_min.prices import CONVENTIONS, PRIMITIVES

SIZES = ["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"]
PREDICTED, RANKS, MODES = (1, 100, 512), (0, 8), ("alone", "cache", "training")  # tokens, of LoRA, of a forward
LINEARS = tuple(f"{name}_proj" for name in "q k v o gate up down".split())
TRAINED: dict[str, tuple[str, ...]] = {  # and the targets of LoRA
    "everything": (),
    "lora q v": ("q_proj", "v_proj"),
    "lora k": ("k_proj",),
    "lora up": ("up_proj",),
    "lora down of the last layer": ("model.layers.1.mlp.down_proj",),
    "lora all": LINEARS,
}
SHAPES: list[dict] = [
    {},
    {"num_key_value_heads": 6},
    {"num_key_value_heads": 1, "tie_word_embeddings": True},
    {"hidden_size": 36, "intermediate_size": 7, "vocab_size": 31, "num_hidden_layers": 5},
]


@pytest.fixture(params=CONVENTIONS)
def convention(request) -> str:
    return request.param


def metered(model, ids, convention="coursework", **options) -> FlopMeter:
    with FlopMeter(convention) as meter:
        model(ids, **options)
    return meter


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_forward_equals_the_brute_force_count_part_by_part(shape, convention, make_config, random_model):
    """4 shapes, 3 conventions, 4 batches and lengths, 4 ranks and sets of targets, with and without a logit bias."""
    config = make_config(**shape)
    q_v, k_down = ("q_proj", "v_proj"), ("k_proj", "down_proj")
    for rank, targets, biased in ((0, (), False), (1, q_v, False), (8, k_down, True), (3, LINEARS, True)):
        model = random_model(**shape)
        if rank:
            add_lora(model, rank, targets=targets)
        if biased:
            add_logit_bias(model)
        for batch, length in [(1, 1), (1, 7), (3, 2), (2, 19)]:
            meter = metered(model, torch.zeros(batch, length, dtype=torch.int64), convention)
            options = {"rank": rank, "targets": targets, "logit_bias": biased, "convention": convention}
            expected = forward(config, batch, length, **options)
            assert Counter(meter.by_component()) == expected
            assert meter.total == expected.total()


def same_as_the_brute_force(config, length: int, rank: int, mode: str) -> None:
    """A prediction on the meta device, its forward part by part and its backward, in every convention."""
    cached, training = 333 if mode == "cache" else 0, mode == "training"
    meter = predict(config, 4, length, rank=rank, cached=cached, training=training)
    for convention in CONVENTIONS:
        priced = FlopMeter(convention)
        priced.add(meter)
        expected = forward(config, 4, length, cached, rank=rank, convention=convention)
        if training and convention == "exact":
            expected["loss"] = brute_force_flops.loss(4 * length, config.vocab_size)
        assert Counter(priced.by_component()) == expected and priced.total == expected.total()
        gradient = 2 * expected.total() if convention == "coursework" else 0
        if training:
            gradient = backward(config, 4, length, rank=rank, convention=convention)
        assert priced.backward == gradient and type(priced.training) is int


@pytest.mark.parametrize("size", SIZES)
def test_14_predictions_for_the_7_released_sizes_equal_the_brute_force_count(size):
    """Of each size 2 of 6 kinds: with and without LoRA, alone, over a cache, and in training (which has no cache)."""
    config, i = QwenConfig.named(f"Qwen2.5-{size}"), SIZES.index(size)
    for rank, mode in (list(itertools.product(RANKS, MODES))[(i + more) % 6] for more in (0, 3)):
        same_as_the_brute_force(config, PREDICTED[i % 3], rank, mode)


@pytest.mark.endurance
def test_126_predictions_for_7_sizes_and_3_lengths_equal_the_brute_force_count():
    for size, length, rank, mode in itertools.product(SIZES, PREDICTED, RANKS, MODES):
        same_as_the_brute_force(QwenConfig.named(f"Qwen2.5-{size}"), length, rank, mode)


def test_the_worked_number_of_the_half_billion_model():
    """Batch 4, context 512, rank 8: in digits, so that a change of the convention cannot pass unseen."""
    with torch.device("meta"):
        model = add_lora(Qwen(QwenConfig.named("Qwen2.5-0.5B")), 8)
    meter = metered(model, torch.empty(4, 512, dtype=torch.int64, device="meta"))
    assert (meter.total, meter.backward, meter.training) == (2258760259584, 4517520519168, 6776280778752)


@torch.no_grad()
def test_a_cached_pass_equals_the_brute_force_count_of_its_tokens_and_context(convention, random_model):
    model = add_lora(random_model(), 3)
    cache, seen = KVCache(model.config, 2, 20), 0
    for new in (7, 1, 4, 1):
        meter = metered(model, torch.zeros(2, new, dtype=torch.int64), convention, cache=cache)
        assert Counter(meter.by_component()) == forward(model.config, 2, new, seen, rank=3, convention=convention)
        seen += new


def test_generation_is_charged_a_prefill_and_a_forward_per_token_with_the_head_for_one_token(convention, random_model):
    model = random_model()
    with FlopMeter(convention) as meter:
        model.generate(torch.zeros(3, 6, dtype=torch.int64), max_new_tokens=4)
    expected = forward(model.config, 3, 6, head_tokens=3, convention=convention)
    for step in range(3):
        expected += forward(model.config, 3, 1, 6 + step, convention=convention)
    assert Counter(meter.by_component()) == expected


def test_padding_that_is_computed_is_charged(convention, random_model):
    model = random_model()
    meter = metered(model, torch.zeros(2, 9, dtype=torch.int64), convention, padding=torch.tensor([0, 5]))
    assert Counter(meter.by_component()) == forward(model.config, 2, 9, convention=convention, padded=True)


def test_modules_components_and_primitives_each_sum_to_the_total(convention, random_model):
    model = add_logit_bias(add_lora(random_model(), 3, targets=LINEARS))
    with FlopMeter(convention) as meter:
        model.loss(torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64))
        model(torch.zeros(1, 4, dtype=torch.int64))
    for parts in (meter.by_module(), meter.by_component(), meter.by_primitive()):
        assert sum(parts.values()) == meter.total and all(type(n) is int and n > 0 for n in parts.values())
    assert set(meter.by_primitive()) <= set(PRIMITIVES)
    modules = dict(model.named_modules())
    assert all(name in modules for name in meter.by_module())


@pytest.mark.parametrize("fold", [False, True])
def test_each_node_of_the_tree_holds_the_sum_of_its_children_and_the_root_all(fold, convention, random_model):
    """Layer 0 has no gradient to pass on: where the real backward is counted it is a layer of its own."""
    model = add_lora(random_model(num_hidden_layers=4), 3, targets=LINEARS)
    with FlopMeter(convention) as meter:
        model.loss(torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64))
    tree = meter.tree(fold)
    nodes = [node for _, node in tree.walk()]
    for node in nodes:
        if node.children:
            for phase in ("forward", "backward"):
                inside = [getattr(child, phase).flops for child in node.children]
                assert getattr(node, phase).flops == sum(inside, Counter())
    assert (tree.forward.total, tree.backward.total) == (meter.total, meter.backward)
    assert tree.forward.flops == Counter(meter.by_primitive())
    layers = {node.name: node.layers for node in nodes if node.path.rpartition(".")[0] == "model.layers"}
    split = {"0-3": 4} if convention == "coursework" else {"0": 1, "1-3": 3}
    assert {name: n for name, n in layers.items() if name[0].isdigit()} == (split if fold else dict.fromkeys("0123", 1))
    own, all_inside = meter.by_module(), meter.by_module(inclusive=True)
    for path, flops in all_inside.items():
        assert flops == sum(n for other, n in own.items() if not path or f"{other}.".startswith(f"{path}.")), path


def test_a_meta_forward_is_charged_what_a_real_one_is(way, convention, make_config):
    counts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = add_logit_bias(add_lora(Qwen(make_config()), 3))
            ids = torch.zeros(2, 9, dtype=torch.int64)
        with FlopMeter(convention) as meter:
            model(ids)
            model.loss(ids, ids)
        counts.append(list(meter.charges()))
    assert counts[0] == counts[1] and len(counts[0]) > 40


def test_fast_and_plain_are_charged_the_same(convention, random_model, fast_again):
    model, ids = trainable("lora all", random_model()), torch.zeros(2, 9, dtype=torch.int64)
    charges = []
    for switch in (fast.on, fast.off):
        switch()
        with FlopMeter(convention) as meter:
            model(ids)
            model.loss(ids, ids, torch.tensor([0, 3]))
            model.generate(ids, 4)
        charges.append(list(meter.charges()))
    assert charges[0] == charges[1]


def trainable(kind: str, model: Qwen) -> Qwen:
    if TRAINED[kind]:
        add_lora(model, 3, 1.5, TRAINED[kind])
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_b)
    return model


@pytest.fixture
def explicit(monkeypatch) -> None:
    """Attention written out: on the CPU torch's counter reads 0 for its fused kernel."""
    monkeypatch.delitem(ops.FAST, "attend")


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("through", ["logits", "loss"])
@pytest.mark.parametrize("kind", TRAINED)
def test_matrix_products_equal_torchs_own_counter_forward_and_backward(kind, through, kv_heads, explicit, random_model):
    model = trainable(kind, random_model(num_key_value_heads=kv_heads))
    ids = torch.randint(97, (3, 11))
    with FlopMeter("matmul") as meter, FlopCounterMode(display=False) as ahead:
        out = model(ids).sum() if through == "logits" else model.loss(ids, ids)[0]
    with FlopCounterMode(display=False) as back:
        out.backward()
    # The loss makes its gradients while it has the logits: the head's backward products run in the forward.
    if through == "logits":
        assert meter.total == ahead.get_total_flops()
    assert meter.training == ahead.get_total_flops() + back.get_total_flops()


@pytest.mark.parametrize("frozen", [False, True])
def test_matrix_products_without_gradients_equal_torchs_own_counter(frozen, explicit, random_model):
    model = add_lora(random_model(), 3) if frozen else random_model()
    ids = torch.randint(97, (3, 11))
    with torch.no_grad(), FlopMeter("matmul") as meter, FlopCounterMode(display=False) as torchs:
        model(ids)
        model.loss(ids, ids)
    assert meter.total == meter.training == torchs.get_total_flops()


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += dispatched(func.name().split("::")[1].split(".")[0].rstrip("_"), args, kwargs or {}, out)
        return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("kind", TRAINED)
def test_an_exact_backward_is_what_autograd_runs_op_by_op(kind, kv_heads, tied, explicit, random_model):
    """Once the sum over the query heads of a key head was missing, and RMSNorm's gradient was not autograd's; and the
    sum of a tied table's two gradients."""
    fields = {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    model = trainable(kind, random_model(**fields))
    with FlopMeter("exact") as meter:
        logits = model(torch.randint(97, (3, 11)))
    gradient = torch.randn_like(logits)
    with Dispatched() as ran:
        logits.backward(gradient)
    assert meter.backward == ran.total > 0


def test_the_loss_is_charged_its_head_in_every_convention_and_itself_in_exact_alone(convention, random_model):
    model, ids = random_model(), torch.zeros(2, 9, dtype=torch.int64)
    with FlopMeter(convention) as meter:
        model.loss(ids, ids)
    expected = forward(model.config, 2, 9, convention=convention)
    if convention == "exact":  # per token: V exponentials, their sum, a logarithm (10), a difference
        expected["loss"] = 18 * (97 * 10 + 96 + 10 + 1)
    assert Counter(meter.by_component()) == expected


def test_the_formula_of_a_price_evaluates_to_what_was_charged(convention, random_model):
    model = add_logit_bias(add_lora(random_model(), 3))
    ids = torch.zeros(2, 9, dtype=torch.int64)
    with FlopMeter(convention) as meter:
        model.loss(ids, ids)
        model(ids)
    seen = set()
    for charge in meter.charges():
        values, formula = charge.price.values(charge.dims, convention), charge.price.formula(convention)
        charged = sum(charge.price.cost(charge.dims, convention)[0].values())
        if formula:
            assert charged == eval(formula.replace("·", "*"), {}, values), formula
            seen.add(formula)
        else:
            assert charged == 0
    known = {"2·N·I·O", "2·B·H·T·D·S"} if convention == "matmul" else {"N·O·(2·I-1)", "B·H·T·S·(2·D-1)"}
    assert known <= seen and len(seen) >= (5 if convention == "matmul" else 12)


def test_figures_beyond_two_to_the_53_stay_exact():
    config = QwenConfig.named("Qwen2.5-72B")
    with torch.device("meta"), torch.no_grad():
        model = Qwen(config)
        meter = metered(model, torch.empty(333, 4095, dtype=torch.int64))
    expected = forward(config, 333, 4095).total()
    assert meter.total == expected > 2**53 and expected % 2 == 1  # an odd number this large is no float
    assert type(meter.training) is int


def test_nested_meters_both_count_and_one_that_is_closed_or_was_never_opened_does_not(random_model):
    model, ids, unopened = random_model(), torch.zeros(1, 5, dtype=torch.int64), FlopMeter()
    with FlopMeter() as outer:
        model(ids)
        with FlopMeter("exact") as inner:
            model(ids)
        model(ids)
    model(ids)
    once = metered(model, ids)
    assert outer.total == 3 * once.total and inner.total == metered(model, ids, "exact").total
    assert [charge.times for charge in outer.charges()] == [3 * charge.times for charge in once.charges()]
    assert unopened.total == unopened.training == 0 and not list(unopened.charges()) and unopened.by_module() == {}


def test_what_is_unmetered_inside_a_meter_is_not_charged(random_model):
    model, ids = random_model(), torch.zeros(1, 5, dtype=torch.int64)
    with FlopMeter() as meter:
        with unmetered(), FlopMeter() as prediction:
            model(ids)
        assert meter.total == 0 < prediction.total
        model(ids)
    assert meter.total == prediction.total


def test_a_meter_is_closed_by_an_error_and_its_module_too(random_model):
    model, ids = random_model(max_position_embeddings=8), torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(ValueError), FlopMeter() as meter:
        model(ids)
    before = meter.total
    model(ids[:, :3])
    assert meter.total == before
    assert metered(model, ids[:, :3]).by_module() == metered(random_model(), ids[:, :3]).by_module()


def test_an_unknown_convention_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown FLOP convention 'mac': expected one of coursework, exact, matmul"):
        FlopMeter("mac")


def test_a_prediction_can_be_charged_many_times_over(random_model):
    model, ids = random_model(), torch.zeros(1, 5, dtype=torch.int64)
    step, total = metered(model, ids), FlopMeter()
    total.add(step, times=7)
    total.add(step)
    assert total.total == 8 * step.total and total.by_component()["q"] == 8 * step.by_component()["q"]


def test_every_module_is_charged_under_its_own_name_also_right_after_lora_was_added(random_model):
    model = add_lora(random_model(), 3, targets=("q_proj", "up_proj"))
    paths = {module.path: name for name, module in model.named_modules() if isinstance(module, Metered)}
    assert all(path == name for path, name in paths.items())
    assert {name for name, m in model.named_modules() if isinstance(m, LoRALinear)} <= paths.keys()
    names = metered(model, torch.zeros(1, 5, dtype=torch.int64)).by_module()
    base = metered(random_model(), torch.zeros(1, 5, dtype=torch.int64)).by_module()
    assert names.keys() == base.keys()
    assert {name for name in names if names[name] != base[name]} == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }


def test_every_flop_stands_under_the_module_that_ran_it(random_model):
    model = add_logit_bias(random_model(num_hidden_layers=1))
    part = forward(model.config, 2, 9, logit_bias=True)
    layer = "model.layers.0"
    assert metered(model, torch.zeros(2, 9, dtype=torch.int64)).by_module() == {
        "model.embed_tokens": part["positions"],
        f"{layer}.input_layernorm": part["norm"] // 3,
        f"{layer}.self_attn.q_proj": part["q"],
        f"{layer}.self_attn.k_proj": part["k"],
        f"{layer}.self_attn.v_proj": part["v"],
        f"{layer}.self_attn.o_proj": part["output"],
        f"{layer}.self_attn": part["scores"] + part["softmax"] + part["values"],
        layer: part["residual"],
        f"{layer}.post_attention_layernorm": part["norm"] // 3,
        f"{layer}.mlp.gate_proj": part["gate"],
        f"{layer}.mlp.up_proj": part["up"],
        f"{layer}.mlp": part["silu"],
        f"{layer}.mlp.down_proj": part["down"],
        "model.norm": part["norm"] // 3,
        "lm_head": part["head"],
        "": part["logit_bias"],
    }


def test_components_are_told_by_the_op_or_by_the_layer(random_model):
    model = add_logit_bias(add_lora(random_model(), 3))
    meter = metered(model, torch.zeros(1, 5, dtype=torch.int64), "exact")
    names = "rotation norm q k v lora scores softmax values output residual gate up silu down head logit_bias"
    assert set(meter.by_component()) == set(names.split())
    assert {charge.module for charge in meter.charges() if component(charge) == "lora"} == {
        f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")
    }


def test_a_meter_writes_its_ops_as_csv_and_its_tree_as_a_page(random_model, tmp_path):
    with FlopMeter("exact") as meter:
        random_model()(torch.zeros(2, 7, dtype=torch.int64))
    meter.to_csv(tmp_path / "ops.csv")
    meter.to_html(tmp_path / "tree.html", title="a < b")
    with open(tmp_path / "ops.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["forward"]) for row in rows) == meter.total
    assert sum(int(row["backward"]) for row in rows) == meter.backward
    page = (tmp_path / "tree.html").read_text(encoding="utf-8")
    nodes = [node for _, node in meter.tree(fold=True).walk()]
    assert page.count("</span>") == len(nodes) and "<b>a &lt; b</b>" in page and "a < b" not in page
    assert all(f"{node.forward.total:,} + {node.backward.total:,}" in page for node in nodes)
    for write in (meter.to_csv, meter.to_html):
        with pytest.raises(OSError):
            write(tmp_path / "absent" / "file")
    with pytest.raises(ValueError, match="the meter has seen no op: expected a forward inside of it"):
        FlopMeter().to_html(tmp_path / "x.html")


def test_a_batch_run_in_groups_costs_what_the_whole_costs(random_model):
    model = random_model()
    ids = torch.ones(4, 6, dtype=torch.int64)
    with FlopMeter() as whole:
        model.loss(ids, ids)
    with FlopMeter() as parts:
        for row in ids.split(1):
            model.loss(row, row)
    assert parts.by_component() == whole.by_component()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("logit_bias", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("scored", [0, 1, 7])
@pytest.mark.parametrize("new", [0, 1, 2, 9])
def test_samples_and_a_scored_continuation_cost_as_predicted(random_model, rank, logit_bias, samples, scored, new):
    model = random_model()
    if logit_bias:
        add_logit_bias(model)
    if rank:
        add_lora(model, rank)
    ids, padding = left_padded([[1, 2, 3], [4, 5, 6, 7, 8]])
    with FlopMeter() as meter:
        if new or scored:
            read = prefill(model, ids, 8, padding)
        if scored:
            continuation_losses(model, read, torch.ones(2, scored, dtype=torch.int64))
        if new:
            list(decode(model, read, new, samples=samples, repetition_penalty=1.1))
    options = {"rank": rank, "logit_bias": logit_bias, "samples": samples, "scored": scored}
    assert meter.total == generation(model.config, 2, 5, new, **options)
