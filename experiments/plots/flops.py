"""Figures of FLOPs: by component of a model, and by stage against the budget."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from experiments.plots import base


def flops_bars(by_component: Mapping[str, int], path: str | Path, title: str, label: str = "") -> None:
    """Draw FLOPs by component as horizontal bars, largest first, each with its share of the sum."""
    base.not_empty(by_component, "a bar chart of FLOPs")
    ordered = sorted(by_component.items(), key=lambda item: -item[1])
    total = sum(by_component.values())
    figure, (axes,) = base.new_figure(1, 1.0 + 0.3 * len(ordered))
    bars = axes.barh(
        [base.plain(name) for name, _ in ordered], [float(flops) for _, flops in ordered], color=base.COLOURS[0]
    )
    texts = [f"{base.scientific(flops)} ({100 * flops / total:.2f} %)" if total else "0" for _, flops in ordered]
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.set_xlim(0, (ordered[0][1] or 1) * 1.55)  # room for the text of the longest bar
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlabel(f"FLOPs (sum {total:,})")
    base.short_ticks(axes.xaxis)
    axes.spines[["top", "right"]].set_visible(False)
    base.save(figure, path, title, label)


def budget_bar(
    stages: Mapping[str, Mapping[str, int]], budget: int, path: str | Path, title: str, label: str = ""
) -> None:
    """Draw what each stage spent as one stacked bar against the budget, and below it each part beside the largest.

    `stages` maps a stage to its parts ("training", "validation", "inference") and their FLOPs; `budget` is in
    FLOPs too. The colour and hatch of a stage are the same in both panels."""
    if budget <= 0:
        raise ValueError(f"the budget is {budget}: expected more than 0 FLOPs")
    parts = [(stage, part, flops) for stage, of in stages.items() for part, flops in of.items()]
    base.not_empty(parts, "a budget bar")
    for stage, part, flops in parts:
        if flops < 0:
            raise ValueError(f"{part} of {stage} is {flops} FLOPs: expected at least 0")
    looks: dict[str, base.Style] = {
        stage: {"facecolor": base.colour(i, len(stages)), "edgecolor": "white", "hatch": hatch}
        for i, (stage, hatch) in enumerate(zip(stages, cycle(base.HATCHES)))
    }
    figure, (whole, by_part) = base.new_figure(2, [1.0, 0.5 + 0.24 * len(parts)], sharex=False)
    spent = sum(flops for _, _, flops in parts)
    start, handles = 0, list[Artist]()
    for stage, of in stages.items():
        flops = sum(of.values())
        name = f"{stage}, {100 * flops / budget:.3g} % of the budget"
        whole.barh([0], [float(flops)], left=float(start), **looks[stage])
        handles.append(Rectangle((0, 0), 1, 1, label=base.plain(name), **looks[stage]))
        start += flops
    whole.axvline(float(budget), color="black", linestyle="--", linewidth=1.8)
    handles.append(Line2D([], [], color="black", linestyle="--", label=f"budget, {base.short(budget)}"))
    whole.set_xlim(0, 1.05 * max(spent, budget))
    whole.set_yticks([])
    over = ": more than the budget" if spent > budget else ""
    whole.set_title(
        f"spent {base.scientific(spent)} of {base.short(budget)}, {100 * spent / budget:.4g} %{over}", fontsize=10
    )
    whole.xaxis.set_major_locator(MaxNLocator(6))

    amounts = [float(flops) for _, _, flops in parts]
    for place, ((stage, _, _), amount) in enumerate(zip(parts, amounts, strict=True)):
        by_part.barh([place], [amount], **looks[stage])
    names = [base.wrapped(f"{stage}: {part}", 2.2) for stage, part, _ in parts]
    base.name_bars(by_part, names, [base.scientific(flops) for _, _, flops in parts])
    if spent:
        by_part.set_xlim(0, 1.05 * max(amounts))
        by_part.xaxis.set_major_locator(MaxNLocator(6))
    else:
        by_part.set_xticks([])
    by_part.set_xlabel("FLOPs (above beside the budget, here beside the largest part)")
    whole.spines[["top", "right"]].set_visible(False)
    for axes in (whole, by_part):
        base.short_ticks(axes.xaxis)
    base.legend_below(figure, handles)
    base.save(figure, path, title, label)
