"""Layer, decoding, training and generation steps are right, and a model that is not is refused."""

import pytest
import torch

from benchmarks import generation, layers, models
from benchmarks.schema import load
from benchmarks.session import Session
from benchmarks.shapes import Cell
from qar_kernels.testing import WrongResult

CELL = Cell(16, 2, 4, 8, 576, 1536, "float32", S=8, L=1)


def one_of_each(op):
    suite = generation if op == "generate" else layers
    return next(job for job in suite.jobs("cpu", quick=True) if job.op == op and job.cell.Q > 1)


@pytest.mark.parametrize("op", ["decode", "train_step", "generate"])
def test_every_provider_is_timed(op, tmp_path):
    out = tmp_path / "result.json"
    Session("cpu", out, minutes=1).run([one_of_each(op)])
    result = load(out)
    providers = generation.PROVIDERS if op == "generate" else layers.PROVIDERS
    assert "refused" not in result
    assert {row["provider"] for row in result["rows"]} == set(providers)


@pytest.fixture(scope="module")
def chosen():
    return models.subject("ours", models.plain_model("SmolLM2-135M", CELL, "cpu"), CELL)


def test_a_wrong_model_is_refused(chosen):
    right = {"input_ids": models.prompts(2, 8, "cpu"), "querier_ids": models.who_asks(CELL, 2, "cpu")}
    chosen.check(True, **right)
    with torch.no_grad():
        chosen.model.model.layers[0].experts.up[right["querier_ids"][1]] *= 1.01
    with pytest.raises(WrongResult, match="logits: relative error"):
        chosen.check(False, **right)


def test_tokens_must_be_the_best_ones(chosen):
    batch = {"input_ids": models.prompts(2, 8, "cpu"), "querier_ids": models.who_asks(CELL, 2, "cpu")}
    tokens = generation.generate(chosen.eager, 2)(batch)
    generation._check_greedy(chosen, batch, tokens)
    with pytest.raises(WrongResult, match="below the best"):
        generation._check_greedy(chosen, batch, tokens + 1)
