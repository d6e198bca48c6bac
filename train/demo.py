"""The whole pipeline, once: prepare data, fine-tune, evaluate, generate, report.

    python -m train.demo --config train/configs/demo.yaml --planted train/configs/planted.yaml

Two small experiments (:mod:`train.experiment`): a responder of the plays, and habits planted in made-up
dialogues. Every method keeps its result, so a second run resumes where the first one stopped.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from train.cli import run
from train.config import TrainConfig, load_config
from train.data.layout import MQDialog
from train.data.planted import HABITS, NUM_DEV_QUESTIONS, habit_of
from train.data.prepare import PrepareConfig, prepare
from train.experiment.cell import check_cell, result_of, run_cell
from train.experiment.plan import Experiment, Method
from train.experiment.windows import cell_data
from train.files import load_json
from train.finetune import LOG
from train.heldout import SAMPLE_SEED, HeldOut, querier_similarity
from train.metrics import Record, compare, summarise, swap_summary, wording
from train.metrics.wording import LABELS, SUMMARY, narrow_headings
from train.report import write_report
from train.samples import samples
from train.trained import Trained

GENERATED, MAX_NEW_TOKENS = 32, 32
SAMPLES, PLANTED_SAMPLES = 4, 1
PROMPTED = (Method("zero_shot", trained=False, changes={}),)
TRAINED = tuple(Method(name, trained=True, changes={"method": name}) for name in ("ft", "qar"))
console = Console()

Results: TypeAlias = dict[str, dict[str, Any]]
"""What :func:`train.experiment.cell.run_cell` gave, by method."""


def demo(config: TrainConfig, planted: TrainConfig, responder: str) -> Path:
    """Run both experiments; returns the report's page, which lies in the ``output_dir`` of ``config``."""
    console.rule("[bold]prepare data", align="left")
    config = config.replace(data=str(prepare(PrepareConfig("plays", responder))))
    planted = planted.replace(data=str(prepare(PrepareConfig("planted"))))
    play = _experiment(config, PROMPTED + TRAINED, GENERATED)
    habits = _experiment(planted, TRAINED, len(HABITS) * NUM_DEV_QUESTIONS)
    data = cell_data(play, play.cells()[0])
    _show(data)
    for experiment in (play, habits):
        for cell in experiment.cells():
            check_cell(experiment, cell)
    results = _results(play, "", SAMPLES)
    planted_results = _results(habits, "planted habits, ", PLANTED_SAMPLES)
    report = _report(config, data, results, planted_results)
    shown = planted_results["qar"]["samples"] + results["qar"]["samples"]
    page = _write(report, play, results["qar"]["similarity"], shown)
    _summarise(report, page)
    return page


def _experiment(config: TrainConfig, methods: tuple[Method, ...], generated: int) -> Experiment:
    """``methods`` with the settings of ``config``, under its one seed."""
    shared = {key: value for key, value in config.to_dict().items() if key not in ("output_dir", "seed")}
    return Experiment(
        config.output_dir,
        shared,
        methods,
        seeds=(config.seed,),
        generated=generated,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _results(experiment: Experiment, title: str, count: int) -> Results:
    """Each method's result, computed if there is none yet; QAR's has ``count`` samples."""
    results = {}
    for cell in experiment.cells():
        name = cell.method.name
        console.rule(f"[bold]{title}{name}", align="left")
        extra = partial(_samples_and_similarity, experiment.generated, count) if name == "qar" else None
        results[name] = result_of(experiment, cell) or run_cell(experiment, cell, extra)
    return results


def _samples_and_similarity(
    generated: int, count: int, trained: Trained, data: MQDialog, held_out: HeldOut
) -> dict[str, Any]:
    answered = held_out.sample(generated, SAMPLE_SEED)
    indices = answered[:: max(1, len(answered) // count)][:count]
    matrix = querier_similarity(trained.model, held_out)
    return {
        "samples": samples(trained, data, held_out, indices, MAX_NEW_TOKENS),
        "similarity": {"names": list(trained.queriers), "matrix": matrix},
    }


def _report(config: TrainConfig, data: MQDialog, results: Results, planted: Results) -> dict[str, Any]:
    records = {method: result["records"] for method, result in results.items()}
    swapped = results["qar"]["swapped"]  # None where only one person asks
    return {
        "dataset": {
            "show": "plays",
            "responder": data.responder,
            "queriers": len(data.queriers),
            "train_windows": len(data.train),
            "dev_windows": len(data.dev),
            "generated": GENERATED,
            "reply_tokens": sum(record["tokens"] for record in records["qar"]),
        },
        "model": config.to_dict(),
        "methods": {method: summarise(found) for method, found in records.items()},
        "paired": {
            "qar_vs_ft": compare(records["qar"], records["ft"]),
            "ft_vs_zero_shot": compare(records["ft"], records["zero_shot"]),
        },
        "querier_swap": swap_summary(records["qar"], swapped) if swapped else None,
        "planted": _recovered_habits(planted),
        "seconds": {
            **{method: result["seconds"] for method, result in results.items()},
            **{f"planted_{method}": result["seconds"] for method, result in planted.items()},
        },
    }


def _recovered_habits(results: Results) -> dict[str, Any]:
    """How often a held-out reply shows the asker's habit; the prompt does not say who asks."""
    hits = {
        method: [(record["querier"], _shows_habit(record)) for record in result["records"]]
        for method, result in results.items()
    }
    return {
        **{f"{method}_accuracy": _mean([hit for _, hit in found]) for method, found in hits.items()},
        "chance": 1 / len(HABITS),
        "examples": len(hits["qar"]),
        "per_querier": {
            habit.querier: {
                method: _mean([hit for querier, hit in found if querier == habit.querier])
                for method, found in hits.items()
            }
            for habit in HABITS
        },
    }


def _shows_habit(record: Record) -> bool:
    shown = habit_of(record["reply"])
    return shown is not None and HABITS[shown].querier == record["querier"]


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def _write(
    report: dict[str, Any], play: Experiment, similarity: dict[str, Any], shown: list[dict[str, Any]]
) -> Path:
    logs = {
        cell.method.name: load_json(Path(play.config(cell).output_dir) / LOG)
        for cell in play.cells()
        if cell.method.trained
    }
    curves = {method: [row for row in log if "loss" in row] for method, log in logs.items()}
    return write_report(report, Path(play.output_dir), curves, similarity, shown)


def _show(data: MQDialog) -> None:
    console.print(
        f"{data.responder}: {len(data.queriers)} queriers, {len(data.train)} training windows, "
        f"{len(data.dev)} held out"
    )


def _summarise(report: dict[str, Any], page: Path) -> None:
    table = Table("method", *narrow_headings(SUMMARY), box=SIMPLE, padding=0)
    for method, scores in report["methods"].items():
        nll, *others = (wording.score(key, scores[key]) for key in SUMMARY)
        table.add_row(method, f"{nll} {wording.interval('nll', scores['ci95']['nll'])}", *others)
    console.print(table)
    paired, swap, habits = report["paired"]["qar_vs_ft"]["nll"], report["querier_swap"], report["planted"]
    gain = wording.difference("nll", paired["diff"], paired["ci95"])
    console.print(f"QAR - FT, {LABELS['nll']}: {gain}")
    if swap:
        cost = wording.difference("nll", swap["nll_diff"], swap["nll_ci95"])
        console.print(f"QAR asked under another querier's id, {LABELS['nll']}: {cost}")
    console.print(
        f"planted habits: QAR {habits['qar_accuracy']:.0%}, FT {habits['ft_accuracy']:.0%}, "
        f"chance {habits['chance']:.0%}"
    )
    total = sum(report["seconds"].values())
    console.print(f"{page} ({total:.0f} s)")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("train/configs/demo.yaml"))
    parser.add_argument("--planted", type=Path, default=Path("train/configs/planted.yaml"))
    parser.add_argument("--responder", default="Falstaff", help="who answers, in all plays")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace keys of --config")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.disable_progress_bar()  # of loading weights; training and scoring have their own
    config = load_config(arguments.config, arguments.overrides)
    demo(config, load_config(arguments.planted), arguments.responder)


if __name__ == "__main__":
    run(main)
