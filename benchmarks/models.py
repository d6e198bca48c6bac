"""Random models of known shapes, plain and querier-aware, and the check of what they compute.

Weights are random: time does not depend on their values. B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.shapes import MODELS, Cell
from qar_kernels.testing import check_close, relative_errors
from qar_models import QARConfig, apply_qar

VOCAB = 4096  # smaller than the real ones: the head is the same in every provider
_HEADS = {"Llama-3-8B": (32, 8), "SmolLM2-135M": (9, 3)}
_STD = 0.2  # logits that differ clearly


@dataclass(frozen=True)
class Subject:
    """A provider's model and the model that says what is right.

    Attributes:
        model: what is timed.
        truth: the same weights in float64 through the reference backend.
        eager: the same weights through the reference backend in the model's own dtype.
    """

    model: PreTrainedModel
    truth: PreTrainedModel
    eager: PreTrainedModel

    def check(self, training: bool, **batch: Tensor) -> None:
        """Raise unless logits and, in training, gradients are as near to float64 as eager PyTorch's.

        Raises:
            WrongResult: naming what is further away than twice eager's error.
        """
        truth, eager, got = (_results(m, training, batch) for m in (self.truth, self.eager, self.model))
        for name, expected in truth.items():
            check_close(name, got[name], expected, relative_errors(eager[name], expected))

    def check_next(self, logits: Tensor, **batch: Tensor) -> None:
        """Raise unless ``logits`` (B, 1, V) are those of the last token of ``batch``, as in :meth:`check`."""
        with torch.no_grad():
            truth, eager = (m(**batch, logits_to_keep=1).logits for m in (self.truth, self.eager))
        check_close("logits", logits, truth, relative_errors(eager, truth))


def _results(model: PreTrainedModel, training: bool, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden_states, others = embedded(model, batch)
    hidden_states.requires_grad_(training)
    with torch.set_grad_enabled(training):
        logits = model(inputs_embeds=hidden_states, use_cache=False, **others).logits
    if not training:
        return {"logits": logits}
    leaves = [hidden_states, *trained(model)]
    d_states, *d_experts = torch.autograd.grad(logits.square().mean(), leaves)
    found = {"logits": logits.detach(), "d_hidden_states": d_states}
    if d_experts:
        found["d_experts"] = torch.cat([d.flatten() for d in d_experts])
    return found


def embedded(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The embeddings ``(B, S, H)`` of ``input_ids``, and the rest of the batch."""
    others = {name: value for name, value in batch.items() if name != "input_ids"}
    return model.get_input_embeddings()(batch["input_ids"]).detach(), others


def trained(model: PreTrainedModel) -> list[Tensor]:
    """The parameters that training changes: the experts."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain_model(name: str, cell: Cell, device: str) -> PreTrainedModel:
    """A frozen random Llama of ``cell.L`` layers."""
    heads, kv_heads = _HEADS[name]
    config = LlamaConfig(
        hidden_size=cell.H,
        intermediate_size=cell.I,
        num_hidden_layers=cell.L,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=_STD / (cell.H / 64) ** 0.5,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, cell.dtype)).eval().requires_grad_(False)


def aware_model(plain: PreTrainedModel, cell: Cell, tower: str, backend: str) -> PreTrainedModel:
    """``plain`` with ``cell.E`` random experts; the same ones for the same tower."""
    qar = QARConfig(cell.E, expert_rank=cell.R, tower=tower, backend=backend)
    model = apply_qar(copy.deepcopy(plain), qar)
    draw = torch.Generator(device=model.device).manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=draw)
            parameter.requires_grad_()
    return model.eval()


def subject(provider: str, plain: PreTrainedModel, cell: Cell) -> Subject:
    """``base``, ``ours`` (residual tower), ``ours_replace`` or ``loop`` (the reference backend)."""
    if provider == "base":
        return Subject(plain, copy.deepcopy(plain).double(), plain)
    tower = "replace" if provider == "ours_replace" else "residual"
    eager = aware_model(plain, cell, tower, "reference")
    model = eager if provider == "loop" else aware_model(plain, cell, tower, "auto")
    return Subject(model, copy.deepcopy(eager).double(), eager)


def model_shape(device: str) -> tuple[str, tuple[int, int]]:
    """The model whose layers are measured on a device, and its hidden and intermediate sizes."""
    name = "Llama-3-8B" if device == "cuda" else "SmolLM2-135M"
    return name, MODELS[name]


def who_asks(cell: Cell, batch: int, device: str) -> Tensor:
    """``(B,)`` querier ids: Q of the E owned, neighbouring sequences sharing one where B > Q."""
    draw = torch.Generator().manual_seed(2)
    present = torch.randperm(cell.E, generator=draw)[: cell.Q]
    return present.repeat_interleave(batch // cell.Q).to(device)


def prompts(batch: int, length: int, device: str) -> Tensor:
    """``(B, S)`` random tokens."""
    draw = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCAB, (batch, length), generator=draw).to(device)
