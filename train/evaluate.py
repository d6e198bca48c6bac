"""Score a trained model on held-out dialogues, alone or against another model.

python -m train.evaluate --model runs/alice/qar/trained [--against runs/alice/ft/trained] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.box import SIMPLE
from rich.table import Column, Table
from rich.text import Text

from train.cli import positive_int, run, wide_console
from train.config import DTYPES, TrainConfig
from train.data.layout import Example, MQDialog
from train.data.names import name_beside, split_pair
from train.dataset import load_data
from train.errors import UserError
from train.files import check_file, write_atomic
from train.heldout import BATCH_SIZE, held_out_windows, score
from train.metrics import Record, compare, summarise, swap_summary, wording
from train.metrics.wording import COMPARED, LABELS, SUMMARY, narrow_headings
from train.run_file import RUN, check_finished, training_checksum
from train.trained import Trained, load_trained, read_about

GENERATED, MAX_NEW_TOKENS = 128, 48
NO_RUN = Path(".cache/no_run")


def evaluate(
    folder: Path,
    data: Path | None = None,
    generated: int = GENERATED,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The scores of a trained model on the held-out windows of ``data``, by default of its training data.

    Args:
        folder: what :func:`train.trained.save_trained` wrote.
        generated: how many windows are answered; NLL is computed on all of them.
        batch_size: windows per batch, for NLL and generation alike.
        dtype: of all weights, a key of :data:`train.config.DTYPES`.

    Returns:
        ``scores`` (:func:`train.metrics.summarise`), ``swap`` (:func:`train.metrics.swap_summary`; None
        without per-querier experts), ``left_out`` (number of windows whose reply does not fit), ``records``.

    Raises:
        UserError: if the model, the data or the profiles are damaged; if the data have a querier or a
            responder whom the model does not know; if the training data have changed since training.
    """
    trained = load_trained(folder, DTYPES[dtype])
    # the states of frozen layers are cached beside the run, as training did, and never beside a lone model
    beside = folder.parent if (folder.parent / RUN).is_file() else NO_RUN
    config = trained.config.replace(data=str(data or trained.config.data), output_dir=str(beside))
    if data is None:
        own = load_data(config).data
        _check_trained_on(trained, config, own)
    else:
        own = load_data(config.replace(validation=0.0)).data
    held_out = held_out_windows(config, _as_known(trained, own), batch_size)
    records, swapped = score(trained, held_out, generated, max_new_tokens)
    return {
        "model": str(folder),
        "base": config.model,
        "data": config.data,
        "dtype": dtype,
        "max_new_tokens": max_new_tokens,
        "left_out": held_out.left_out,
        "scores": summarise(records),
        "swap": swap_summary(records, swapped) if swapped else None,
        "records": records,
    }


def _check_trained_on(trained: Trained, config: TrainConfig, data: MQDialog) -> None:
    """Refuse data that were built anew: they may hold out what the model was trained on.

    They are checked against the run, if the model still lies in one, and against the checksum in the
    model's folder.
    """
    try:
        check_finished(config, data)
        if trained.training_checksum != training_checksum(data):
            raise UserError("its training windows differ")
    except UserError as error:
        raise UserError(
            f"{config.data}: not what the model was trained on ({error}); "
            f"--data {config.data} scores it anyway"
        ) from error


def _as_known(trained: Trained, data: MQDialog) -> MQDialog:
    """``data`` with the ids that its queriers have in the model."""
    strangers = sorted({example.responder for example in data.dev} - set(trained.responders))
    if strangers:
        expected = " or ".join(trained.responders)
        raise UserError(f"data: {strangers[0]} is the responder, expected {expected}")

    def known(example: Example) -> Example:
        asker, _ = split_pair(example.querier)  # the same person may ask several responders
        name = name_beside(trained.queriers, asker, example.responder)
        return dataclasses.replace(example, querier=name, querier_id=trained.querier_id(name))

    return dataclasses.replace(data, dev=[known(example) for example in data.dev])


def difference(ours: Sequence[Record], theirs: Sequence[Record]) -> dict[str, Any]:
    """:func:`train.metrics.compare`, with a ``UserError`` if the two were scored on different windows."""
    try:
        return compare(ours, theirs)
    except ValueError as error:
        raise UserError(f"the two models cannot be compared: {error}") from error


def score_table(result: dict[str, Any]) -> Table:
    """A row for all windows, one for the mean over queriers, and one for each querier."""
    scores = result["scores"]
    names = Column("asked by", overflow="fold", min_width=16)
    headings = ("windows", *narrow_headings(SUMMARY))
    numbers = [Column(heading, justify="right") for heading in headings]
    table = Table(names, *numbers, title=Text(result["model"]), box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_row("everybody", str(scores["examples"]), *_cells(scores))
    table.add_row("mean over queriers", "", *_cells(scores["macro"]), end_section=True)
    for name, own in sorted(scores["per_querier"].items(), key=lambda item: -item[1]["examples"]):
        table.add_row(Text(name), str(own["examples"]), *_cells(own))
    return table


def _cells(scores: dict[str, Any]) -> list[str]:
    return [wording.score(key, scores[key]) for key in SUMMARY]


def difference_table(differences: dict[str, Any], ours: str, theirs: str) -> Table:
    """Paired differences of two models on the same windows."""
    table = Table("", "difference", "95 % interval", "p", title=Text(f"{ours} - {theirs}"), box=SIMPLE)
    for key, found in differences.items():
        if key in SUMMARY:
            difference = wording.score(key, found["diff"], signed=True)
            p = "" if found["p"] is None else f"{found['p']:.4f}"
            table.add_row(LABELS[key], difference, wording.interval(key, found["ci95"], signed=True), p)
    return table


def _notes(result: dict[str, Any]) -> list[str]:
    scores, swap = result["scores"], result["swap"]
    notes = [
        f"perplexity {wording.score('perplexity', scores['perplexity'])}; "
        f"{scores['generated']} replies generated, {scores['empty']} empty, {scores['failed']} failed; "
        f"{result['left_out']} windows left out, as their reply does not fit"
    ]
    if swap:
        for key in COMPARED:
            change = wording.difference(key, swap[f"{key}_diff"], swap[f"{key}_ci95"])
            notes.append(f"asked under another querier's id, {LABELS[key]}: {change}")
    return notes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder written by train.finetune")
    parser.add_argument("--against", type=Path, help="a second model, for paired differences")
    parser.add_argument("--data", type=Path, help="dialogues to score (default: those held out in training)")
    parser.add_argument("--generated", type=positive_int, default=GENERATED, help="replies to generate")
    parser.add_argument("--max-new-tokens", type=positive_int, default=MAX_NEW_TOKENS)
    parser.add_argument("--batch-size", type=positive_int, default=BATCH_SIZE, help="windows per batch")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file for the scores and all records")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.disable_progress_bar()
    console, results = wide_console(), []
    folders = [folder for folder in (arguments.model, arguments.against) if folder]
    for folder in folders:
        read_about(folder)  # a missing second model shows before the first one is scored
    if arguments.out:
        check_file(arguments.out)
    settings = (
        arguments.data,
        arguments.generated,
        arguments.max_new_tokens,
        arguments.batch_size,
        arguments.dtype,
    )
    for folder in folders:
        results.append(evaluate(folder, *settings))
        console.print(score_table(results[-1]), *_notes(results[-1]), sep="\n")
    report: dict[str, Any] = {"models": results}
    if arguments.out:  # before the comparison, which may fail
        write_atomic(arguments.out, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    if arguments.against:
        report["differences"] = difference(results[0]["records"], results[1]["records"])
        console.print(difference_table(report["differences"], *(found["model"] for found in results)))
    if arguments.out:
        write_atomic(arguments.out, json.dumps(report, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
