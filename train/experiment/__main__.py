"""Compare methods under one budget.

    python -m train.experiment --config train/configs/experiments/plays.yaml [key=value ...]

Every cell (method, seed and split) keeps its result, so a second run resumes where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import transformers
from rich.console import Console
from rich.markdown import Markdown

from train.cli import run
from train.experiment.cell import check_cell, result_of, run_cell
from train.experiment.figure import figure
from train.experiment.load import load_experiment
from train.experiment.plan import Experiment
from train.experiment.results import collect, published
from train.experiment.table import markdown, published_table
from train.files import write_atomic

console = Console()
WIDEST = 120  # columns for the table, even if the output is not a terminal


def run_experiment(experiment: Experiment, folder: Path, name: str) -> None:
    """Run the cells that have no result yet; table and figure are rewritten after each."""
    experiment.prepare()
    cells = experiment.cells()
    for cell in cells:  # before any result or the table is overwritten
        check_cell(experiment, cell)
    for index, cell in enumerate(cells):
        console.rule(f"[bold]{cell.name} ({index + 1} of {len(cells)})", align="left")
        if result_of(experiment, cell) is None:
            run_cell(experiment, cell)
            write_results(experiment, folder, name)
    text = write_results(experiment, folder, name)
    Console(width=max(console.width, WIDEST)).print(Markdown(text))


def write_results(experiment: Experiment, folder: Path, name: str) -> str:
    """``name``.json, .md and .svg in ``folder``; returns the Markdown."""
    results = collect(experiment)
    # the paper's scores are shown with the plays, for orientation, not with a user's own dialogues
    paper = published() if experiment.transcript is None else {}
    text = markdown(results) + (f"\n{published_table(paper)}\n" if paper else "")
    write_atomic(folder / f"{name}.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_atomic(folder / f"{name}.md", text)
    write_atomic(folder / f"{name}.svg", figure(results, paper))
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file of train/configs/experiments")
    parser.add_argument("--results", type=Path, help="folder of the table (default: the output_dir)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace keys of the file")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.logging.disable_progress_bar()
    experiment = load_experiment(arguments.config, arguments.overrides)
    run_experiment(experiment, arguments.results or Path(experiment.output_dir), arguments.config.stem)


if __name__ == "__main__":
    run(main)
