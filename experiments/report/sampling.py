"""How forecasts were drawn: the sampling, how good the samples are as a distribution, what constraints cut off."""

from experiments.report.document import Block, Section, Table, Text, named
from experiments.report.evaluation import MODEL
from experiments.report.study import Study


def sampling(study: Study) -> Section:
    """How forecasts were drawn, and how good their distribution is."""
    title, main = "Sampling", study.main()
    if not main:
        return Section("sampling", title, [])
    titles = {"sampling": "how", "num_samples": "samples", "points": "points seen", "horizon": "points forecast"}
    names = "run sampling temperature top_k top_p repetition_penalty num_samples constrained points horizon"
    columns = named(names, **titles)
    rows = []
    for run, evaluation in main:
        about = evaluation.about
        how = [about.number(name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")]
        rows.append([run.title, about.text("sampling"), how[0], int(how[1]), *how[2:], about.count("num_samples")])
        rows[-1] += ["yes" if about.flag("constrained") else "no", about.count("points"), about.count("horizon")]
    files, stages = [evaluation.file("evaluation.json") for _, evaluation in main], [run.stage for run, _ in main]
    blocks: list[Block] = [Table("sampling", "How the forecasts were drawn.", columns, rows, files, stages)]
    return Section("sampling", title, [*blocks, *_probabilistic(study), *_constrained(study)])


def _probabilistic(study: Study) -> list[Block]:
    """CRPS, coverage and width of the bands, where forecasts are samples."""
    sampled = [(run, evaluation) for run, evaluation in study.main() if evaluation.about.count("num_samples") > 1]
    if not sampled:
        return [Text(["One continuation for each series, so there are no bands to score."])]
    titles = {f"coverage{share}": f"within the {share} % band" for share in (50, 80)}
    titles |= {f"width{share}": f"width of the {share} % band" for share in (50, 80)}
    columns = named("run part variable series crps coverage50 coverage80 width50 width80", **titles)
    rows = [
        [run.title, *(row[column.name] for column in columns[1:])]
        for run, evaluation in sampled
        for row in evaluation.scores
        if row["forecaster"] == MODEL and row["unit"] == "raw" and row["crps"] is not None
    ]
    caption = "The samples as a distribution, raw units: CRPS, and how often the truth lies in a band of its own share."
    files = [evaluation.file("scores.csv") for _, evaluation in sampled]
    return [Table("probabilistic", caption, columns, rows, files, [run.stage for run, _ in sampled], heads=3)]


def _constrained(study: Study) -> list[Block]:
    """How much probability constrained decoding cut off."""
    main = [(run, evaluation) for run, evaluation in study.main() if evaluation.about.flag("constrained")]
    if not main:
        return [Text(["Decoding was free: no token was ruled out."])]
    shown, parts = [], []
    for run, evaluation in main:
        own = {row["unique_id"]: row for row in evaluation.systems if row["forecaster"] == MODEL}
        for part in evaluation.parts:
            cut = [r["cut_mass"] for r in own.values() if part in r["parts"].split() and r["cut_mass"] is not None]
            if cut:
                parts.append([run.title, part, len(cut), sum(cut) / len(cut), max(cut)])
        rows = [own[system] for system in evaluation.shown if system in own]
        shown += [[run.title, row["unique_id"], row["class"], row["cut_mass"], row["cut_mass_mean"]] for row in rows]
    files, stages = [evaluation.file("systems.csv") for _, evaluation in main], [run.stage for run, _ in main]
    means = named("run part series mean largest", mean="mean over series")
    names = "run system class cut_mass cut_mass_mean"
    each = named(names, cut_mass="of the whole forecast", cut_mass_mean="mean of a token")
    caption = "Probability that free decoding would have left the encoding's grammar on the way, which was cut off"
    return [
        Table("cut-mass", f"{caption}.", means, parts, files, stages, heads=2),
        Table("cut-mass-shown", f"{caption}: the shown systems.", each, shown, files, stages, heads=2, folded=True),
    ]
