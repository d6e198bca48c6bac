"""The paper's training procedure (arXiv 2412.11736, section 3) written down as it reads, for comparison.

B sequences, S tokens, H hidden, R rank, P projection, C clusters, Q queriers, K memory slots. Both towers are
stacked on the batch axis (2B rows), logits cover the vocabulary at every position, experts and contrastive
loss loop over the batch, and the memory is copied before it is written. Its mathematics is that of
``tower="replace"`` with ``contrast="masked"``; tests hold both to equal losses.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qar_models.contrast import QuerierContrast
from qar_models.conversion import remove_qar
from qar_models.experts import Experts

IGNORE = -100


class Expert(nn.Module):
    """The experts of one layer: ``gate``/``up`` (Q, R, H), ``down`` (Q, H, R)."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(w.detach().clone()) for w in experts.bank)

    def forward(self, x: Tensor, querier_ids: list[int]) -> Tensor:
        """``x`` (B, S, H), sequence after sequence through its querier's expert."""
        rows = []
        for b, q in enumerate(querier_ids):
            hidden = F.silu(F.linear(x[b], self.gate[q])) * F.linear(x[b], self.up[q])
            rows.append(F.linear(hidden, self.down[q]))
        return torch.stack(rows)


class Straightforward(nn.Module):
    """A querier-aware model and its loss, from the same initial weights as ``model``.

    Args:
        model: a querier-aware ``ForCausalLM`` (LoRA or not) with ``tower="replace"`` and per-querier experts;
            it is copied, not changed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        self.weight = model.qar.contrastive_weight
        self.experts = nn.ModuleList(
            nn.Identity() if layer.experts is None else Expert(layer.experts) for layer in model.model.layers
        )
        self.norm_specific = model.model.norm_specific
        self.contrast = None if model.contrast is None else Contrast(model.contrast)
        self.base = remove_qar(model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        response_mask: Tensor,
        querier_ids: Tensor,
        cluster_ids: Tensor,
    ) -> Tensor:
        """The loss of a right-padded batch: ``(B, S)`` tensors, ``(B,)`` ids."""
        decoder, batch, queriers = self.base.model, len(input_ids), querier_ids.tolist()
        states = decoder.embed_tokens(input_ids).repeat(2, 1, 1)  # the general rows, then the specific rows
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        rotary = decoder.rotary_emb(states, position_ids=positions)
        mask = _causal_mask(attention_mask).repeat(2, 1, 1, 1)
        for layer, expert in zip(decoder.layers, self.experts, strict=True):
            attended, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(states), position_embeddings=rotary, attention_mask=mask
            )
            states = states + attended
            normed = layer.post_attention_layernorm(states)
            if isinstance(expert, Expert):
                parts = layer.mlp(normed[:batch]), expert(normed[batch:], queriers)
                states = states + torch.cat(parts)
            else:
                states = states + layer.mlp(normed)
        general, specific = states[:batch], states[batch:]
        logits = self.base.lm_head((decoder.norm(general) + self.norm_specific(specific)) / 2)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        if self.contrast is not None:
            clusters = cluster_ids.tolist()
            loss = loss + self.weight * self.contrast(specific, response_mask, queriers, clusters)
        return loss


def _causal_mask(attention_mask: Tensor) -> Tensor:
    """``(B, S)`` -> ``(B, 1, S, S)``, true where a token may look."""
    size = attention_mask.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    return causal & attention_mask.bool()[:, None, None, :]


class Contrast(nn.Module):
    """The querier-contrastive loss, from the same heads and memory as ``contrast``."""

    def __init__(self, contrast: QuerierContrast) -> None:
        super().__init__()
        self.norm = contrast.norm_role_proj
        self.weight, self.bias = contrast.head_weight, contrast.head_bias  # (2, C, P, H), (2, C, P)
        self.temperature = contrast.temperature
        self.memory = contrast.memory.clone()  # (2, C, Q, K, P)
        self.writes = contrast.writes.clone()  # (C, Q)

    def forward(
        self, states: Tensor, response_mask: Tensor, queriers: list[int], clusters: list[int]
    ) -> Tensor:
        """``states`` (B, S, H) of the specific tower -> the loss; then the memory takes the batch in."""
        normed = self.norm(states)
        losses, views = [], []
        for b, (q, c) in enumerate(zip(queriers, clusters, strict=True)):
            pooled = normed[b][response_mask[b].bool()].mean(0)
            pair = [F.linear(pooled, self.weight[v, c], self.bias[v, c]) for v in range(2)]
            views.append(torch.stack(pair))
            known = [other for other in range(self.writes.shape[1]) if self.writes[c, other] > 0]
            if q in known:
                losses += [self._loss(pair[v], 1 - v, c, q, known) for v in range(2)]
        self._remember(views, queriers, clusters)
        # before anybody is remembered the loss is zero, but Adam counts the step of every parameter
        return torch.stack(losses).mean().clamp(0, 10) if losses else 0 * torch.stack(views).sum()

    def _loss(self, view: Tensor, other_view: int, cluster: int, querier: int, known: list[int]) -> Tensor:
        """Cross-entropy over the prototypes of the queriers that have spoken in this cluster."""
        written = self.writes[cluster, known].clamp(max=self.memory.shape[3])
        sums = self.memory[other_view, cluster].sum(1)  # of zeros where nothing was written
        prototypes = sums[known] / written.unsqueeze(1)
        cosine = F.cosine_similarity(view, prototypes, dim=-1)
        return F.cross_entropy(cosine / self.temperature, torch.tensor(known.index(querier)))

    def _remember(self, views: list[Tensor], queriers: list[int], clusters: list[int]) -> None:
        self.memory = self.memory.clone()
        for view, q, c in zip(views, queriers, clusters, strict=True):
            self.memory[:, c, q, self.writes[c, q] % self.memory.shape[3]] = view.detach()
            self.writes[c, q] += 1
