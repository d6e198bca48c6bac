"""Decoder layer, prefill, decoding and training step, with the ids' sorting and everything a user pays for.

B sequences, S tokens each, Q queriers present, E experts owned. ``T`` of a cell counts the tokens that go
through the timed call: B * S, and B where one token of each sequence is decoded behind a cache of S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.models import embedded, model_shape, plain_model, prompts, subject, trained, who_asks
from benchmarks.runner import Step
from benchmarks.session import Job, Refuse, attempt
from benchmarks.shapes import Cell
from qar_models.modeling import CACHE

PROVIDERS = ("base", "ours", "ours_replace", "loop")
Batch = dict[str, Tensor]
MakeStep = Callable[[PreTrainedModel, Batch, Cell], Callable[[], object]]


def prefill(model: PreTrainedModel, batch: Batch, cell: Cell) -> Callable[[], object]:
    """Prompts into a new cache, logits of the last token."""

    @torch.no_grad()
    def call() -> Tensor:
        return model(**batch, use_cache=True, logits_to_keep=1).logits

    return call


def decode(model: PreTrainedModel, batch: Batch, cell: Cell) -> Callable[[], object]:
    """One more token for each sequence, behind a cache of S tokens that is cut back afterwards."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, **{CACHE: cache}, use_cache=True)
    following = batch | {"input_ids": batch["input_ids"][:, -1:]}

    @torch.no_grad()
    def call() -> Tensor:
        logits = model(**following, **{CACHE: cache}, use_cache=True).logits
        cache.crop(-1)
        return logits

    return call


def decoder_layer(model: PreTrainedModel, batch: Batch, cell: Cell) -> Callable[[], object]:
    """One layer and the final norm, forward."""
    hidden_states, others = embedded(model, batch)

    @torch.no_grad()
    def call() -> Tensor:
        return model.model(inputs_embeds=hidden_states, use_cache=False, **others).last_hidden_state

    return call


def decoder_layer_backward(model: PreTrainedModel, batch: Batch, cell: Cell) -> Callable[[], object]:
    """The same with gradients of the states and, where there are any, of the experts."""
    hidden_states, others = embedded(model, batch)
    wanted = [hidden_states.requires_grad_(), *trained(model)]
    d_y = torch.randn_like(hidden_states)

    def call() -> object:
        y = model.model(inputs_embeds=hidden_states, use_cache=False, **others).last_hidden_state
        return torch.autograd.grad(y, wanted, d_y)

    return call


def train_step(model: PreTrainedModel, batch: Batch, cell: Cell) -> Callable[[], object]:
    """Loss, gradients and AdamW of the experts, the base frozen; ``base`` backpropagates to its embeddings.

    The learning rate is zero: every step costs the same and sees the same weights.
    """
    hidden_states, others = embedded(model, batch)
    hidden_states.requires_grad_()
    experts = trained(model)
    optimizer = torch.optim.AdamW(experts, lr=0.0, weight_decay=0.0) if experts else None
    labels = batch["input_ids"]

    def call() -> Tensor:
        loss = model(inputs_embeds=hidden_states, labels=labels, use_cache=False, **others).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        hidden_states.grad = None
        return loss

    return call


def _build(
    make: MakeStep, cell: Cell, batch_size: int, device: str, training: bool, refuse: Refuse
) -> dict[str, Step]:
    plain = plain_model(model_shape(device)[0], cell, device)
    steps: dict[str, Step] = {}
    for provider in PROVIDERS:
        build = partial(_step, provider, make, plain, cell, batch_size, device, training)
        steps |= attempt(provider, refuse, build)
    return steps


def _step(
    provider: str,
    make: MakeStep,
    plain: PreTrainedModel,
    cell: Cell,
    batch_size: int,
    device: str,
    training: bool,
) -> Step:
    chosen = subject(provider, plain, cell)
    batch = {"input_ids": prompts(batch_size, cell.S, device)}
    if provider != "base":
        batch["querier_ids"] = who_asks(cell, batch_size, device)
    chosen.check(training, **batch)
    call = make(chosen.model, batch, cell)
    if make is decode:
        tokens = batch["input_ids"]
        chosen.check_next(call(), **batch | {"input_ids": torch.cat([tokens, tokens[:, -1:]], 1)})
    return Step(call)


def model_job(
    rank: int, op: str, make: MakeStep, shape: tuple[int, int, int, int, int], device: str, training: bool
) -> Job:
    """``shape``: sequences B, context S, layers L, queriers present Q, experts owned E."""
    batch_size, context, layers, present, owned = shape
    hidden, inter = model_shape(device)[1]
    expert_rank, dtype = (64, "bfloat16") if device == "cuda" else (16, "float32")
    tokens = batch_size if op == "decode" else batch_size * context
    cell = Cell(tokens, present, owned, expert_rank, hidden, inter, dtype, S=context, L=layers)
    return Job(rank, op, training, cell, partial(_build, make, cell, batch_size, device, training), 0.5)


def jobs(device: str, quick: bool) -> Iterator[Job]:
    """The suite of a device."""
    # Decoding behind a short cache: the check runs all of it in float64.
    cached, context, layers, owned = (128, 512, 2, 256) if device == "cuda" else (32, 32, 2, 64)
    if quick:
        cached, context, layers, owned = 8, 8, 1, 4
    sizes = (1, 8, 64, 256) if device == "cuda" else (1, 8, 32)
    for batch_size in sizes[:2] if quick else sizes:
        for present in sorted({1, min(batch_size, owned)}):
            yield model_job(15, "decode", decode, (batch_size, cached, layers, present, owned), device, False)
    for batch_size in (2,) if quick else (8,):
        for present in (1, batch_size):
            shape = (batch_size, context, layers, present, owned)
            one_layer = (batch_size, context, 1, present, owned)
            yield model_job(16, "prefill", prefill, shape, device, False)
            yield model_job(16, "decoder_layer", decoder_layer, one_layer, device, False)
            yield model_job(16, "decoder_layer", decoder_layer_backward, one_layer, device, True)
            yield model_job(16, "train_step", train_step, shape, device, True)
