"""From cells to the results file: every method's scores, and what one gains over another, over all seeds."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from train.dataset import load_data
from train.experiment.cell import result_of
from train.experiment.plan import Experiment
from train.metrics import ROUGE_KEYS, Record, compare, summarise, swap_summary

AVERAGED = ("nll_sum", *ROUGE_KEYS)
PACKAGES = ("torch", "transformers", "peft", "rouge-score")


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
            f"{first}_vs_{second}": _difference(records[first], records[second])
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


def pool(runs: Sequence[Sequence[Record]]) -> list[Record]:
    """One record per window: its scores averaged over the runs of several seeds.

    The mean is taken first, so that resampling dialogues does not count a window once per seed.

    Raises:
        ValueError: where the runs do not hold the same windows in the same order.
    """
    ids = [[record["id"] for record in run] for run in runs]
    if any(other != ids[0] for other in ids):
        raise ValueError("the runs of several seeds do not hold the same windows")
    return [_mean(window) for window in zip(*runs, strict=True)]


def _mean(window: Sequence[Record]) -> Record:
    first = dict(window[0])
    for key in AVERAGED:
        values = [record[key] for record in window]
        first[key] = None if None in values else sum(values) / len(values)
    return first | {"empty": any(record["empty"] for record in window)}


def _scores(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pooled = summarise(pool([result["records"] for result in results]))
    per_seed = [_one_seed(result) for result in results]
    return {key: value for key, value in pooled.items() if key != "per_querier"} | {"per_seed": per_seed}


def _one_seed(result: dict[str, Any]) -> dict[str, Any]:
    scores = summarise(result["records"])
    return {"seed": result["seed"], "nll": scores["nll"], "rougeL": scores["rougeL"]}


def _difference(first: Sequence[Sequence[Record]], second: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Paired over windows, after both are averaged over their seeds."""
    return compare(pool(first), pool(second))


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
