"""One cell of an experiment: train a method under a seed, score it on the held-out windows."""

from __future__ import annotations

import hashlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from train.config import DTYPES
from train.errors import UserError
from train.experiment.plan import Cell, Experiment
from train.experiment.windows import base_of, cell_data, text_checksum
from train.files import read_json, write_atomic
from train.finetune import check_resumes, finetune
from train.heldout import held_out_windows, score
from train.trained import Trained, load_trained, untrained

RESULT = "result.json"


def result_of(experiment: Experiment, cell: Cell) -> dict[str, Any] | None:
    """The cell's result, if it was computed with the same settings, text and base model.

    Raises ``UserError`` if the file is damaged.
    """
    path = _folder(experiment, cell) / RESULT
    if not path.is_file():
        return None
    try:
        stored = read_json(path, ("key", "records", "swapped", "seconds"))
    except UserError as error:
        raise UserError(f"{error}; delete the file to compute the cell again") from error
    is_current = stored["key"] == _key(experiment, cell)
    return stored if is_current and _inputs(experiment, cell).items() <= stored.items() else None


def check_cell(experiment: Experiment, cell: Cell) -> None:
    """``UserError`` if the result is damaged, or :func:`run_cell` would refuse what an earlier run left."""
    config = experiment.config(cell)
    if result_of(experiment, cell) is None and cell.method.trained:
        base = partial(base_of, config.model, DTYPES[config.dtype])
        check_resumes(config, cell_data(experiment, cell), base)


def run_cell(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """Train (or resume, or reuse) and evaluate; the result is on disk when this returns.

    Returns:
        ``records`` of all held-out windows, ``swapped`` (the same windows asked under other queriers' ids;
        None without per-querier experts) and ``seconds``.

    Raises:
        UserError: what is wrong with the data, the model or the configuration.
    """
    start = time.perf_counter()
    trained = model_of(experiment, cell)
    held_out = held_out_windows(experiment.config(cell), cell_data(experiment, cell))
    records, swapped = score(trained, held_out, experiment.generated, experiment.max_new_tokens)
    result = {
        "key": _key(experiment, cell),
        **_inputs(experiment, cell),
        "method": cell.method.name,
        "seed": cell.seed,
        "records": records,
        "swapped": swapped,
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_atomic(_folder(experiment, cell) / RESULT, json.dumps(result, ensure_ascii=False))
    return result


def model_of(experiment: Experiment, cell: Cell) -> Trained:
    """The cell's model in fp32: trained (or resumed, or reused), or the base as it is."""
    config = experiment.config(cell)
    if cell.method.trained:
        return load_trained(finetune(config, resume=True), torch.float32)
    data = cell_data(experiment, cell)
    return untrained(config, data.responder, tuple(data.queriers))


def _folder(experiment: Experiment, cell: Cell) -> Path:
    return Path(experiment.config(cell).output_dir)


def _key(experiment: Experiment, cell: Cell) -> str:
    settings = {
        "config": experiment.config(cell).changed(),  # a setting added later voids no result
        "trained": cell.method.trained,
        "generated": experiment.generated,
        "max_new_tokens": experiment.max_new_tokens,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _inputs(experiment: Experiment, cell: Cell) -> dict[str, str]:
    """Checksums of the dialogues and the base model's weights."""
    return {"text": text_checksum(experiment, cell), "base": base_of(experiment.config(cell).model)}
