"""Packed rows: windows laid end to end in one row, so that nothing is computed for padding.

N windows, T tokens in all, D head width. ``cu_seq_lens_q`` (N + 1,) are the windows' bounds, under the
name by which transformers' flash attention reads them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qar_kernels.host import is_readable

PACKED_ATTENTION = "packed_sdpa"


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within every window, one call per window; the same as "sdpa" if rows are not packed.

    With "sdpa", packed rows have a block-diagonal mask (T, T) and cost as much as one window of T tokens.

    Args:
        query: ``(rows, heads, T, D)``; all rows hold the same windows (one row per tower).
        key, value: ``(rows, key heads, T, D)``.
        cu_seq_lens_q: ``(rows * N + 1,)``, bounds of the windows of all rows laid end to end.
        sliding_window: positions that a token attends to, itself included; default: all up to itself.

    Returns:
        ``(rows, T, heads, D)``, and None for the attention weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    windows = (len(cu_seq_lens_q) - 1) // query.shape[0]
    lengths = cu_seq_lens_q[: windows + 1].diff().tolist()
    # split, not slices: its backward pass joins the windows' gradients once, instead of adding up N of size T
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    gqa = query.shape[1] != key.shape[1]
    attended = [
        F.scaled_dot_product_attention(
            *part, **_causal(part[0], sliding_window), scale=scaling, dropout_p=dropout, enable_gqa=gqa
        ).transpose(1, 2)
        for part in parts
    ]
    return torch.cat(attended, dim=1), None


def _causal(query: Tensor, sliding_window: int | None) -> dict[str, Any]:
    """Arguments that make attention causal, and no wider than the layer's sliding window."""
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return {"is_causal": True}
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return {"attn_mask": ones.tril().triu(1 - sliding_window)}


AttentionInterface.register(PACKED_ATTENTION, packed_sdpa)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def check_packed(
    cu_seq_lens: Tensor,
    batch_size: int,
    seq_len: int,
    attention_mask: Tensor | None,
    cache: Any,
    use_cache: bool | None,
) -> None:
    """Raise ``ValueError`` or ``TypeError`` for what packed rows do not support, naming the argument.

    The values of ``cu_seq_lens`` (N + 1,) are read where that costs no device sync.
    """
    if not isinstance(cu_seq_lens, Tensor):
        raise TypeError(f"cu_seq_lens_q: got a {type(cu_seq_lens).__name__}, expected a tensor (N + 1,)")
    if attention_mask is not None or cache is not None or use_cache:
        raise ValueError(
            "attention_mask, past_key_values, use_cache: got a value, expected none of them with packed rows "
            "(cu_seq_lens_q)"
        )
    if batch_size != 1 or cu_seq_lens.dim() != 1:
        raise ValueError(
            f"cu_seq_lens_q: got {tuple(cu_seq_lens.shape)} bounds for {batch_size} rows, expected (N + 1,) "
            "bounds of windows in one row"
        )
    if not is_readable(cu_seq_lens):
        return
    bounds = cu_seq_lens.tolist()
    if bounds[0] != 0 or bounds[-1] != seq_len or bounds != sorted(set(bounds)):
        raise ValueError(f"cu_seq_lens_q: got {bounds}, expected ascending bounds from 0 to {seq_len}")


def check_positions(position_ids: Tensor, cu_seq_lens: Tensor) -> None:
    """Raise ``ValueError`` where positions ``(1, T)`` run on from one window into the next.

    transformers builds masks from positions, so such windows would see each other. Values are read where
    that costs no device sync.
    """
    if not is_readable(position_ids):
        return
    starts = cu_seq_lens[1:-1].long().to(position_ids.device)
    running = starts[(position_ids[0, starts] - position_ids[0, starts - 1]) == 1].tolist()
    if running:
        raise ValueError(
            f"position_ids: got positions that run on into the windows at {running}, expected each window "
            "of cu_seq_lens_q to start anew"
        )


def restarting_positions(cu_seq_lens: Tensor, num_tokens: int) -> Tensor:
    """``(1, T)`` positions that count from 0 in every window."""
    bounds, tokens = cu_seq_lens.long(), torch.arange(num_tokens, device=cu_seq_lens.device)
    window = torch.searchsorted(bounds[1:], tokens, right=True)
    return (tokens - bounds[window]).unsqueeze(0)


def repeat_windows(cu_seq_lens: Tensor, num_tokens: int) -> Tensor:
    """Bounds of the windows of both towers laid end to end: ``(N + 1,)`` -> ``(2N + 1,)``."""
    return torch.cat((cu_seq_lens, cu_seq_lens[1:] + num_tokens))


def general_windows(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`repeat_windows` for the bounds among a layer's keyword arguments."""
    bounds = kwargs.get("cu_seq_lens_q")
    return kwargs if bounds is None else kwargs | named_bounds(bounds[: len(bounds) // 2 + 1])


def named_bounds(cu_seq_lens: Tensor) -> dict[str, Tensor]:
    """The bounds as attention functions expect them: queries and keys are the same windows."""
    return {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}


def ids_of_windows(ids: Tensor | None, cu_seq_lens: Tensor | None) -> Tensor | None:
    """One id per window, ``(N,)``, also from ids per token ``(1, T)``: each window's first counts."""
    if ids is None or cu_seq_lens is None or ids.dim() == 1:
        return ids
    return ids[0, cu_seq_lens[:-1].long()]
