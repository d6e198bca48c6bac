"""The README's code runs, and the numbers in its first table are those of the committed result files."""

import json
import re
from pathlib import Path
from statistics import median

import pytest

from benchmarks import tables
from benchmarks.schema import load
from qar_kernels import reference
from train.metrics.wording import difference

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks/results"


def test_the_five_lines_of_use_run():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    gradients = {name for name, weight in names["model"].named_parameters() if weight.grad is not None}
    assert "model.layers.0.experts.down" in gradients


def test_the_call_of_the_kernels_runs():
    code = re.search(
        r"```python\n(.*?)```", (ROOT / "docs/kernels.md").read_text(encoding="utf-8"), re.DOTALL
    )
    names = {}
    exec(code[1], names)
    base = reference.swiglu_mlp(*(names[name] for name in ("x", "gate", "up", "down")))
    difference = (names["y"] - base).norm(dim=1) / base.norm(dim=1)
    assert (difference > 1e-3).tolist() == [True, True, False, True]


def first_table() -> str:
    return README[README.index("| measured here |") : README.index("## ")]


def test_speeds_are_those_of_the_result_files():
    (finetuning,) = (
        row
        for row in load(RESULTS / "amd-epyc-2-cores-2026-11-29.json")["rows"]
        if (row["op"], row["provider"]) == ("finetune_step", "qar")
    )
    assert f"**{1 / finetuning['ratio_to_base']:.1f} times as fast**" in first_table()
    standings = tables.standings(load(RESULTS / "amd-epyc-2-cores-2026-11-28.json"))
    bare = [standing for standing in standings if standing.op == "expert_mlp"]
    whole = [standing for standing in standings if standing.op != "expert_mlp"]
    counts = [sum(s.count(v) for s in group) for group in (bare, whole) for v in ("wins", "ties", "loses")]
    claim = (
        "experts alone: faster in {}, equal in {}, **slower in {}**; "
        "with MLPs, layers or models around them: faster in {}, equal in {}, slower in {} (all six"
    )
    assert claim.format(*counts) in first_table()
    assert counts[2] + counts[5] == 6
    assert all(row["Q"] == 1 for standing in standings for _, _, row in standing.losses)
    medians = [median(s.over_base) for s in whole]
    worst = max(max(s.over_base) for s in whole)
    assert f"median {min(medians):.2f} to {max(medians):.2f} times" in first_table()
    assert f"{worst:.2f} at worst" in first_table()


def results(name: str) -> dict:
    return json.loads((ROOT / f"docs/results/{name}.json").read_text(encoding="utf-8"))


def test_the_differences_of_answers_are_the_committed_ones():
    game, plays = results("wesnoth")["paired"], results("plays")["paired"]
    ours, control = game["qar_unnamed_vs_ft_unnamed"]["nll"], game["qar_unnamed_vs_control_unnamed"]["nll"]
    claim = (
        f"{-ours['diff']:.3f} nats a token better than plain fine-tuning, {-control['diff']:.3f} better than"
    )
    assert claim in first_table()
    assert ours["ci95"][1] < 0 and control["ci95"][1] < 0
    ours, control = plays["qar_vs_ft"]["nll"], plays["qar_vs_control"]["nll"]
    assert f"plays: {-ours['diff']:.3f} better, and no better than the control" in first_table()
    assert control["ci95"][0] < 0 < control["ci95"][1]


@pytest.mark.parametrize(
    "name",
    [
        "wesnoth",
        "wesnoth_seeds",
        "wesnoth_one_turn",
        "wesnoth_chinese",
        "company",
        "company_splits",
        "plays",
        "plays_all_replies",
    ],
)
def test_the_summary_has_the_committed_intervals(name):
    suffix = "" if name.startswith("plays") else "_unnamed"
    found = results(name)
    pairs = [found["paired"][f"qar{suffix}_vs_{other}{suffix}"] for other in ("ft", "control")]
    swap = found["swap"][f"qar{suffix}"]
    compared = [(key, pair[key]) for key in ("nll", "rougeL") for pair in pairs]
    cells = [difference(key, one["diff"], one["ci95"]) for key, one in compared]
    cells.append(difference("nll", swap["nll_diff"], swap["nll_ci95"]))
    (row,) = (
        line for line in README.splitlines() if line.startswith("| [") and f"results/{name}.md)" in line
    )
    assert row.split(" | ", 1)[1] == " | ".join(cells) + " |"
