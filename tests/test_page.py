"""The page of a run in a browser: its figures show their values, its legends, switches and tables do what they say."""

import csv
import io
import json
from pathlib import Path

import pytest
import study_folder
from PIL import Image
from test_report import sketching

from experiments import report
from experiments.run_folder import files

BEST = "cells/lr0.0001-r8"
RUNS = sorted(f"lr{lr:g}-r{rank}" for lr in study_folder.RATES for rank in study_folder.RANKS)
OPEN = "document.querySelectorAll('details').forEach(one => one.open = true)"

SWITCHES = """[...document.querySelectorAll(".switch")].map(box => {
  const blocks = [...box.querySelectorAll(":scope > [data-choice]")];
  return [...box.querySelectorAll(".choices button")].map(button => {
    button.click();
    return [blocks[0].id, button.textContent, blocks.filter(one => one.offsetHeight).map(one => one.dataset.choice)];
  });
})"""


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    folder = study_folder.write_grid(tmp_path_factory.mktemp("page") / "grid", judged={"untrained": 0.1, BEST: 0.3})
    with sketching(but=("loss_curves", "glance")):
        return report.build(folder)


def pointed_at(tab, figure: str, panel: int, x: float, y: float = 0.5) -> tuple[float, dict[str, float]]:
    """Point at a place in a panel, in shares of its width and height; what is shown: x, and the values by name."""
    svg = tab.locator(f"#figure-{figure} svg")
    svg.scroll_into_view_if_needed()
    box, (*_, width, _) = svg.bounding_box(), map(float, svg.get_attribute("viewBox").split())
    left, top, right, bottom = json.loads(svg.locator("metadata").text_content())["panels"][panel]["box"]
    scale = box["width"] / width
    tab.mouse.move(box["x"] + scale * (left + x * (right - left)), box["y"] + scale * (top + y * (bottom - top)))
    rows = tab.locator(f"#figure-{figure} .tip > *").all()
    names = [row.inner_text().rpartition(": ")[0] for row in rows[1:]]
    values = [float(row.locator("data").get_attribute("value")) for row in rows]
    return values[0], dict(zip(names, values[1:], strict=True))


def recorded(html: Path, run: str, step: int) -> dict:
    """The last line of a step, of its validation where there was one."""
    return [line for line in files.read_jsonl(html.parent / f"cells/{run}/metrics.jsonl") if line["step"] == step][-1]


def test_pointing_at_a_figure_shows_the_values_of_the_records_there(tab, html):
    tab.evaluate(OPEN)
    step, values = pointed_at(tab, "loss-cells-by-step", 1, 0.74)
    assert (step, sorted(values)) == (30, RUNS)
    assert values == {run: recorded(html, run, 30)["validation_loss"] for run in RUNS}
    untrained = files.read_json(html.parent / "untrained/result.json")["validation_loss"]
    assert pointed_at(tab, "loss-cells-by-step", 1, 0.05) == (0, dict.fromkeys(values, untrained))
    _, values = pointed_at(tab, "glance", 0, 0.99)
    with (html.parent / BEST / "evaluation/forecasts.csv").open() as file:
        last = [row for row in csv.DictReader(file) if (row["unique_id"], row["variable"]) == ("15", "prey")][-1]
    assert values == {"prey, truth": float(last["y"]), "forecast": float(last["y_hat"])}
    tab.mouse.move(0, 0)
    assert not tab.locator(".tip:visible").count()


def test_a_click_in_the_legend_hides_its_lines_in_every_figure_of_the_switch(tab, html):
    tab.evaluate(OPEN)
    entry = tab.locator("#figure-loss-cells-by-step").get_by_role("button", name="rank 2")
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false"
    kept = [run for run in RUNS if not run.endswith("-r2")]
    assert sorted(pointed_at(tab, "loss-cells-by-step", 1, 0.74)[1]) == kept
    tab.get_by_role("button", name="over training FLOPs").click()
    lines = tab.locator("#figure-loss-cells-by-flops [data-series]")
    assert (lines.count(), lines.locator("visible=true").count()) == (18, 12)
    flops, values = pointed_at(tab, "loss-cells-by-flops", 1, 0.74)
    assert (flops, sorted(values)) == (recorded(html, RUNS[0], 30)["training"], kept)
    tab.get_by_role("button", name="over time").click()
    seconds, values = pointed_at(tab, "loss-cells-by-time", 1, 0.74)
    at = [line["step"] for line in files.read_jsonl(html.parent / f"cells/{RUNS[0]}/metrics.jsonl")]
    clock = files.read_jsonl(html.parent / f"cells/{RUNS[0]}/clock.jsonl")
    assert (seconds, sorted(values)) == (clock[at.index(30) + 1]["seconds"], kept)
    tab.get_by_role("button", name="over training FLOPs").click()
    tab.locator("#figure-loss-cells-by-flops").get_by_role("button", name="rank 2").press("Enter")
    assert lines.locator("visible=true").count() == 18


def test_each_switch_shows_one_of_its_blocks_and_without_script_and_in_print_all_are_there(tab, html, browser):
    tab.evaluate(OPEN)
    switches = tab.evaluate(SWITCHES)
    assert all(seen == [text] for switch in switches for _, text, seen in switch)
    found = {switch[0][0]: [text for _, text, _ in switch] for switch in switches}
    units = ["raw units", "scaled units"]
    assert found["figure-loss-cells-by-step"] == ["over steps", "over training FLOPs", "over time"]
    assert units == found["table-scores-grid"] == found["table-systems-baseline"]
    tab.emulate_media(media="print")
    assert tab.evaluate("[...document.querySelectorAll('[data-choice]')].every(one => one.offsetHeight)")
    tab.emulate_media(media="screen")
    plain = browser.new_page(java_script_enabled=False)
    plain.goto(html.as_uri())
    for name in ("How it was found", "Training"):
        plain.get_by_role("heading", name=name, exact=True).click()
    assert plain.locator("#training svg").count() == plain.locator("#training svg:visible").count() == 3
    plain.close()


@pytest.mark.parametrize(("name", "column", "called"), [("grid", 4, "rank 8"), ("grid-runs", 6, "validation loss")])
def test_a_click_on_a_columns_title_sorts_and_another_turns_it_round(tab, name, column, called):
    """Bug: on a phone the titles of a table of more than four columns were not there."""
    tab.evaluate(OPEN)
    table = tab.locator(f"#table-{name}")
    cells = table.locator(f"tbody td:nth-child({column})")
    shown = lambda: [float(cell.get_attribute("title")) for cell in cells.all()]  # noqa: E731
    before, title = shown(), table.get_by_role("button", name=called)
    assert before != sorted(before)
    for order, reverse in (("ascending", False), ("descending", True)):
        title.click()
        assert shown() == sorted(before, reverse=reverse)
        assert table.locator(f"[aria-sort={order}]").inner_text().startswith(called)


def test_no_figure_is_white_in_the_dark(tab):
    tab.evaluate(OPEN)
    dark = tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    for name in ("loss-cells-by-step", "glance"):
        picture = Image.open(io.BytesIO(tab.locator(f"#figure-{name} svg").screenshot())).convert("L")
        brightest = sorted(count for count in picture.getcolors())[-1][1]  # of the most dots
        assert (brightest < 60) == dark and (brightest > 240) != dark
