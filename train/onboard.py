"""Give a newcomer an expert of their own, without changing anybody else's answers.

    python -m train.onboard --model runs/demo/cells/qar-seed0/trained \\
        --data data/my_show/diags_two_role_me_clustered --querier "New Friend" --out runs/demo/with_friend

About 20 dialogues of the newcomer with the same responder are enough to start with.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from train.batches import Windows
from train.cli import run
from train.data.encode import encode_all
from train.data.layout import Example
from train.data.mqdialog import load_mqdialog
from train.data.names import name_beside, plain_name
from train.dataset import with_context
from train.errors import UserError
from train.setup import make_trainer
from train.trained import TRAINED, Trained, check_replaceable, load_trained, save_with_adapter_of

EPOCHS, LEARNING_RATE = 4.0, 5e-3


def onboard(
    source: Path,
    data: Path,
    querier: str,
    out: Path,
    epochs: float = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    force: bool = False,
) -> Path:
    """Add ``querier`` to the trained model in ``source``, train that expert alone, write ``out``.

    If the model answers for several responders, the newcomer gets an expert for the one of ``data``. The
    contrastive loss is left out, because its clusters belong to the dialogues the model was trained on.

    Raises:
        UserError: if queriers in ``source`` have no experts of their own, its prompts are few-shot, it knows
            the newcomer already, or ``data`` is of another responder or has no training window of theirs; if
            there is a model in ``out`` already, unless ``force``.
    """
    if (out / TRAINED).is_file() and not force:
        raise UserError(f"{out}: is a trained model already; --force replaces it")
    check_replaceable(out)
    trained = load_trained(source, torch.float32)  # writes the others' experts back unrounded
    _check_source(trained, source)
    found = load_mqdialog(data)
    if querier not in found.queriers:
        querier = plain_name(querier)  # as names of transcripts are
    name = name_beside(trained.queriers, querier, found.responder)
    if name in trained.queriers:
        raise UserError(f"querier '{name}' is known to {source} already")
    if found.responder not in trained.responders:
        expected = " or ".join(trained.responders)
        raise UserError(f"{data}: the responder is {found.responder}, expected {expected}")
    examples = [example for example in found.train if example.querier == querier]
    if not examples:
        names = ", ".join(found.queriers)
        raise UserError(f"{data}: no training window of querier '{querier}'; it has {names}")
    examples = with_context(dataclasses.replace(found, train=examples, dev=[]), trained.config).train
    _add(trained, name, examples, epochs, learning_rate)
    save_with_adapter_of(source, trained, out)
    return out


def _check_source(trained: Trained, source: Path) -> None:
    """``UserError`` if no newcomer can be trained in this model."""
    if trained.model.qar.experts == "shared":
        settings = f"method={trained.config.method}, experts={trained.config.experts}"
        raise UserError(
            f"{source}: got {settings}, expected a model whose queriers have experts of their own"
        )
    if trained.config.context == "few_shot":
        raise UserError(
            f"{source}: got context=few_shot, whose prompts show dialogues of everybody; "
            "expected a model trained with a profile or none"
        )


def _add(trained: Trained, name: str, examples: list[Example], epochs: float, learning_rate: float) -> None:
    """Add the newcomer ``name``, whose expert starts as the mean of all, and train that expert alone."""
    trained.model.add_queriers(name, init="mean")
    trained.model.train_only(name)
    contrast, trained.model.contrast = trained.model.contrast, None
    _train(trained, examples, trained.model.queriers[name], epochs, learning_rate)
    trained.model.contrast = contrast
    trained.model.train_only(None)


def _train(
    trained: Trained, examples: list[Example], querier_id: int, epochs: float, learning_rate: float
) -> None:
    config = trained.config
    transformers.set_seed(config.seed)
    windows = encode_all(
        [dataclasses.replace(example, querier_id=querier_id) for example in examples],
        trained.tokenizer,
        **config.encoding,
    )
    if not windows:
        raise UserError(f"no training window fits into max_tokens={config.max_tokens}")
    with tempfile.TemporaryDirectory() as scratch:
        settings = config.replace(
            output_dir=scratch,
            epochs=epochs,
            expert_learning_rate=learning_rate,
            deepspeed=None,
            report_to="none",
            validation=0.0,
        )
        make_trainer(
            trained.model,
            trained.tokenizer,
            Windows(windows),
            settings,
            save_strategy="no",  # a few minutes' work, soon repeated
        ).train()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder that train.finetune wrote")
    parser.add_argument(
        "--data", type=Path, required=True, help="a prepared folder with the newcomer's dialogues"
    )
    parser.add_argument("--querier", required=True, help="the newcomer's name in that folder")
    parser.add_argument("--out", type=Path, required=True, help="where the extended model goes")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--force", action="store_true", help="replace a model that is there")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    written = onboard(
        arguments.model,
        arguments.data,
        arguments.querier,
        arguments.out,
        arguments.epochs,
        arguments.learning_rate,
        arguments.force,
    )
    sys.stdout.write(f"{written}\n")


if __name__ == "__main__":
    run(main)
