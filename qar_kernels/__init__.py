"""Base SwiGLU MLP plus segmented per-querier low-rank experts, as one differentiable operation."""

from qar_kernels.lora import Adapter, LoRA
from qar_kernels.op import BACKENDS, dual_mlp, expert_mlp, fused_mlp
from qar_kernels.segments import Segments

__version__ = "0.1.0"

__all__ = ["BACKENDS", "Adapter", "LoRA", "Segments", "dual_mlp", "expert_mlp", "fused_mlp"]
