"""From cells to the results file: every method's scores and the paired differences, over all seeds."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml

from train.experiment.cell import result_of
from train.experiment.plan import Cell, Experiment
from train.experiment.windows import cell_data
from train.files import read_text
from train.metrics import compare_seeds, pool, summarise_seeds, swap_summary, with_all_scores

PACKAGES = ("torch", "transformers", "peft", "rouge-score", "sacrebleu")
PUBLISHED = Path(__file__).with_name("published.yaml")

Runs: TypeAlias = list[tuple[Cell, dict[str, Any]]]
"""A method's finished cells, each with its result."""


def collect(experiment: Experiment) -> dict[str, Any]:
    """The results of all finished cells; replies get the scores of metrics added since they were written.

    Returns:
        ``conditions``; ``methods``: name -> scores over all seeds, with ``per_seed``; ``paired``: name ->
        differences with 95 % intervals over dialogues; ``swap``: name -> what another id changes;
        ``missing``: cells without a result. Numbers that are not finite are None.
    """
    found: dict[str, Runs] = {}
    missing = []
    for cell in experiment.cells():
        result = result_of(experiment, cell)
        if result is None:
            missing.append(cell.name)
        else:
            scored = {key: with_all_scores(result[key]) for key in ("records", "swapped") if result[key]}
            found.setdefault(cell.method.name, []).append((cell, result | scored))
    paired = {
        f"{first}_vs_{second}": _difference(found.get(first, []), found.get(second, []))
        for first, second in experiment.pairs
    }
    results = {
        "conditions": conditions(experiment),
        "methods": {name: _scores(runs) for name, runs in found.items()},
        "paired": {name: difference for name, difference in paired.items() if difference},
        "swap": {
            name: swap_summary(pool(_column(runs, "records")), pool(_column(runs, "swapped")))
            for name, runs in found.items()
            if all(_column(runs, "swapped"))
        },
        "missing": missing,
    }
    return finite(results)


def finite(value: Any) -> Any:
    """``value`` with None for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _column(runs: Runs, key: str) -> list[Any]:
    return [result[key] for _, result in runs]


def _difference(first: Runs, second: Runs) -> dict[str, Any] | None:
    """Over the splits that both have run on; None if there are none."""
    shared = {cell.split for cell, _ in first} & {cell.split for cell, _ in second}
    ours, theirs = ([run for run in runs if run[0].split in shared] for runs in (first, second))
    return compare_seeds(_column(ours, "records"), _column(theirs, "records")) if shared else None


def _scores(runs: Runs) -> dict[str, Any]:
    pooled = summarise_seeds(_column(runs, "records"))
    each = [
        {"seed": cell.seed, "split": cell.split, "seconds": result["seconds"], **scores}
        for (cell, result), scores in zip(runs, pooled["per_seed"], strict=True)
    ]
    return pooled | {"per_seed": each}


def published() -> dict[str, Any]:
    """The paper's own ROUGE-L, by language, responder and method, in points."""
    return yaml.safe_load(read_text(PUBLISHED))


def conditions(experiment: Experiment) -> dict[str, Any]:
    """What a reader needs to reproduce the results."""
    any_cell = {cell.split: cell for cell in experiment.cells()}
    splits = [cell_data(experiment, any_cell[split]) for split in experiment.splits]
    data, held_out = splits[0], {example.id for split in splits for example in split.dev}
    return {
        "responders": data.responder.split(", "),
        "queriers": len(data.queriers),
        "train_windows": [len(split.train) for split in splits],
        "held_out_windows": len(held_out),
        "generated": [min(experiment.generated, len(split.dev)) for split in splits],
        "max_new_tokens": experiment.max_new_tokens,
        "seeds": list(experiment.seeds),
        "splits": list(experiment.splits),
        "train": experiment.train,
        "methods": {method.name: method.changes for method in experiment.methods},
        "machine": {"cpu_threads": torch.get_num_threads(), "architecture": platform.machine()},
        "versions": {name: version(name) for name in PACKAGES},
    }
