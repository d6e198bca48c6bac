"""Host side of the kernels: allocate, choose the grid, launch. No value is read back from the device.

T rows, S rows that have experts (the same in the fused tower), H hidden, I intermediate, R rank,
E experts. Towers: ``"fused"`` base plus experts on the same rows, ``"dual"`` on separate rows,
``"expert"`` experts alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qar_kernels.tile_plan import TilePlan
from qar_kernels.triton import split_k
from qar_kernels.triton.configs import Gemm, LaunchConfig
from qar_kernels.triton.kernels_d_hidden import d_hidden_kernel
from qar_kernels.triton.kernels_d_x import d_x_kernel
from qar_kernels.triton.kernels_down import down_kernel
from qar_kernels.triton.kernels_gate_up import gate_up_kernel
from qar_kernels.triton.kernels_weight_grad import expert_weight_grad_kernel
from qar_kernels.triton.lora import LoraOperands
from qar_kernels.triton.runner import cdiv, run_kernel
from qar_kernels.weights import SwiGLUWeights

# In the interpreter a program is a Python loop: two are enough to see tiles change hands.
_INTERPRETER_PROGRAMS = 2
# Tiles of segments are small and mostly wait for memory: several run on a multiprocessor at once, and the
# hardware schedules more as they end. Not one program per tile: the host only knows a bound on tiles, and a
# program without one costs its start all the same.
_SEGMENT_PROGRAMS = 32
_RECORDED_PROGRAMS = 132  # of an H100 or H200, where launches are recorded instead of run
# Where ranks leave less room: above the first an adapter's one step takes up to 64 KB beside the pipeline
# (262,208 bytes with four stages of the large gate/up), above the second an expert's share of d_x takes
# registers (4 to 6 spills in the dual tower with four stages and Triton 3.9).
_LOW_RANK, _HIGH_RANK = 16, 64

# Whether the kernels were decorated under TRITON_INTERPRET=1.
INTERPRETED = not isinstance(gate_up_kernel, triton.JITFunction)


class Hidden(NamedTuple):
    """Per-row intermediate results: gate and up (pre-activations or their gradients) and hidden units."""

    a: Tensor
    u: Tensor
    h: Tensor
    dropped_h: Tensor | None = None  # h after the down adapter's dropout; without it h itself


@dataclass(frozen=True)
class Call:
    """What all launches of one operation share.

    Attributes:
        tower: "fused", "dual" or "expert".
        base: base weights; unused in the expert tower (the experts' stand in, so that pointers exist).
        experts: expert weights.
        perm: ``(S,)`` rows sorted by expert.
        plan: tiles over the sorted rows.
        scale: expert_scale.
        config: block sizes.
        lora: adapters of the base, of rank 0 where there is none.
    """

    tower: str
    base: SwiGLUWeights
    experts: SwiGLUWeights
    perm: Tensor
    plan: TilePlan
    scale: float
    config: LaunchConfig
    lora: LoraOperands

    @property
    def rank(self) -> int:
        """R."""
        return self.experts.gate.shape[1]

    @property
    def intermediate(self) -> int:
        """I; 16 where there is no base."""
        return 16 if self.tower == "expert" else self.base.gate.shape[0]

    def only_experts(self) -> Call:
        """The same call without its base tiles."""
        lora = LoraOperands.none(self.experts.gate)
        return Call("expert", self.experts, self.experts, self.perm, self.plan, self.scale, self.config, lora)


def gate_up(call: Call, x: Tensor, x_expert: Tensor, save: bool) -> tuple[Hidden, Hidden]:
    """Pre-activations (empty unless ``save``) and hidden units of the base and of the experts."""
    gemm, tma = call.config.gate_up, _use_tma(call, x, *call.base)
    rows, lora = 0 if call.tower == "expert" else x.shape[0], call.lora
    gate_rank, up_rank = lora.gate_b.shape[1], lora.up_b.shape[1]
    base = _new_hidden(x, rows, call.intermediate, save, lora.drops)
    expert = _new_hidden(x_expert, x_expert.shape[0], call.rank, save)
    tiles = _segment_tiles(call) + _base_tiles(call, rows, call.intermediate, gemm)
    run_kernel(
        gate_up_kernel, _grid(call.tower, x, tiles, gemm),
        _operand(x, tma, call.config.block_rows, gemm.block_k),
        _operand(call.base.gate, tma, gemm.block_n, gemm.block_k),
        _operand(call.base.up, tma, gemm.block_n, gemm.block_k),
        base.h, base.a, base.u,
        x_expert, call.experts.gate, call.experts.up, expert.h, expert.a, expert.u,
        call.perm, call.plan.inverse_perm, *_expert_tiles(call.plan),
        lora.gate_low, lora.gate_b, lora.up_low, lora.up_b, base.dropped_h, lora.mask, call.scale, x.shape[0],
        **_shape(call, x), **_blocks(call, gemm, max(gate_rank, up_rank) > _LOW_RANK),
        TOWER=call.tower, SAVE=save, TMA=tma, GATE_RANK=gate_rank, UP_RANK=up_rank, DROPOUT=lora.drops,
    )  # fmt: skip
    return base, expert


def down(
    call: Call, h: Tensor, expert_h: Tensor, like: Tensor, base_y: Tensor | None, low: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs of the base rows and of the expert rows (in the fused tower all is in the first).

    ``low`` (T, r): product of the base's down adapter with its input, in the order of ``h``.
    """
    gemm, tma = call.config.down, _use_tma(call, h, call.base.down)
    rows, hidden, lora_rank = h.shape[0], like.shape[1], call.lora.down_b.shape[1]
    y = like.new_empty(rows, hidden)
    expert_y = like.new_empty(0 if call.tower == "fused" else call.perm.shape[0], hidden)
    splits = _splits(call, like, hidden, gemm)
    parts = split_k.partial_sums(y, splits, call.tower)
    run_kernel(
        down_kernel, _grid(call.tower, like, _row_tiles(call, rows, hidden, gemm) * len(parts), gemm),
        _operand(h, tma, call.config.block_rows, gemm.block_k),
        _operand(call.base.down, tma, gemm.block_n, gemm.block_k),
        parts, expert_h, call.experts.down, expert_y, expert_y if base_y is None else base_y,
        call.perm, *_expert_tiles(call.plan), call.plan.first_segment, call.plan.last_segment,
        call.lora.down_b if low is None else low, call.lora.down_b, rows,
        **_shape(call, like), **_blocks(call, gemm, lora_rank > _LOW_RANK), SPLITS=splits, TOWER=call.tower,
        LORA_RANK=lora_rank, ADD=base_y is not None, TMA=tma,
    )  # fmt: skip
    if splits > 1:
        split_k.reduce(parts, y, call.perm, call.tower)
    return y, expert_y


def d_hidden(
    call: Call, d_y: Tensor, d_y_expert: Tensor, base: Hidden, expert: Hidden, keep_h: bool,
    d_low: Tensor | None = None,
) -> tuple[Hidden, Hidden]:  # fmt: skip
    """Gradients of the pre-activations, and recomputed hidden units (the base's only if ``keep_h``).

    ``d_low`` (T, r): gradient of the product of the base's down adapter with its input.
    """
    gemm, tma = call.config.d_hidden, _use_tma(call, d_y, call.base.down)
    rows, lora_rank = 0 if call.tower == "expert" else d_y.shape[0], call.lora.down_b.shape[1]
    d_a = d_y.new_empty(rows, call.intermediate)
    h = d_y.new_empty(rows if keep_h else 0, call.intermediate)
    d_base = Hidden(d_a, torch.empty_like(d_a), h, torch.empty_like(d_a) if call.lora.drops else h)
    d_expert = _new_hidden(d_y_expert, d_y_expert.shape[0], call.rank, save=True)
    tiles = _segment_tiles(call) + _base_tiles(call, rows, call.intermediate, gemm)
    run_kernel(
        d_hidden_kernel, _grid(call.tower, d_y, tiles, gemm),
        _operand(d_y, tma, call.config.block_rows, gemm.block_k),
        _operand(call.base.down, tma, gemm.block_k, gemm.block_n),
        base.a, base.u, d_base.a, d_base.u, d_base.h,
        d_y_expert, call.experts.down, expert.a, expert.u, d_expert.a, d_expert.u, d_expert.h,
        call.perm, call.plan.inverse_perm, *_expert_tiles(call.plan),
        call.lora.down_a if d_low is None else d_low, call.lora.down_a, d_base.dropped_h, call.lora.mask,
        call.scale, rows,
        **_shape(call, d_y), **_blocks(call, gemm, lora_rank > _LOW_RANK),
        TOWER=call.tower, KEEP_H=keep_h, TMA=tma, LORA_RANK=lora_rank, DROPOUT=call.lora.drops,
    )  # fmt: skip
    return d_base, d_expert


def d_input(call: Call, d_base: Hidden, d_expert: Hidden, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the base rows and of the expert rows (in the fused tower all is in the first)."""
    gemm, tma = call.config.d_x, _use_tma(call, d_base.a, d_base.u, call.base.gate, call.base.up)
    hidden = like.shape[1]
    rows, expert_rows = d_base.a.shape[0], call.perm.shape[0]
    d_x = like.new_empty(rows, hidden)
    d_x_expert = like.new_empty(0 if call.tower == "fused" else expert_rows, hidden)
    splits = _splits(call, like, hidden, gemm)
    parts = split_k.partial_sums(d_x, splits, call.tower)
    run_kernel(
        d_x_kernel, _grid(call.tower, like, _row_tiles(call, rows, hidden, gemm) * len(parts), gemm),
        _operand(d_base.a, tma, call.config.block_rows, gemm.block_k),
        _operand(d_base.u, tma, call.config.block_rows, gemm.block_k),
        _operand(call.base.gate, tma, gemm.block_k, gemm.block_n),
        _operand(call.base.up, tma, gemm.block_k, gemm.block_n),
        parts, d_expert.a, d_expert.u, call.experts.gate, call.experts.up, d_x_expert,
        call.perm, *_expert_tiles(call.plan), call.plan.first_segment, call.plan.last_segment, rows,
        **_shape(call, like), **_blocks(call, gemm, call.rank > _HIGH_RANK),
        SPLITS=splits, TOWER=call.tower, TMA=tma,
    )  # fmt: skip
    if splits > 1:
        split_k.reduce(parts, d_x, call.perm, call.tower)
    return d_x, d_x_expert


def expert_weight_grads(call: Call, x: Tensor, d_y: Tensor, d_expert: Hidden) -> SwiGLUWeights:
    """Gradients of the expert weights, zeros for experts that are absent: every element is written once."""
    gemm, hidden = call.config.weight_grad, x.shape[1]
    grads = SwiGLUWeights(*(torch.empty_like(weight) for weight in call.experts))
    tiles = 2 * (_most_segments(call) + 1) * cdiv(hidden, gemm.block_n)
    run_kernel(
        expert_weight_grad_kernel, _grid("expert", x, tiles, gemm),
        x, d_y, d_expert.a, d_expert.u, d_expert.h, *grads,
        call.perm, call.plan.offsets, call.plan.experts, call.plan.segment_count, len(grads.gate),
        H=hidden, RANK=call.rank, RANK_PAD=_rank_pad(call.rank),
        BLOCK_N=gemm.block_n, BLOCK_K=gemm.block_k, PRECISION=_precision(x),
        num_warps=gemm.warps, num_stages=gemm.stages,
    )  # fmt: skip
    return grads


def _expert_tiles(plan: TilePlan) -> tuple[Tensor, ...]:
    return plan.offsets, plan.experts, plan.tile_segment, plan.tile_start, plan.tile_count


def _shape(call: Call, x: Tensor) -> dict[str, int | str]:
    return {
        "H": x.shape[1],
        "INTER": call.intermediate,
        "RANK": call.rank,
        "RANK_PAD": _rank_pad(call.rank),
        "PRECISION": _precision(x),
    }


def _blocks(call: Call, gemm: Gemm, tight: bool) -> dict[str, int]:
    stages = gemm.tight_stages if tight and gemm.tight_stages else gemm.stages
    return {
        "BLOCK_M": call.config.block_rows,
        "BLOCK_N": gemm.block_n,
        "BLOCK_K": gemm.block_k,
        "BLOCK_E": call.config.block_expert,
        "GROUP": call.config.group,
        "num_warps": gemm.warps,
        "num_stages": stages,
    }


def _rank_pad(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def _precision(x: Tensor) -> str:
    """The precision of PyTorch's own GEMMs. Older switches show up here; they raise once this was used."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _new_hidden(like: Tensor, rows: int, width: int, save: bool, drops: bool = False) -> Hidden:
    saved = rows if save else 0
    a, u, h = (like.new_empty(size, width) for size in (saved, saved, rows))
    return Hidden(a, u, h, torch.empty_like(h) if drops else h)


def _most_segments(call: Call) -> int:
    """A bound on the segments in use. Ids per row make the capacity T, however few experts there are."""
    return min(call.plan.experts.shape[0] - 1, call.experts.gate.shape[0])


def _segment_tiles(call: Call) -> int:
    """A bound on the tiles of segments, the tail's included: all rows in whole tiles, and one that is partly
    filled for each segment and the tail.
    """
    return cdiv(call.perm.shape[0], call.config.block_expert) + _most_segments(call) + 1


def _base_tiles(call: Call, rows: int, columns: int, gemm: Gemm) -> int:
    return cdiv(rows, call.config.block_rows) * cdiv(columns, gemm.block_n)


def _row_tiles(call: Call, rows: int, columns: int, gemm: Gemm) -> int:
    grouped = 0 if call.tower == "fused" else _segment_tiles(call)
    return grouped * cdiv(columns, gemm.block_n) + _base_tiles(call, rows, columns, gemm)


def _grid(tower: str, x: Tensor, tiles: int, gemm: Gemm) -> tuple[int]:
    many = tower == "expert" and x.device.type != "cpu"
    return (min(tiles, (_SEGMENT_PROGRAMS if many else gemm.programs) * _multiprocessors(x)),)


def _multiprocessors(x: Tensor) -> int:
    if x.device.type == "cuda":
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return _INTERPRETER_PROGRAMS if x.device.type == "cpu" else _RECORDED_PROGRAMS


def _splits(call: Call, x: Tensor, columns: int, gemm: Gemm) -> int:
    if call.tower == "expert":
        return 1
    return split_k.count(
        _base_tiles(call, x.shape[0], columns, gemm), _multiprocessors(x), call.config.max_splits
    )


def _use_tma(call: Call, *operands: Tensor) -> bool:
    """Descriptors need 16-byte aligned rows, one behind the other, and at least one row."""
    return (
        call.config.tma
        and call.tower != "expert"
        and all(
            t.numel() > 0
            and t.data_ptr() % 16 == 0
            and t.stride(0) >= t.shape[1]  # one row that was expanded has none
            and t.stride(0) * t.element_size() % 16 == 0
            for t in operands
        )
    )


def _operand(matrix: Tensor, tma: bool, block_rows: int, block_cols: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [block_rows, block_cols]) if tma else matrix
