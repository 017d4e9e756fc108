"""What others count beside ours: named terms that add up to the difference, to the integer, for every program."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from experiments import run
from experiments.accounting import audit, counters, three_reports
from experiments.settings.record import POCKET
from qwen_min import QwenConfig

SIZES = {"vocab_size": 89, "hidden_size": 60, "intermediate_size": 83, "num_hidden_layers": 2, "rope_theta": 1e4}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 64}
TIED, UNTIED = (QwenConfig(**SIZES, tie_word_embeddings=tied) for tied in (True, False))
FORMULAS = {"6N", "6N without embeddings", "6N + 6·L·T·H·Q", "6N + 12·L·H·Q·T", "Chinchilla"}
FORMULAS |= {"matmul, ours", "coursework, ours"}
REPORTS = {"Fung's report", "Liu's report", "Rai's report"}


def terms_add_up(records: list[dict]) -> set[str]:
    """Those that were counted; of each the difference is its terms' sum, and nothing is unexplained."""
    counted = [record for record in records if "missing" not in record]
    for record in counted:
        assert "unexplained" not in record["terms"], record
        assert sum(record["terms"].values()) == record["difference"] == record["count"] - record["ours"]
    return {record["name"] for record in counted}


@pytest.mark.parametrize(
    ("config", "rank", "targets"), [(TIED, 0, ()), (UNTIED, 5, ["k_proj", "mlp.up_proj"])], ids=["plain", "LoRA"]
)
def test_the_terms_of_every_program_add_up_to_the_integer(config, rank, targets):
    records = audit.audit(config, 3, 7, rank, targets)
    absent = {package for package, _ in counters.COUNTERS.values() if not installed(package)}
    # thop registers its buffers on each module once more where it is read twice, as PEFT's are
    missing = {r["name"] for r in records if "missing" in r and not any(a in r["missing"] for a in absent)} - REPORTS
    assert missing == ({"thop"} if rank and "thop" not in absent else set())
    counted = terms_add_up(records)
    assert counted >= FORMULAS
    if absent:
        pytest.skip(f"{', '.join(sorted(absent))} not installed: pip install -e '.[audit]'")


def installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("name", ["fvcore", "calflops", "thop", "ptflops", "torchinfo"])
def test_without_weights_a_program_counts_what_it_counts_on_a_cpu(name):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[audit]'")
    both = [counters.count(name, TIED, 3, 7, 0, (), "eager", device) for device in ("meta", "cpu")]
    assert both[0] == both[1] > 0


def test_the_reports_and_formulas_at_their_own_size_and_the_page_that_has_them(monkeypatch):
    """Of the page: a number that changes must be written there anew."""
    monkeypatch.setattr(counters, "version", absent)
    records = audit.audit(three_reports.CONFIG, 4, 512, 8, ["q_proj", "v_proj"])
    assert terms_add_up(records) == FORMULAS | REPORTS
    page = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    lines = [line for line in audit.page(records).splitlines() if line.startswith("|") and "absent" not in line]
    assert len(lines) > len(FORMULAS) and set(lines) <= set(page.splitlines())
    palm = next(r for r in records if r["name"] == "6N + 12·L·H·Q·T")
    assert palm["count"] == 2048 * (6 * (494_032_768 + 540_672) + 12 * 24 * 14 * 64 * 512)


def absent(package: str) -> str:
    raise counters.Missing(f"{package} is absent")


def test_on_the_command_line_what_is_absent_is_listed_as_such(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(counters, "version", absent)
    flags = ["flops", "--audit", "--model", str(POCKET), "--batch", "2", "--context", "9"]
    assert run.main([*flags, "--json", "--markdown", str(tmp_path / "page.md")]) == 0
    shown = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in shown["rows"]}
    assert (shown["convention"], shown["batch"], rows["thop"]["missing"]) == ("exact", 2, "thop is absent")
    assert rows["Liu's report"]["missing"].startswith("its formulas are of Qwen2.5-0.5B, 4 sequences")
    assert run.main(flags) == 0
    said = capsys.readouterr().out
    assert "thop: thop is absent" in said and f"{rows['6N']['count']:,}" in said
    assert f"{rows['6N']['count']:,}" in (tmp_path / "page.md").read_text()
