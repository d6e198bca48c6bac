"""Runs an experiment: the cells that have no result yet, then table, figure and a JSON file of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from train.cli import wide_console
from train.experiment.cell import check_cell, result_of, run_cell
from train.experiment.figure import figure
from train.experiment.plan import Experiment
from train.experiment.results import collect, published
from train.experiment.table import markdown, published_table
from train.files import check_place, read_text, write_atomic

console = Console()


def run_experiment(experiment: Experiment, folder: Path, name: str) -> dict[str, Any]:
    """Run the cells that have no result yet; ``name``.json, .md and .svg are rewritten after each.

    Returns what :func:`train.experiment.results.collect` gives.
    """
    for place in (folder, Path(experiment.output_dir)):
        check_place(place / name)
    experiment.prepare()
    cells = experiment.cells()
    for cell in cells:  # before any result or the table is overwritten
        check_cell(experiment, cell)
    for index, cell in enumerate(cells):
        console.rule(Text(f"{cell.name} ({index + 1} of {len(cells)})", "bold"), align="left")
        if result_of(experiment, cell) is None:
            run_cell(experiment, cell)
            _write_results(experiment, folder, name)
    results = _write_results(experiment, folder, name)
    wide_console().print(Markdown(read_text(folder / f"{name}.md")))
    return results


def _write_results(experiment: Experiment, folder: Path, name: str) -> dict[str, Any]:
    results = collect(experiment)
    # the paper's scores are shown with the plays, for orientation, not with a user's own dialogues
    paper = published() if experiment.responders and experiment.transcript is None else {}
    methods = {
        method: {key: value for key, value in scores.items() if key != "per_querier"}  # in every record
        for method, scores in results["methods"].items()
    }
    kept = json.dumps(results | {"methods": methods}, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / f"{name}.json", kept + "\n")
    text = markdown(results) + (f"\n{published_table(paper)}\n" if paper else "")
    write_atomic(folder / f"{name}.md", text)
    write_atomic(folder / f"{name}.svg", figure(results, paper))
    return results
