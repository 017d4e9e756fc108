"""What people type who come from Hugging Face works as it does there, or says in one line what to write instead."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.settings.record import POCKET
from qwen_min import FlopMeter, Qwen, Tokenizer
from qwen_min.tokenizer import SYSTEM

MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "1.20,3.40;1.29,3.41;1.35,"}]


@pytest.fixture(scope="module")
def sides() -> list[tuple[Any, Any]]:
    theirs = AutoTokenizer.from_pretrained(POCKET, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(POCKET, torch_dtype="float32", device_map="cpu")
    ours = Qwen.from_pretrained(POCKET, torch_dtype="float32", device_map="cpu")
    return [(ours, Tokenizer.from_pretrained(POCKET)), (model, theirs)]


def card(model: Any, tokenizer: Any) -> list[str]:
    """The lines of Qwen2.5's model card, for two conversations of unequal length."""
    longer = [MESSAGES[0], MESSAGES[1] | {"content": MESSAGES[1]["content"] * 4}]
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in (MESSAGES, longer)
    ]
    model_inputs = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    generated_ids = model.generate(**model_inputs, max_new_tokens=12, do_sample=False)
    generated_ids = [
        output_ids[len(input_ids) :]
        for input_ids, output_ids in zip(model_inputs.input_ids, generated_ids, strict=True)
    ]
    return tokenizer.batch_decode(generated_ids, skip_special_tokens=True)


def test_the_model_cards_lines_give_the_same_answers_in_both(sides):
    ours, theirs = (card(*side) for side in sides)
    assert ours == theirs and all(ours) and ours[0] != ours[1]


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return {name: plain(one) for name, one in value.items()} if hasattr(value, "items") else value


ON_TOKENIZERS = {
    "text": lambda t: t("1.20;"),
    "texts": lambda t: t(["1.20;", "7"]),
    "padded": lambda t: t(["1.20;", "7"], padding=True),
    "tensors": lambda t: t("1.20;", return_tensors="pt"),
    "padded tensors": lambda t: t(["1.20;", "7"], padding=True, return_tensors="pt"),
    "attributes": lambda t: [t("7").input_ids, t("7").attention_mask],
    "end": lambda t: [t.eos_token, t.eos_token_id, t.pad_token_id],
    "chat": lambda t: t.apply_chat_template(MESSAGES, tokenize=False),
    "chat to answer": lambda t: t.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True),
    "ids of a chat": lambda t: t.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt"),
    "ids alone": lambda t: t.apply_chat_template(MESSAGES, return_dict=False),
    "decoded": lambda t: t.decode(torch.tensor([16, 258]), skip_special_tokens=False),
    "rows decoded": lambda t: t.batch_decode(torch.tensor([[16, 258], [17, 18]]), skip_special_tokens=True),
}


@pytest.mark.parametrize("call", ON_TOKENIZERS.values(), ids=ON_TOKENIZERS)
def test_a_tokenizer_answers_as_transformers(call, sides):
    ours, theirs = (plain(call(tokenizer)) for _, tokenizer in sides)
    if hasattr(theirs, "items"):
        theirs.pop("token_type_ids", None)  # which no Qwen reads
    assert ours == theirs


def test_generate_stops_where_the_folder_says_and_fills_with_it_as_transformers(sides, tmp_path):
    """The end is made of a token that comes: of the first row early, of the other never."""
    folder = shutil.copytree(POCKET, tmp_path / "ends")
    prompts = [tokenizer(["1.20,3.40;1.29,", "0.52,0.40;0.55,"], return_tensors="pt") for _, tokenizer in sides]
    untouched = sides[0][0].generate(**prompts[0], max_new_tokens=20)[:, prompts[0].input_ids.shape[1] :].tolist()
    end = next(t for t in untouched[0] if t not in untouched[1])
    told = json.loads((folder / "config.json").read_text()) | {"eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(told))
    ours, theirs = (kind.from_pretrained(folder, dtype="float32") for kind in (Qwen, AutoModelForCausalLM))
    got = ours.generate(**prompts[0], max_new_tokens=20)
    torch.testing.assert_close(got, theirs.generate(**prompts[1], max_new_tokens=20), atol=0, rtol=0)
    assert got[0, -1] == end and len(set(got[0].tolist())) < 20 and untouched[1] == got[1, -20:].tolist()
    without = ours.generate(prompts[0].input_ids, 20, stop=())[:, -20:].tolist()
    assert without == untouched
    ours.save_pretrained(tmp_path / "again")
    assert Qwen.from_pretrained(tmp_path / "again").stop_ids == (end,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 999, 258]}')
    assert Qwen.from_pretrained(folder).stop_ids == (7, 258)  # 999 is no token of the model
    (folder / "generation_config.json").write_text('{"eos_token_id": "<|im_end|>"}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is '<\|im_end\|>': expected a token's"):
        Qwen.from_pretrained(folder)


def test_sampling_by_either_name_is_the_same_draw(sides):
    model, tokenizer = sides[0]
    ids, options = tokenizer(["1.2"]), {"max_new_tokens": 8, "seed": 3}
    drawn = model.generate(ids, do_sample=True, **options)
    assert drawn == model.generate(ids.input_ids, temperature=1.0, **options)
    assert drawn == model.generate(**ids, do_sample=True, **options)
    assert model.generate(ids, **options) == model.generate(ids, do_sample=False, **options) != drawn


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: m.generate([[1]], 3, max_length=9), "generate has no option 'max_length': expected max_new"),
        (lambda m, t: m.generate([[1]], 3, beams=9), "generate has no option 'beams'"),
        (lambda m, t: m.generate([[1]]), "generate has no max_new_tokens: expected both"),
        (lambda m, t: m.generate([[1]], 3, do_sample=False, temperature=0.7), "do_sample is False and temperature 0.7"),
        (lambda m, t: m.generate([[1]], 3, stop=[1], eos_token_id=2), "stop and eos_token_id are both given"),
        (lambda m, t: m.generate(t("1"), 3), "ids or attention_mask are not rows: expected"),
        (lambda m, t: m.generate([[1, 2]], 3, attention_mask=[[1, 0]]), "attention_mask is not 0, then 1 in each row"),
        (lambda m, t: m.generate([[1, 2]], 3, attention_mask=[[1]]), "attention_mask has another shape"),
        (lambda m, t: t("1", truncation=True), "tokenizer(text) has no option 'truncation': expected a slice"),
        (lambda m, t: t(["1", "23"], return_tensors="pt"), "the texts have unequal numbers of tokens: exp"),
        (lambda m, t: t("1", return_tensors="np"), "return_tensors is 'np': expected 'pt'"),
        (lambda m, t: t.apply_chat_template([("user", "1")]), "message 1 is ('user', '1'): expected {"),
        (lambda m, t: t.apply_chat_template(MESSAGES, tools=[1]), "apply_chat_template has no option 'tools': "),
        (lambda m, t: t.apply_chat_template("1"), "the conversation is '1': expected a list of messages"),
        (lambda m, t: Qwen.from_pretrained(POCKET, device_map={"": 0}), "device_map is {'': 0}: expected one device"),
        (lambda m, t: Qwen.from_pretrained(POCKET, trust_remote=1), "from_pretrained has no option 'trust_remote"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_there_is_not_says_in_one_line_what_to_write_instead(call, message, sides):
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}") as error:
        call(*sides[0])
    assert "\n" not in str(error.value)


def test_types_by_name_folders_with_a_tilde_and_what_is_printed(monkeypatch):
    monkeypatch.setenv("HOME", str(Path(POCKET).parent))
    model = Qwen.from_pretrained("~/pocket", dtype="bfloat16")
    assert model.device.type == "cpu" and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    lines = repr(model).splitlines()
    assert "      (0-5): 6 x Block(" in lines and "          (k_proj): Linear(weight [96, 192], bias [96])" in lines
    with FlopMeter("matmul") as meter:
        model(torch.tensor([[1, 2]]))
    counts = f"total={meter.total:,}, backward={meter.backward:,}, training={meter.training:,}"
    assert repr(meter) == f"FlopMeter('matmul', {counts})"
