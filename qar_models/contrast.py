"""The querier-contrastive loss (arXiv 2412.11736, section 3.3): answers to similar queries should
differ by who asks.

B sequences, S tokens, H hidden, P projection, C clusters, Q queriers, K memory slots; 2 views.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import logging

from qar_kernels.distributed import num_ranks
from qar_kernels.host import is_readable
from qar_models.config import QARConfig
from qar_models.distributed import gather_batch, mean_over_ranks

logger = logging.get_logger(__name__)

MAX_LOSS = 10.0
LARGE_MEMORY = 2**31  # bytes


class QuerierContrast(nn.Module):
    """Two linear views per cluster, and a memory of the last K projections of every querier.

    The mean of a querier's remembered projections is its prototype. Sums are kept beside the ring
    buffer, so that a step costs the same for every K and touches only the batch's own queriers.
    """

    def __init__(self, qar: QARConfig, hidden_size: int, norm: nn.Module) -> None:
        super().__init__()
        clusters, queriers, width = qar.num_clusters, qar.num_queriers, qar.projection_dim
        self.num_queriers, self.temperature = queriers, qar.temperature
        self.norm_role_proj = norm
        if qar.contrastive_memory_bytes > LARGE_MEMORY:
            logger.warning_once(
                f"The contrastive memory takes {qar.contrastive_memory_bytes / 2**30:.1f} GiB: {queriers} "
                f"queriers, {clusters} clusters, projection_dim {width}, memory_size {qar.memory_size}; a "
                "smaller memory_size reduces it in proportion"
            )
        like = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        self.head_weight = nn.Parameter(torch.empty(2, clusters, width, hidden_size, **like))
        self.head_bias = nn.Parameter(torch.empty(2, clusters, width, **like))
        device, slots = norm.weight.device, qar.memory_size
        memory = torch.zeros(2, clusters, queriers, slots, width, device=device, dtype=torch.float32)
        self.register_buffer("memory", memory)
        # fp64 keeps the running sum equal to a fresh one to fp32 rounding after millions of steps
        totals = torch.zeros(2, clusters, queriers, width, device=device, dtype=torch.float64)
        self.register_buffer("totals", totals)
        self.register_buffer("writes", torch.zeros(clusters, queriers, device=device, dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the memory between devices, but never casts it: ``model.bfloat16()`` must not round it.

        Its bits travel as integers, which ``nn.Module.to`` does not cast.
        """
        exact = {id(self.memory): torch.int32, id(self.totals): torch.int64}

        def apply(tensor: Tensor) -> Tensor:
            bits = exact.get(id(tensor))
            return fn(tensor) if bits is None else fn(tensor.view(bits)).view(tensor.dtype)

        return super()._apply(apply, recurse)

    def reset_parameters(self, std: float) -> None:
        """Heads N(0, std), empty memory."""
        init.normal_(self.head_weight, mean=0.0, std=std)
        for tensor in (self.head_bias, self.memory, self.totals, self.writes):
            init.zeros_(tensor)

    def forward(
        self,
        querier_states: Tensor,
        response_mask: Tensor | None,
        querier_ids: Tensor | None,
        cluster_ids: Tensor | None,
        cu_seq_lens: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; its mean over the ranks is in [0, 10].

        In training mode the memory then takes in the batch of all ranks.

        Args:
            querier_states: ``(B, S, H)``, last layer's states of the specific tower, before the final norm.
            response_mask: ``(B, S)``, 1 on the responder's tokens.
            querier_ids: ``(B,)``; sequences of unknown queriers (-1) are left out.
            cluster_ids: ``(B,)``, the query cluster of each sequence.
            cu_seq_lens: ``(N + 1,)`` bounds of N sequences packed into one row of S tokens; the ids are then
                ``(N,)``, the other inputs ``(1, S, ...)``.

        Raises:
            ValueError, TypeError: naming the argument, what came and what was expected.
        """
        self._check(querier_states, response_mask, querier_ids, cluster_ids, cu_seq_lens)
        device = querier_states.device
        querier_ids, cluster_ids = (ids.to(device, torch.int64) for ids in (querier_ids, cluster_ids))
        mask = response_mask.to(querier_states).unsqueeze(-1)
        weighted = self.norm_role_proj(querier_states) * mask
        summed, count = (_sum_sequences(values, cu_seq_lens) for values in (weighted, mask))
        pooled = (summed / count.clamp(min=1)).to(weighted.dtype)
        views = self._project(pooled, cluster_ids)
        # cosines are divided by the temperature: bf16 would leave the logits two digits
        views = views.to(torch.promote_types(views.dtype, torch.float32))
        usable = (querier_ids >= 0) & (count.squeeze(1) > 0)
        loss = self._loss(views, querier_ids, cluster_ids, usable)
        if self.training:
            self._remember(views.detach().float(), querier_ids, cluster_ids, usable)
        return loss

    def _project(self, pooled: Tensor, cluster_ids: Tensor) -> Tensor:
        """``(B, H)`` -> both views ``(2, B, P)`` through each sequence's own cluster's heads."""
        every = torch.einsum("bh,vcph->vbcp", pooled, self.head_weight) + self.head_bias.unsqueeze(1)
        return every[:, torch.arange(pooled.shape[0], device=pooled.device), cluster_ids]

    def _prototypes(self) -> tuple[Tensor, Tensor]:
        """Prototypes of every querier in every cluster, and who takes part.

        Returns:
            ``(2, C, Q, P)``, up to a positive factor (only their cosine counts), and ``(C, Q)`` bool.
        """
        return self.totals, self.writes > 0

    def _loss(self, views: Tensor, querier_ids: Tensor, cluster_ids: Tensor, usable: Tensor) -> Tensor:
        prototypes, competing = self._prototypes()
        cosines = _cosines(views, prototypes.flip(0).to(views.dtype), cluster_ids)
        known = competing[cluster_ids]
        logits = (cosines / self.temperature).masked_fill(~known, float("-inf"))
        target = querier_ids.clamp(min=0)
        usable = usable & known.gather(1, target.unsqueeze(1)).squeeze(1)
        # a sequence that cannot be scored gets finite logits, so that its (unused) loss has no NaN gradient
        logits = torch.where(usable.view(1, -1, 1), logits, 0.0)
        losses = F.cross_entropy(logits.flatten(0, 1), target.repeat(2), reduction="none").view(2, -1)
        return self._mean((losses * usable).sum(), 2 * usable.sum())

    def _mean(self, total: Tensor, count: Tensor) -> Tensor:
        """This rank's part of the mean over the sequences of all ranks, clipped to [0, 10].

        The mean of the parts over the ranks, which data parallelism takes, is what one rank would compute
        for the whole batch.
        """
        if not self.training:
            return (total / count.clamp(min=1)).clamp(0.0, MAX_LOSS)
        of_all, counted = mean_over_ranks(torch.stack((total, count.to(total))))
        counted = counted.clamp(min=1 / num_ranks())
        return torch.where(of_all > MAX_LOSS * counted, MAX_LOSS, total / counted)

    @torch.no_grad()
    def _remember(self, views: Tensor, querier_ids: Tensor, cluster_ids: Tensor, usable: Tensor) -> None:
        """Write every usable sequence of all ranks into its querier's ring buffer; the oldest give way."""
        views, querier_ids, cluster_ids, usable = gather_batch(views, querier_ids, cluster_ids, usable)
        # a running sum would keep a NaN forever, although the ring overwrites it
        usable = usable & views.isfinite().all(-1).all(0)
        clusters, queriers, slots = self.memory.shape[1:4]
        pair = torch.where(usable, cluster_ids * queriers + querier_ids, clusters * queriers)
        count = torch.zeros(clusters * queriers + 1, dtype=torch.int64, device=pair.device)
        count.index_add_(0, pair, torch.ones_like(pair))
        order = (pair.unsqueeze(0) == pair.unsqueeze(1)).tril(-1).sum(1)
        # of more than K new entries of one querier only the last K stay, so no slot is written twice
        usable = usable & (order >= count[pair] - slots)
        owner = pair.clamp(max=clusters * queriers - 1)
        row = owner * slots + (self.writes.view(-1)[owner] + order) % slots
        memory = self.memory.view(2, -1, self.memory.shape[-1])
        old = memory[:, row]
        new = torch.where(usable.view(1, -1, 1), views, old)
        self.totals.view(2, clusters * queriers, -1).index_add_(1, owner, new.double() - old.double())
        # sequences that are not written repeat the first one that is: fixed shapes, no read-back
        source = torch.where(usable, torch.arange(len(usable), device=row.device), usable.int().argmax())
        memory.index_copy_(1, row[source], new[:, source])
        self.writes.view(-1).add_(count[:-1])

    def _check(
        self,
        states: Tensor,
        response_mask: Tensor | None,
        querier_ids: Tensor | None,
        cluster_ids: Tensor | None,
        cu_seq_lens: Tensor | None,
    ) -> None:
        sequences = len(states) if cu_seq_lens is None else len(cu_seq_lens) - 1
        expected = {
            "response_mask": (response_mask, tuple(states.shape[:2])),
            "querier_ids": (querier_ids, (sequences,)),
            "cluster_ids": (cluster_ids, (sequences,)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is None:
                raise ValueError(f"{name}: missing, but the contrastive loss needs it, of shape {shape}")
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: got a {type(tensor).__name__}, expected a tensor of shape {shape}")
            if tuple(tensor.shape) != shape:
                hint = ""
                if name == "response_mask" and tensor.dim() == 2 and tensor.shape[1] < shape[1]:
                    hint = "; PEFT's virtual tokens (prompt tuning) need zeros in front"
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}{hint}")
            if name != "response_mask" and (tensor.is_floating_point() or tensor.dtype == torch.bool):
                raise TypeError(f"{name}: got dtype {tensor.dtype}, expected integers")
        self._check_values(response_mask, querier_ids, cluster_ids)

    def _check_values(self, response_mask: Tensor, querier_ids: Tensor, cluster_ids: Tensor) -> None:
        """Values are read where that costs no device sync; elsewhere the device asserts them."""
        if not is_readable(response_mask):
            torch._assert_async(response_mask.any(), "response_mask: no responder token in the batch")
        elif not response_mask.any():
            raise ValueError("response_mask: got no responder token in the whole batch, expected some")
        _check_range("cluster_ids", cluster_ids, 0, len(self.writes) - 1)
        _check_range("querier_ids", querier_ids, -1, self.num_queriers - 1)


def _cosines(views: Tensor, prototypes: Tensor, cluster_ids: Tensor) -> Tensor:
    """Views ``(2, B, P)`` against prototypes ``(2, C, Q, P)`` of each sequence's own cluster: ``(2, B, Q)``.

    Against all clusters in one product: copying its cluster's prototypes for each sequence costs far more.
    """
    directions = F.normalize(views, dim=-1), F.normalize(prototypes, dim=-1)
    # autocast's bf16 would leave the logits two digits; the meta device has no autocast, and raises
    with nullcontext() if views.is_meta else torch.autocast(views.device.type, enabled=False):
        every = torch.einsum("vbp,vcqp->vbcq", *directions)
    return every[:, torch.arange(views.shape[1], device=views.device), cluster_ids]


def _sum_sequences(values: Tensor, cu_seq_lens: Tensor | None) -> Tensor:
    """Over each sequence's tokens: ``(B, S, H)`` -> ``(B, H)``, or packed ``(1, S, H)`` -> ``(N, H)``.

    In fp32 or better: bf16 counts no further than 256, and segment_reduce adds up in the dtype it is given.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    if cu_seq_lens is None:
        return values.sum(1, dtype=dtype)
    # unless unsafe, segment_reduce checks the bounds on the host, which waits for the device
    return torch.segment_reduce(values[0].to(dtype), "sum", offsets=cu_seq_lens.long(), unsafe=True)


def _check_range(name: str, ids: Tensor, lowest: int, highest: int) -> None:
    if not is_readable(ids):
        allowed = (ids >= lowest) & (ids <= highest)
        torch._assert_async(allowed.all(), f"{name}: expected ids from {lowest} to {highest}")
    elif int(ids.min()) < lowest or int(ids.max()) > highest:
        raise ValueError(f"{name}: got {ids.tolist()}, expected ids from {lowest} to {highest}")
