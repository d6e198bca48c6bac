"""Many people asking at once: one mixed batch against one querier after the other.

B prompts of S tokens, each of another querier (Q = B). ``first_token``: until the last of them has its
first token, T = B * S tokens read. ``generate``: N more tokens each, greedily, T = B * N tokens written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.models import Subject, model_shape, plain_model, prompts, subject, who_asks
from benchmarks.runner import Step
from benchmarks.session import Job, Refuse, attempt
from benchmarks.shapes import Cell
from qar_kernels.testing import WrongResult

PROVIDERS = ("base", "ours", "ours_replace", "one_by_one")
Ask = Callable[[dict[str, Tensor]], Tensor]


def first_token(model: PreTrainedModel) -> Ask:
    """Prompts ``(B, S)`` to the first tokens ``(B, 1)``."""

    @torch.no_grad()
    def ask(batch: dict[str, Tensor]) -> Tensor:
        return model(**batch, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    return ask


def generate(model: PreTrainedModel, new_tokens: int) -> Ask:
    """Prompts ``(B, S)`` to ``(B, N)`` new tokens by transformers' ``generate``."""

    def ask(batch: dict[str, Tensor]) -> Tensor:
        mask = torch.ones_like(batch["input_ids"])
        written = model.generate(**batch, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        return written[:, batch["input_ids"].shape[1] :]

    return ask


def _one_by_one(ask: Ask, batch: dict[str, Tensor]) -> Tensor:
    """The same model, a batch of one for every querier."""
    rows = range(len(batch["input_ids"]))
    return torch.cat([ask({name: value[i : i + 1] for name, value in batch.items()}) for i in rows])


def _check_greedy(chosen: Subject, batch: dict[str, Tensor], tokens: Tensor) -> None:
    """Every token is the float64 model's best one, or as good up to twice eager PyTorch's error."""
    length = batch["input_ids"].shape[1]
    whole = batch | {"input_ids": torch.cat([batch["input_ids"], tokens], 1)}
    with torch.no_grad():
        truth, eager = (m(**whole).logits[:, length - 1 : -1] for m in (chosen.truth, chosen.eager))
    missed = (truth.amax(-1) - truth.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)).max().item()
    allowed = 4 * (eager.double() - truth).abs().max().item()
    if missed > allowed:
        raise WrongResult(f"tokens: a logit is {missed:.1e} below the best, expected at most {allowed:.1e}")


def _build(op: str, new_tokens: int, cell: Cell, device: str, refuse: Refuse) -> dict[str, Step]:
    plain = plain_model(model_shape(device)[0], cell, device)
    steps: dict[str, Step] = {}
    for provider in PROVIDERS:
        steps |= attempt(provider, refuse, partial(_step, provider, op, new_tokens, plain, cell, device))
    return steps


def _step(provider: str, op: str, new_tokens: int, plain: PreTrainedModel, cell: Cell, device: str) -> Step:
    chosen = subject("ours" if provider == "one_by_one" else provider, plain, cell)
    batch = {"input_ids": prompts(cell.Q, cell.S, device)}
    if provider != "base":
        batch["querier_ids"] = who_asks(cell, cell.Q, device)
    ask = first_token(chosen.model) if op == "first_token" else generate(chosen.model, new_tokens)
    call = partial(_one_by_one, ask, batch) if provider == "one_by_one" else partial(ask, batch)
    _check_greedy(chosen, batch, call())
    return Step(call)


def jobs(device: str, quick: bool) -> Iterator[Job]:
    """The suite of a device."""
    layers, context, new_tokens, owned = (2, 256, 32, 256) if device == "cuda" else (2, 16, 8, 64)
    sizes = (8, 64) if device == "cuda" else (4, 8)
    if quick:
        layers, context, new_tokens, owned, sizes = 1, 8, 4, 4, (2,)
    hidden, inter = model_shape(device)[1]
    expert_rank, dtype = (64, "bfloat16") if device == "cuda" else (16, "float32")
    for batch_size in sizes:
        for op, tokens in (("first_token", context), ("generate", new_tokens)):
            cell = Cell(
                batch_size * tokens, batch_size, owned, expert_rank, hidden, inter, dtype, S=context, L=layers
            )
            yield Job(18, op, False, cell, partial(_build, op, new_tokens, cell, device), 0.5)
