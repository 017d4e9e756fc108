"""Figures of FLOPs: by component of a model, and by stage against the budget."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from experiments.plots.base import (
    COLOURS,
    HATCHES,
    SMALL,
    Style,
    colour,
    legend_below,
    new_figure,
    plain,
    print_right,
    save,
    scientific,
    short,
    short_ticks,
    wrapped,
)


def flops_bars(by_component: Mapping[str, int], path: str | Path, title: str, label: str = "") -> None:
    """Draw FLOPs by component as horizontal bars, largest first, each with its share of the sum."""
    if not by_component:
        raise ValueError("components is empty: expected at least one")
    ordered = sorted(by_component.items(), key=lambda item: -item[1])
    total = sum(by_component.values())
    figure, (axes,) = new_figure(1, 1.0 + 0.3 * len(ordered))
    bars = axes.barh([plain(name) for name, _ in ordered], [float(flops) for _, flops in ordered], color=COLOURS[0])
    texts = [f"{scientific(flops)} ({100 * flops / total:.2f} %)" if total else "0" for _, flops in ordered]
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.set_xlim(0, (ordered[0][1] or 1) * 1.55)  # room for the text of the longest bar
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlabel(f"FLOPs (sum {total:,})")
    short_ticks(axes.xaxis)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, title, label)


def budget_bar(
    stages: Mapping[str, Mapping[str, int]], budget: int, path: str | Path, title: str, label: str = ""
) -> None:
    """Draw what each stage spent as one stacked bar against the budget, and below it by part on its own scale.

    `stages` maps a stage to its parts ("training", "validation", "inference") and their FLOPs; `budget` is in
    FLOPs too. The colour and hatch of a stage are the same in both panels; the lower is logarithmic."""
    if budget <= 0:
        raise ValueError(f"budget is {budget}: expected a positive number")
    parts = [(stage, part, flops) for stage, of in stages.items() for part, flops in of.items()]
    if not parts:
        raise ValueError("stages is empty: expected at least one, with a part")
    for stage, part, flops in parts:
        if flops < 0:
            raise ValueError(f"{part} of {stage} is {flops} FLOPs: expected 0 or more")
    looks: dict[str, Style] = {
        stage: {"facecolor": colour(i, len(stages)), "edgecolor": "white", "hatch": HATCHES[i % len(HATCHES)]}
        for i, stage in enumerate(stages)
    }
    figure, (whole, by_part) = new_figure(2, [1.0, 0.5 + 0.24 * len(parts)], sharex=False)
    spent = sum(flops for _, _, flops in parts)
    start, handles = 0, list[Artist]()
    for stage, of in stages.items():
        flops = sum(of.values())
        name = f"{stage}, {100 * flops / budget:.3g} % of the budget"
        whole.barh([0], [float(flops)], left=float(start), **looks[stage])
        handles.append(Rectangle((0, 0), 1, 1, label=plain(name), **looks[stage]))
        start += flops
    whole.axvline(float(budget), color="black", linestyle="--", linewidth=1.8)
    handles.append(Line2D([], [], color="black", linestyle="--", label=f"budget, {short(budget)}"))
    whole.set_xlim(0, 1.05 * max(spent, budget))
    whole.set_yticks([])
    over = ": more than the budget" if spent > budget else ""
    whole.set_title(f"spent {scientific(spent)} of {short(budget)}, {100 * spent / budget:.4g} %{over}", fontsize=10)
    whole.xaxis.set_major_locator(MaxNLocator(6))

    places = np.arange(len(parts))
    amounts = [float(flops) for _, _, flops in parts]
    for place, (stage, _, _), amount in zip(places, parts, amounts, strict=True):
        by_part.barh([place], [amount], **looks[stage])
    by_part.set_yticks(places, [wrapped(f"{stage}: {part}", 2.2) for stage, part, _ in parts], fontsize=SMALL)
    by_part.set_ylim(len(parts) - 0.4, -0.6)
    print_right(by_part, places, [scientific(flops) if flops else "0" for _, _, flops in parts])
    if spent:
        by_part.set_xscale("log")
        by_part.xaxis.set_major_locator(LogLocator(numticks=6))
        by_part.xaxis.set_minor_locator(NullLocator())
        by_part.set_xlim(min(a for a in amounts if a) / 3, max(amounts) * 1.5)
    else:
        by_part.set_xticks([])
    by_part.set_xlabel("FLOPs (above in proportion, here logarithmic)")
    for axes in (whole, by_part):
        short_ticks(axes.xaxis)
        axes.spines[["top", "right"]].set_visible(False)
    legend_below(figure, handles)
    save(figure, path, title, label)
