"""From cells to the results file: every method's scores, and what one gains over another, over all seeds."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from train.dataset import load_data
from train.experiment.cell import result_of
from train.experiment.plan import Experiment
from train.files import read_text
from train.metrics import compare_seeds, pool, summarise_seeds, swap_summary

PACKAGES = ("torch", "transformers", "peft", "rouge-score", "sacrebleu")
PUBLISHED = Path(__file__).with_name("published.yaml")


def collect(experiment: Experiment) -> dict[str, Any]:
    """The results of all finished cells.

    Returns:
        ``conditions``; ``methods``: name -> scores over all seeds, with ``per_seed``; ``paired``: name ->
        differences with 95 % intervals over dialogues; ``swap``: name -> what asking as somebody else costs;
        ``missing``: cells without a result.
    """
    cells = [(cell, result_of(experiment, cell)) for cell in experiment.cells()]
    found: dict[str, list[dict[str, Any]]] = {}
    for cell, result in cells:
        if result is not None:
            found.setdefault(cell.method.name, []).append(result)
    records = {name: [result["records"] for result in results] for name, results in found.items()}
    return {
        "conditions": conditions(experiment),
        "methods": {name: _scores(results) for name, results in found.items()},
        "paired": {
            f"{first}_vs_{second}": compare_seeds(records[first], records[second])
            for first, second in experiment.pairs
            if first in records and second in records
        },
        "swap": {
            name: swap_summary(pool(records[name]), pool([result["swapped"] for result in results]))
            for name, results in found.items()
            if all(result["swapped"] for result in results)
        },
        "missing": [cell.name for cell, result in cells if result is None],
    }


def _scores(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pooled = summarise_seeds([result["records"] for result in results])
    seeds = [
        {"seed": result["seed"], **scores} for result, scores in zip(results, pooled["per_seed"], strict=True)
    ]
    return {key: value for key, value in pooled.items() if key != "per_querier"} | {"per_seed": seeds}


def published() -> dict[str, Any]:
    """The paper's own ROUGE-L, by language, responder and method, in points."""
    return yaml.safe_load(read_text(PUBLISHED))


def conditions(experiment: Experiment) -> dict[str, Any]:
    """What a reader needs to run it again."""
    cell = experiment.cells()[0]
    config = experiment.config(cell)
    data = load_data(config).data
    return {
        "responders": data.responder.split(", "),
        "queriers": len(data.queriers),
        "train_windows": len(data.train),
        "held_out_windows": len(data.dev),
        "generated": min(experiment.generated, len(data.dev)),
        "max_new_tokens": experiment.max_new_tokens,
        "seeds": list(experiment.seeds),
        "train": experiment.train,
        "methods": {method.name: method.changes for method in experiment.methods},
        "machine": {"cpu_threads": torch.get_num_threads(), "architecture": platform.machine()},
        "versions": {name: version(name) for name in PACKAGES},
    }
