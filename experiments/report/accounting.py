"""What it cost: FLOPs by stage beside the prediction and the budget, and a report's own totals beside the exact."""

from collections import defaultdict
from functools import partial

from experiments import plots
from experiments.report import ops
from experiments.report.document import Block, Figure, Inline, Items, Number, Section, Table, Text, named
from experiments.report.records import Row
from experiments.report.study import PARTS, Study


def accounting(study: Study) -> Section:
    """FLOPs by stage; predicted beside spent; claimed beside exact, with the mistakes."""
    blocks: list[Block] = [_spent(study)] if study.runs else []
    if study.plan and "prices" in study.plan.values:
        blocks.append(_prices(study))
    blocks += ops.by_module(study) + _claimed(study)
    return Section("accounting", "FLOPs and the budget", [*blocks, *([_budget_bar(study)] if study.runs else [])])


def total(study: Study) -> Row:
    """The row of everything that was spent."""
    found = [row for row in study.flops if (row["stage"], row["part"]) == ("all", "total")]
    if len(found) != 1:
        raise ValueError(f"{study.root / study.flops_file}: {len(found)} rows of all, total: expected one")
    return found[0]


def _budget_bar(study: Study) -> Figure:
    """FLOPs by stage and part beside the budget."""
    stages: dict[str, dict[str, int]] = defaultdict(dict)
    for row in study.flops:
        if row["stage"] != "all" and row["part"] in PARTS:
            stages[row["stage"]][row["part"]] = row["flops"]
    title, caption = "FLOPs by stage beside the budget", "FLOPs spent by stage on training, validation and inference"
    draw = partial(plots.budget_bar, dict(stages), study.budget, title=title, label=study.label)
    files = [study.flops_file, "study.json" if study.plan else "config.toml"]
    return Figure("budget", f"{caption}, beside the budget.", draw, files, list(stages))


def _spent(study: Study) -> Table:
    rows = []
    for row in study.flops:
        spent, predicted = row["flops"], row["predicted"]
        more = spent - predicted if predicted is not None else None
        rows.append([row["stage"], row["part"], spent, predicted, more, row["share_of_budget"]])
    titles = {"flops": "spent", "difference": "spent - predicted", "share_of_budget": "share of the budget"}
    columns = named("stage part flops predicted difference share_of_budget", **titles)
    caption = "FLOPs by stage, convention coursework: counted where each op ran, beside what was predicted."
    stages = [stage for stage in dict.fromkeys(row["stage"] for row in study.flops) if stage != "all"]
    return Table("flops", caption, columns, rows, [study.flops_file], stages, heads=2)


def _prices(study: Study) -> Table:
    prices = study.records.json("study.json").fields("prices")
    rows = [[name.replace("_", " "), prices.count(name)] for name in prices.values]
    columns = named("primitive price", price="FLOPs")
    caption = "Price of each primitive: negation and subtraction as add, inversion as divide, logarithm as exponential."
    return Table("prices", caption, columns, rows, ["study.json"])


def _claimed(study: Study) -> list[Block]:
    """The report's own totals, what its formulas give, and the exact count of the same plan."""
    if not study.records.has("accounting.csv"):
        return []
    counts = dict.fromkeys(("claimed", "reproduced", "exact"), "count or nothing")
    counts |= {"share_of_exact": "number or nothing", "label": "text?", "note": "text?"}
    rows = study.records.csv("accounting.csv", stage="text", part="text", **counts)
    titles = {"called": "its own name", "claimed": "the report", "reproduced": "by its own formulas"}
    titles |= {"share_of_exact": "claimed / exact"}
    columns = named("stage part called claimed reproduced exact share_of_exact note", **titles)
    about = study.records.json("accounting.json")
    said = str(about.values.get("title") or "FLOPs that the report claims, beside the exact count of the same plan")
    caption = f"{said[0].upper()}{said[1:].rstrip('.')}."
    notes: list[Block] = [Text([about.text("note")])] if about.values.get("note") else []
    rows = [row | {"called": row["label"]} for row in rows]  # a column "label" is the page's own
    values = [[row[column.name] for column in columns] for row in rows]
    files = ["accounting.csv", "accounting.json"]
    table = Table("accounting", caption, columns, values, files, heads=3).without_empty()
    mistakes: list[Inline] = [[mistake] for mistake in about.texts("mistakes")]
    heading = Text(["Claimed beside exact"], "heading")
    return [heading, *notes, table, Text(["Mistakes of that accounting:"]), Items(mistakes)]


def spent_of_budget(study: Study) -> Inline:
    """What was spent, as a line of the summary."""
    row = total(study)
    spent, budget = Number(row["flops"], "flops"), Number(study.budget, "flops")
    return [Number(row["share_of_budget"], "share"), " of the budget: ", spent, " of ", budget, " FLOPs"]
