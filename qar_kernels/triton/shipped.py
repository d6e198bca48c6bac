"""What is shipped: every launch that the configurations lead to, on tensors without storage.

T rows, H hidden, I intermediate, R expert rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from qar_kernels.model_shapes import MODEL_SHAPES
from qar_kernels.segments import Segments
from qar_kernels.tile_plan import tile_plan
from qar_kernels.triton import base_mlp, launch
from qar_kernels.triton.adamw import adamw_rows
from qar_kernels.triton.configs import CONFIGS, FAMILIES
from qar_kernels.triton.launch import Call, Hidden
from qar_kernels.triton.lora import LoraOperands, draw_mask
from qar_kernels.triton.runner import Recorded, recording
from qar_kernels.weights import SwiGLUWeights

# At these everything is compiled; at the others what is asked for.
SHAPES = {name: MODEL_SHAPES[name] for name in ("Llama-3-8B", "Qwen2.5-7B")}
RANKS = (8, 16, 32, 64, 128)
TOWERS = ("fused", "dual", "expert")
LORA_RANKS = (16, 64)  # of adapters on all three base projections, with dropout
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Each gives the split K loops a different number of parts at the shapes above.
_DECODE_ROWS = (64,)
_PREFILL_ROWS = (1024, 512, 256, 128)


@dataclass(frozen=True)
class Case:
    """One configuration at one model's shape."""

    config: str
    shape: str
    rank: int
    dtype: str
    tower: str
    lora_rank: int = 0


def matrix(arch: str, shapes: Sequence[str] = tuple(SHAPES)) -> Iterator[Case]:
    """Every case of ``arch``; exact fp32, which no model is served in, at one shape and three ranks."""
    for config in (name for name in CONFIGS if name.startswith(_family(arch))):
        # the large configuration has the expert tower where nothing below the experts is trained
        towers = ("expert",) if config.endswith(("_experts", "_short")) else TOWERS
        for kind in product(shapes, RANKS, ("bf16", "fp16"), towers):
            yield Case(config, *kind)
        if "fused" in towers:
            for shape, lora_rank in product(shapes, LORA_RANKS):
                yield Case(config, shape, 64, "bf16", "fused", lora_rank)
    for rank in (8, 64, 128):
        yield from (Case("fp32", shapes[0], rank, "fp32", tower) for tower in TOWERS)


def representative(arch: str) -> Iterator[Case]:
    """Few cases that meet every configuration, tower, shape and dtype, and ranks from 8 to 128."""
    large, decode, experts, short = (
        f"{_family(arch)}_{size}" for size in ("large", "decode", "experts", "short")
    )
    yield Case(large, "Llama-3-8B", 64, "bf16", "fused")
    yield Case(large, "Llama-3-8B", 64, "bf16", "fused", lora_rank=16)
    yield Case(large, "Qwen2.5-7B", 64, "bf16", "fused", lora_rank=64)
    yield Case(large, "Qwen2.5-7B", 128, "fp16", "dual")
    yield Case(decode, "Qwen2.5-7B", 32, "bf16", "fused")
    yield Case(decode, "Qwen2.5-7B", 32, "bf16", "fused", lora_rank=64)
    yield Case(decode, "Llama-3-8B", 8, "fp16", "dual")
    yield Case(decode, "Qwen2.5-7B", 128, "bf16", "expert")
    yield Case(experts, "Llama-3-8B", 64, "bf16", "expert")
    yield Case(short, "Llama-3-8B", 64, "bf16", "expert")
    yield Case("fp32", "Llama-3-8B", 16, "fp32", "fused")
    yield Case("fp32", "Llama-3-8B", 64, "fp32", "expert")  # what fp32 runs beside a library's base


def training_step(case: Case) -> list[Recorded]:
    """The launches of a step with the base frozen, as ``make test`` compiles them."""
    return _launches(case, _rows(case)[:1], keep_h=(False,), save=(True,))


def every_launch(case: Case) -> list[Recorded]:
    """Also those of inference, of a base that is trained, and of every number of K splits."""
    return _launches(case, _rows(case), keep_h=(False, True), save=(True, False))


def _family(arch: str) -> str:
    return FAMILIES[divmod(int(arch.removeprefix("sm_")), 10)]


def _rows(case: Case) -> tuple[int, ...]:
    return _DECODE_ROWS if case.config.endswith("decode") else _PREFILL_ROWS


def _launches(
    case: Case, row_counts: tuple[int, ...], keep_h: tuple[bool, ...], save: tuple[bool, ...]
) -> list[Recorded]:
    with recording() as recorded:
        for rows in row_counts:
            call, x = _call(case, rows)
            for saved in save:
                base, expert = launch.gate_up(call, x, x, saved)
            base, expert = (Hidden(rows_of.h, rows_of.h, rows_of.h, rows_of.h) for rows_of in (base, expert))
            low = x.new_empty(rows, case.lora_rank) if case.lora_rank else None
            launch.down(call, base.h, expert.h, x, None, low)
            if case.tower == "expert":
                launch.down(call, base.h, expert.h, x, x)
                _base_mlp(x.new_empty(rows, MODEL_SHAPES[case.shape][1]))
            for kept in keep_h:
                grads = launch.d_hidden(call, x, x, base, expert, kept, low)
            launch.d_input(call, *grads, x)
            launch.expert_weight_grads(call, x, x, grads[1])
            _optimizer_step(call.experts.gate)
        if case.lora_rank:
            draw_mask(
                torch.empty(1, dtype=torch.int64, device="meta"), x.shape[0], MODEL_SHAPES[case.shape][1], 0.1
            )
    return recorded


def _base_mlp(pre: Tensor) -> None:
    """Between the vendor library's GEMMs of a base whose experts run beside it."""
    base_mlp.swiglu(pre, pre)
    for keep_h in (False, True):
        base_mlp.swiglu_backward(pre, pre, pre, keep_h)


def _optimizer_step(bank: Tensor) -> None:
    """Of every expert of the batch: fp32 weights without a copy, 16-bit ones under a gradient scaler."""
    exact = torch.empty_like(bank, dtype=torch.float32)
    steps, ids = exact[:, 0, 0], torch.empty(len(bank), dtype=torch.int64, device="meta")
    rounded, found_inf = (None, None) if bank.dtype == exact.dtype else (bank, steps[:1])
    adamw_rows(exact, rounded, exact, exact, steps, ids, bank, 1e-3, (0.9, 0.999), 1e-8, 0.01, found_inf)


def _call(case: Case, rows: int) -> tuple[Call, Tensor]:
    """A batch of ``rows`` rows and four experts."""
    hidden, inter = MODEL_SHAPES[case.shape]
    experts = 4

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=DTYPES[case.dtype], device="meta")

    blocks = CONFIGS[case.config]
    segments = Segments.from_ids([0, 1, 2, 3] * (rows // 4))
    base = SwiGLUWeights(empty(inter, hidden), empty(inter, hidden), empty(hidden, inter))
    stacked = (empty(experts, case.rank, hidden), empty(experts, case.rank, hidden))
    expert = SwiGLUWeights(*stacked, empty(experts, hidden, case.rank))
    plan = tile_plan(segments, blocks.block_rows, blocks.block_expert)
    lora = _adapters(empty, rows, hidden, inter, case.lora_rank)
    return Call(case.tower, base, expert, segments.perm, plan, 1.0, blocks, lora), empty(rows, hidden)


def _adapters(empty: Callable[..., Tensor], rows: int, hidden: int, inter: int, rank: int) -> LoraOperands:
    """Adapters of one rank with dropout; of rank 0 there are none."""
    if not rank:
        return LoraOperands.none(empty(inter, hidden))
    low, gate_b = empty(rows, rank), empty(inter, rank)
    mask = torch.empty(rows, inter // 8, dtype=torch.uint8, device="meta")
    return LoraOperands(low, gate_b, low, gate_b, empty(rank, inter), empty(hidden, rank), mask)
