"""The benchmark as a table: aligned for a terminal, in Markdown for a page."""

from typing import Any

from experiments.run_folder import table

HEADS = ("case", "ours", "peer", "faster", "of the floor", "peak memory", "same result", "targets")
SCALING_HEADS = ("axis", "value", "ours", "peer", "faster", "of the floor", "peak memory")


def text(report: dict[str, Any]) -> str:
    """What the command prints: the machine, the table with a line a case, the notes."""
    rows = [HEADS, *map(cells, report["cases"])]
    return "\n".join([*header(report), "", *table.aligned(rows, len(rows[0])), "", *notes(report)])


def markdown(report: dict[str, Any]) -> str:
    """`bench.md`."""
    lines = ["# Benchmark", "", *(f"- {line}" for line in header(report)), ""]
    lines += table.markdown([HEADS, *map(cells, report["cases"])])
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(report)), ""])


def scaling_text(report: dict[str, Any]) -> str:
    """What `--scaling` prints."""
    rows = [SCALING_HEADS]
    for point in report["points"]:
        _, *rest = cells(point)
        rows.append((point["axis"], str(point["value"]), *rest[:5]))
    return "\n".join([*header(report), "", *table.aligned(rows, len(rows[0]))])


def header(report: dict[str, Any]) -> list[str]:
    """Machine, versions and calibration."""
    rates, machine = report["calibration"], report["machine"]
    low, high = rates["flops_per_second_spread"]
    slow, fast = rates["bytes_per_second_spread"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    label = f" ({report['label']})" if report["label"] else ""
    return [
        f"{report['model']}{label} on {report['device']}: our weights kept in {report['dtype']}, products of both "
        f"sides in {report['compute']}; our kernels: {report['kernels']}",
        f"{machine['processor']}, {machine['threads']} pinned threads; {versions}",
        f"calibrated in {len(rates['runs'])} fresh processes of this run: {high / 1e9:.0f} GFLOP/s (worst "
        f"{low / 1e9:.0f}), {fast / 1e9:.1f} GB/s (worst {slow / 1e9:.1f}); the floor is the products a case needs, or "
        "the bytes it must read, at the best of these",
        f"each side {report['repeats']} times in turns, each time in a fresh process: medians (least-most)",
    ]


def cells(line: dict[str, Any]) -> tuple[str, ...]:
    """One case, under `HEADS`."""
    ours, peer = line["ours"], line.get("peer")
    share = line.get("share")
    targets = [f"{t['target']} {'met' if t['met'] else 'MISSED'}" for t in line["targets"]]
    return (
        line["name"],
        _measure(line["unit"], ours),
        _measure(line["unit"], peer) if peer else "-",
        f"{line['ratio']:.2f}x" if peer else "-",
        "-" if share is None else f"{100 * share:.{0 if share >= 0.01 else 1}f} %",
        _gigabytes(ours) + (f" / {_gigabytes(peer)}" if peer else "") + " GB",
        line.get("same", "-"),
        ", ".join(targets) or "-",
    )


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    lines = report["cases"]
    said = [f"{line['name']}: {line['note']}" for line in lines if line["note"]]
    for line in lines:
        if line["unit"] == "tokens/s":
            ours, peer = line["ours"], line.get("peer")
            whole = f"{line['name']}: with the prefill {ours['whole_tokens_per_second']:.1f} tokens/s"
            if peer:
                times = peer["whole_seconds"] / ours["whole_seconds"]
                whole += f", the peer {peer['whole_tokens_per_second']:.1f}, {times:.2f}x"
            tree = ours.get("tokens_per_forward", 1)
            said.append(whole + (f"; {tree:.2f} tokens a forward" if tree > 1 else ""))
        if line["what"] == "load":
            sides = [f"{who} {line[who]['whole_seconds']:.2f} s" for who in ("ours", "peer") if who in line]
            said.append(f"{line['name']}: to the first logits {', '.join(sides)}")
    if any(line["unit"] == "tokens/s" for line in lines):
        said.append("tokens/s in the table are those of decoding, from the first new token to the last")
    if any(line["targets"] for line in lines):
        said.append("targets: as they were set for two CPU cores and the 0.5B model")
    if any("device_peak_bytes" in line["ours"] for line in lines):
        said.append("peak memory: of the GPU, all that torch allocated")
    else:
        empty = " / ".join(
            f"{max(line[who]['baseline_bytes'] for line in lines if who in line) / 1e9:.2f}"
            for who in ("ours", "peer")
            if any(who in line for line in lines)
        )
        said.append(
            f"peak memory: resident, mapped weights, interpreter and libraries included; without a model {empty} GB"
        )
    return said


def _measure(unit: str, side: dict[str, Any]) -> str:
    """The median and its spread, in the unit of the case."""
    if unit == "%":
        low, high = (100 * x for x in side["overhead_spread"])
        return f"{100 * side['overhead']:.2f} % ({low:.2f}-{high:.2f})"
    seconds, (low, high) = side["seconds"], side["seconds_spread"]
    if unit == "tokens/s":
        tokens = side["tokens_per_second"] * seconds
        return f"{tokens / seconds:.1f} tokens/s ({tokens / high:.1f}-{tokens / low:.1f})"
    digits = 2 if seconds >= 1 else 4
    return f"{seconds:.{digits}f} s ({low:.{digits}f}-{high:.{digits}f})"


def _gigabytes(side: dict[str, Any]) -> str:
    return f"{side.get('device_peak_bytes', side['peak_bytes']) / 1e9:.2f}"
