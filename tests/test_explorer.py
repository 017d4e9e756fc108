"""The page of `flops --html`: its integers are those of the meter, and a browser can look through it."""

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from experiments import run
from experiments.accounting import explorer
from experiments.accounting.predict import predict
from qwen_min import FlopMeter, QwenConfig
from qwen_min.costs import ops

POCKET = Path(__file__).parents[1] / "weights" / "pocket"
QV, ATTENTION = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
LAYERS = QwenConfig.from_file(POCKET / "config.json").num_hidden_layers
MLP, ALL = ("gate_proj", "up_proj", "down_proj"), ("all-linear",)
NAMES = ("model", "phase", "batch", "context", "cache", "guesses", "rank", "targets")
PLACES = [
    ("Qwen2.5-0.5B", "training", 4, 512, 0, 1, 8, QV),
    ("pocket", "training", 1, 1, 0, 1, 0, QV),
    ("Qwen2.5-1.5B", "training", 3, 77, 0, 1, 64, ALL),
    ("pocket", "training", 2, 300, 0, 1, 1, ("k_proj",)),
    ("Qwen2.5-7B", "training", 5, 1024, 0, 1, 16, ATTENTION),
    ("pocket", "training", 7, 33, 0, 1, 3, MLP),
    ("pocket", "validation", 1, 512, 0, 1, 8, QV),
    ("pocket", "forward", 4, 512, 100, 1, 8, MLP),
    ("Qwen2.5-7B", "forward", 333, 4095, 0, 1, 0, QV),
    ("Qwen2.5-0.5B", "prefill", 2, 1000, 5, 1, 8, QV),
    ("pocket", "prefill", 1, 1, 0, 1, 0, QV),
    ("Qwen2.5-0.5B", "decode", 1, 512, 1000, 1, 0, QV),
    ("Qwen2.5-3B", "decode", 64, 1, 31000, 1, 32, ALL),
    ("Qwen2.5-7B", "tree", 1, 512, 700, 13, 8, ATTENTION),
]


def settings() -> list[dict]:
    return [
        dict(zip(NAMES, place, strict=True))
        | {"convention": convention, "x": 2 + 2 * (i % 2), "w": 2 + 2 * (i % 3 > 0)}
        for i, place in enumerate(PLACES)
        for convention in ("coursework", "exact", "matmul")
    ]


@cache
def meter(model, phase, batch, context, cached, guesses, rank, targets) -> FlopMeter:
    config = QwenConfig.from_file(POCKET / "config.json") if model == "pocket" else QwenConfig.named(model)
    tokens = {"decode": 1, "tree": guesses}.get(phase, context)
    cached = cached if phase in ("forward", "decode", "tree") else 0
    options = {"training": phase in ("training", "validation"), "last_only": phase == "prefill", "cached": cached}
    return predict(config, batch, tokens, rank=rank, targets=targets, **options)


def counted(s: dict) -> list[list]:
    """Every op of the tree that a forward on the meta device makes: place, op, numbers, and seven figures as text."""
    read = FlopMeter(s["convention"])
    read.add(meter(*(s[name] for name in NAMES)))
    rows = []
    for row in ops(read.tree(True, s["x"], s["w"]), s["convention"]):
        parts = "", "_bytes_read", "_bytes_written"
        costs = [row[f"{side}{part}"] for side in ("forward", "backward") for part in parts]
        rows.append([row["module"], row["op"], row["numbers"], *map(str, (row["times"], *costs))])
    return rows


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    flags = ["--model", str(POCKET), "--rank", "8", "--targets", "k_proj", "--train", "--html", str(path)]
    assert run.main(["flops", *flags]) == 0
    return path


SCRIPT = """
const page = require("fs").readFileSync(process.argv[1], "utf8");
(0, eval)(/<script id="engine">([^]*?)<\\/script>/.exec(page)[1]);
const row = n => [n.path, n.name, n.op.numbers.map(([k, v]) => `${k}=${v}`).join(" "), n.times,
  ...["forward", "backward"].flatMap(side => [n[side].total, n[side].read, n[side].written])];
const text = (key, value) => typeof value === "bigint" ? String(value) : value;
for (const s of JSON.parse(process.argv[2])) {
  if (s.model === "pocket") s.model = explorer.DATA.start.model;
  s.targets = s.targets.join(" ");
  console.log(JSON.stringify(explorer.walk(explorer.build({...s, fold: true})).filter(n => n.op).map(row), text));
}
"""


def test_the_pages_integers_are_the_meters_for_42_settings(html):
    """Op by op, in the tree's order: FLOPs and bytes, forward and backward; released sizes and a folder's."""
    if not shutil.which("node"):
        pytest.skip("no node on this machine: the browser's test compares a few settings")
    asked = [s | {"targets": list(s["targets"])} for s in settings()]
    command = ["node", "-e", SCRIPT, str(html), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for s, line in zip(settings(), done.stdout.splitlines(), strict=True):
        assert json.loads(line) == counted(s), s


def test_the_page_is_one_file_below_its_limit_that_asks_for_nothing(html, monkeypatch):
    text = html.read_text()
    assert len(text.encode()) < 400_000 < explorer.MOST
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|fetch\(|url\(""", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}
    monkeypatch.setattr(explorer, "MOST", 1000)
    with pytest.raises(ValueError, match="the page of x is [0-9,]+ bytes: expected at most 1,000"):
        explorer.page("x", QwenConfig.named("Qwen2.5-7B"), {"targets": QV})


def test_a_measured_machine_is_the_first_of_the_roofline():
    name, flops, moved = explorer.calibrated(seconds=0.02)
    assert "measured" in name and flops > 1e8 and moved > 1e7
    start = {"targets": QV, "batch": 1}
    text = explorer.page("x", QwenConfig.named("Qwen2.5-0.5B"), start, [(name, flops, moved)])
    assert f'"machines":[["{name}",{flops}' in text


def crumbs(tab) -> list[str]:
    return tab.locator("#crumbs button").all_inner_texts()


def choose(tab, **values: str) -> None:
    """Makes choices, those that a narrow page folds away too."""
    if tab.locator("#more").is_visible() and tab.locator("#more").inner_text() == "more":
        tab.locator("#more").click()
    for name, value in values.items():
        field = tab.locator(f"[name={name}]")
        if field.is_visible():
            field.fill(value) if field.get_attribute("type") else field.select_option(value)


def test_a_browser_zooms_by_click_and_by_keyboard_finds_sorts_and_switches(tab):
    model = str(POCKET)
    tab.locator("#icicle g[data-key='model.layers']").click()
    tab.locator("#icicle g[aria-label*='.mlp: ']").click()
    assert crumbs(tab)[0] == model and crumbs(tab)[-1] == "mlp"
    rows = tab.locator("#rows tr")
    assert sorted(set(rows.locator("td:first-child").all_inner_texts())) == [
        *(f"layer 0-{LAYERS - 1}.mlp {name}" for name in ("shared", "silu")),
        *(f"layer 0-{LAYERS - 1}.mlp.{name} linear" for name in ("down_proj", "gate_proj", "up_proj")),
    ]
    tab.get_by_role("button", name="op", exact=True).click()
    assert rows.first.locator("td").first.inner_text().endswith("mlp shared")
    tab.locator("#crumbs button").first.click()
    assert crumbs(tab) == [model]

    tab.locator("#icicle [tabindex='0']").focus()
    for key in ("ArrowDown", "ArrowRight", "Enter"):  # model, lm_head
        tab.keyboard.press(key)
    assert crumbs(tab) == [model, "lm_head"] and "lm_head" in tab.locator("#detail b").inner_text()
    tab.keyboard.press("Escape")
    assert crumbs(tab) == [model]

    tab.locator("#search").fill("softmax")
    assert rows.count() == 1 and "10·B·H·T·S" in rows.inner_text()
    tab.keyboard.press("Enter")
    assert "softmax" in tab.locator("#detail b").inner_text()
    tab.locator("#search").fill("")

    for s in settings()[-6::2]:
        values = {
            name: str(s[name]) for name in ("phase", "convention", "model", "context", "cache", "guesses", "batch")
        }
        choose(tab, **values, targets=" ".join(s["targets"]), rank=str(s["rank"]))
        forward = sum(int(row[4]) for row in counted(s))
        assert tab.locator("#totals data").inner_text() == f"{forward:,}"
    tab.locator("#copy").click()
    assert tab.locator("#copy").inner_text() == "copied"


def said(tab, pattern: str) -> list[str]:
    return re.findall(pattern, tab.locator("#totals").inner_text())


def by_lora(tab) -> list[str]:
    found = []
    for convention in ("coursework", "exact"):
        choose(tab, model="Qwen2.5-0.5B", targets="all-linear", rank="64", convention=convention)
        found += said(tab, "with LoRA.*")
    return found


WALK = """() => {
  const svg = document.getElementById("icicle"), at = () => svg.querySelector(".selected"), seen = new Set();
  const moved = key => {
    const was = at();
    was.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    return at() !== was;
  };
  const below = () => {
    seen.add(at());
    if (!moved("ArrowDown")) return;
    do below(); while (moved("ArrowRight"));
    moved("ArrowUp");
  };
  below();
  return [...svg.children].filter(g => !seen.has(g)).map(g => g.dataset.key);
}"""


def by_arrows(tab) -> list[str]:
    choose(tab, model="Qwen2.5-0.5B")
    return tab.evaluate(WALK)


def by_escape(tab) -> list[str]:
    tab.locator("#icicle g[data-key='model.layers']").click()
    tab.keyboard.press("Escape")
    return crumbs(tab)


def by_sorting(tab) -> list[int]:
    box, scrolled = tab.locator(".scroll"), []
    box.evaluate("box => box.scrollTop = 200")
    scrolled.append(box.evaluate("box => box.scrollTop"))
    tab.get_by_role("button", name="op", exact=True).click()
    return [*scrolled, box.evaluate("box => box.scrollTop")]


def by_decoding(tab) -> list[str]:
    cached, found = tab.locator("[name=cache]"), []
    choose(tab, phase="decode")
    found += said(tab, r"for (.*?),") + [cached.input_value()]
    choose(tab, cache="0", batch="1")
    choose(tab, phase="prefill")
    choose(tab, phase="decode")
    return [*found, *said(tab, r"for (.*?),"), cached.input_value()]


def by_typing(tab) -> list[str]:
    tab.locator("[name=batch]").click()
    tab.keyboard.type("32")
    return [tab.locator("[name=batch]").input_value()]


@pytest.mark.parametrize(
    "do, expected",
    [
        (
            by_lora,
            [
                "with LoRA: +463,469,543,424 (+6.85 %) against none",
                "with LoRA: -1,595,012,106,368 (-25.09 %) against none: frozen weights have no gradient of their own",
            ],
        ),
        (by_arrows, []),
        (by_escape, [str(POCKET), "model"]),
        (by_sorting, [200, 0]),
        (by_decoding, ["one decoding step: 4 tokens (batch 4)", "1000", "one decoding step: a token", "0"]),
        (by_typing, ["32"]),
    ],
)
def test_a_strangers_stumbles(tab, do, expected):
    """LoRA's difference is said; arrows pass over bars not drawn; Escape undoes a click; a sorted table is at its top;
    a decoding step is of the whole batch, after a cache that one can take away; typing replaces a number."""
    assert do(tab) == expected


def test_measured_seconds_stand_in_the_table_until_the_setting_is_another(browser, tmp_path):
    config = QwenConfig.from_file(POCKET / "config.json")
    start = {"batch": 2, "context": 9, "cache": 0, "rank": 0, "guesses": 1, "targets": QV, "phase": "forward"}
    start |= {"convention": "exact", "x": 4, "w": 4}
    seconds = {(f"model.layers.{i}.self_attn", "scores"): 0.001 for i in range(LAYERS)}
    (tmp_path / "page.html").write_text(explorer.page("pocket", config, start, seconds=seconds))
    tab = browser.new_page()
    tab.goto((tmp_path / "page.html").as_uri())
    shown = {row.split("\t")[0].split(".")[-1]: row for row in tab.locator("#rows tr").all_inner_texts()}
    assert f"\t{LAYERS}.00 ms\t" in shown["self_attn scores"] and "\twith scores\t" in shown["self_attn values"]
    assert tab.locator("#roofline circle[style*='fill:none']").count() == 1
    assert f"Measured (rings): {LAYERS}.00 ms." in tab.locator("#bound").inner_text()
    tab.locator("[name=batch]").fill("3")
    assert "measured" not in tab.locator("#heads").inner_text() and tab.locator("#roofline circle").count() > 9
    tab.close()
