"""The whole pipeline, once: prepare data, fine-tune, evaluate, generate, report.

    python -m train.demo --config train/configs/demo.yaml --planted train/configs/planted.yaml

Two small experiments (:mod:`train.experiment`): a responder of the plays, and habits planted in made-up
dialogues. Every method keeps its result, so a second run resumes where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.text import Text

from train.cli import run
from train.config import TrainConfig, load_config
from train.data.layout import MQDialog
from train.data.planted import HABITS, NUM_DEV_QUESTIONS, habit_of
from train.data.prepare import PrepareConfig, prepare
from train.experiment.cell import check_cell, model_of, result_of
from train.experiment.plan import Experiment, Method
from train.experiment.run import run_experiment
from train.experiment.windows import cell_data
from train.files import load_json, write_atomic
from train.finetune import LOG
from train.heldout import SAMPLE_SEED, HeldOut, held_out_windows, querier_similarity
from train.metrics import Record
from train.report import render, write_html
from train.trained import Trained

GENERATED, MAX_NEW_TOKENS = 32, 32
SAMPLES, PLANTED_SAMPLES = 4, 1
ASKED_BY = 4
"""Queriers of each sample: who really asked, and the most frequent others."""
PROMPTED = (Method("zero_shot", trained=False, changes={}),)
TRAINED = tuple(Method(name, trained=True, changes={"method": name}) for name in ("ft", "qar"))
REPORT = "report"
"""The name of an experiment's results; the page lies beside those of the play."""
console = Console()


def demo(config: TrainConfig, planted: TrainConfig, responder: str) -> Path:
    """Run both experiments; returns the report's page, which lies in the ``output_dir`` of ``config``."""
    console.rule("[bold]prepare data", align="left")
    config = config.replace(data=str(prepare(PrepareConfig("plays", responder))))
    planted = planted.replace(data=str(prepare(PrepareConfig("planted"))))
    play = _experiment(config, PROMPTED + TRAINED, GENERATED)
    habits = _experiment(planted, TRAINED, len(HABITS) * NUM_DEV_QUESTIONS)
    data = cell_data(play, play.cells()[0])
    console.print(
        f"{data.responder}: {len(data.queriers)} queriers, {len(data.train)} training windows, "
        f"{len(data.dev)} held out"
    )
    for cell in habits.cells():  # before the minutes that the play takes
        check_cell(habits, cell)
    folder = Path(play.output_dir)
    results = run_experiment(play, folder, REPORT)
    console.rule("[bold]planted habits", align="left")
    planted_results = run_experiment(habits, Path(habits.output_dir), REPORT)
    found = _recovered_habits(habits)
    write_atomic(folder / "habits.json", json.dumps(found, indent=1) + "\n")
    seconds = _seconds(results) | {f"planted_{name}": s for name, s in _seconds(planted_results).items()}
    planted_shown, _ = _shown_of_qar(habits, PLANTED_SAMPLES)
    shown, similarity = _shown_of_qar(play, SAMPLES)
    page = write_html(render(results, found, seconds, _logs(play), similarity, planted_shown + shown), folder)
    console.print(
        f"planted habits: QAR {found['qar_accuracy']:.0%}, FT {found['ft_accuracy']:.0%}, "
        f"chance {found['chance']:.0%}"
    )
    console.print(Text(f"{page} ({sum(seconds.values()):.0f} s)"))
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
        pairs=tuple((method.name, before.name) for before, method in pairwise(methods)),
    )


def _seconds(results: dict[str, Any]) -> dict[str, float]:
    return {name: scores["per_seed"][0]["seconds"] for name, scores in results["methods"].items()}


def _recovered_habits(habits: Experiment) -> dict[str, Any]:
    """How often a held-out reply shows the asker's habit; the prompt does not say who asks."""
    hits = {
        cell.method.name: [
            (record["querier"], _shows_habit(record)) for record in result_of(habits, cell)["records"]
        ]
        for cell in habits.cells()
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


def _shown_of_qar(experiment: Experiment, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """``count`` samples of QAR's answers, and how alike its experts are."""
    (cell,) = (cell for cell in experiment.cells() if cell.method.name == "qar")
    trained, data = model_of(experiment, cell), cell_data(experiment, cell)
    held_out = held_out_windows(experiment.config(cell), data)
    answered = held_out.sample(experiment.generated, SAMPLE_SEED)
    indices = answered[:: max(1, len(answered) // count)][:count]
    matrix = querier_similarity(trained.model, held_out)
    shown = samples(trained, data, held_out, indices, MAX_NEW_TOKENS)
    return shown, {"names": list(trained.queriers), "matrix": matrix}


def samples(
    trained: Trained, data: MQDialog, held_out: HeldOut, indices: Sequence[int], max_new_tokens: int
) -> list[dict[str, Any]]:
    """The queries of the windows at ``indices``, each answered to several queriers, all in mixed batches.

    Returns what :func:`train.report.render` shows of each.
    """
    frequent = [name for name, _ in Counter(e.querier for e in data.train).most_common(ASKED_BY)]
    examples = [held_out.examples[index] for index in indices]
    askers = [_askers(example.querier, frequent) for example in examples]
    flat = [(index, name) for index, names in zip(indices, askers, strict=True) for name in names]
    ids = [trained.queriers.index(name) for _, name in flat]
    replies = iter(held_out.generate(trained.model, [index for index, _ in flat], ids, max_new_tokens))
    return [
        {
            "history": [{"from": turn.speaker, "value": turn.text} for turn in example.turns[:-2]],
            "query": example.query,
            "reference": example.reply,
            "asked_by": example.querier,
            "answers": {name: next(replies) for name in names},
        }
        for example, names in zip(examples, askers, strict=True)
    ]


def _askers(true: str, frequent: Sequence[str]) -> list[str]:
    return [true, *(name for name in frequent if name != true)][:ASKED_BY]


def _logs(experiment: Experiment) -> dict[str, list[dict[str, Any]]]:
    """Method -> what its training logged at each step."""
    logs = {
        cell.method.name: load_json(Path(experiment.config(cell).output_dir) / LOG)
        for cell in experiment.cells()
        if cell.method.trained
    }
    return {method: [row for row in log if "loss" in row] for method, log in logs.items()}


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
