"""The README's code runs, and the numbers in its first table are those of the committed result files."""

import json
import re
from pathlib import Path
from statistics import median

from benchmarks import tables
from benchmarks.schema import load

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks/results"


def test_the_five_lines_of_use_run():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    gradients = {name for name, weight in names["model"].named_parameters() if weight.grad is not None}
    assert "model.layers.0.experts.down" in gradients


def first_table() -> str:
    return README[README.index("| measured here |") : README.index("## ")]


def test_speeds_are_those_of_the_result_files():
    (finetuning,) = (
        row
        for row in load(RESULTS / "amd-epyc-2-threads-2026-11-23.json")["rows"]
        if (row["op"], row["provider"]) == ("finetune_step", "qar")
    )
    assert f"**{1 / finetuning['ratio_to_base']:.1f} times as fast**" in first_table()
    standings = tables.standings(load(RESULTS / "amd-epyc-2-cores-2026-11-24.json"))
    bare = [standing for standing in standings if standing.op == "expert_mlp"]
    whole = [standing for standing in standings if standing.op != "expert_mlp"]
    counts = [sum(s.count(v) for s in group) for group in (bare, whole) for v in ("wins", "ties", "loses")]
    assert "experts win {}, tie {}, **lose {}**; MLPs, layers and models win {}, tie {}, lose {}".format(
        *counts
    ) in first_table().replace(" cells", "")
    medians = [median(s.over_base) for s in whole]
    worst = max(max(s.over_base) for s in whole)
    assert f"median {min(medians):.2f} to {max(medians):.2f} times" in first_table()
    assert f"{worst:.2f} at worst" in first_table()


def test_the_plays_difference_is_the_committed_one():
    paired = json.loads((ROOT / "docs/results/plays.json").read_text(encoding="utf-8"))["paired"]
    ours, control = paired["qar_vs_ft"]["nll"], paired["qar_vs_control"]["nll"]
    assert f"{-ours['diff']:.3f} nats a token better than plain fine-tuning" in first_table()
    assert control["ci95"][0] < 0 < control["ci95"][1], "the README says: no better than the control"
