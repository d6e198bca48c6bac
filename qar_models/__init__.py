"""Querier-aware Llama, Mistral, Qwen2 and Qwen3.

Importing this registers them with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qar_kernels import __version__ as __version__
from qar_models.config import QARConfig
from qar_models.conversion import apply_qar, remove_qar
from qar_models.expert_files import delete_experts
from qar_models.families import (
    FAMILIES,
    QARLlamaConfig,
    QARLlamaForCausalLM,
    QARMistralConfig,
    QARMistralForCausalLM,
    QARQwen2Config,
    QARQwen2ForCausalLM,
    QARQwen3Config,
    QARQwen3ForCausalLM,
)
from qar_models.merge import merge_shared
from qar_models.optim import RowSparseAdamW
from qar_models.row_sparse import (
    average_row_gradients,
    clip_grad_norm_,
    exclude_from_ddp,
    sparse_parameters,
)
from qar_models.upstream import load_upstream

for _family in FAMILIES:
    _aware = _family.aware
    AutoConfig.register(_aware.config.model_type, _aware.config)
    AutoModelForCausalLM.register(_aware.config, _aware.causal_lm)
    # with label smoothing, transformers' Trainer shifts labels only for the classes listed here
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_aware.config.model_type] = _aware.causal_lm.__name__

__all__ = [
    "QARConfig",
    "QARLlamaConfig",
    "QARLlamaForCausalLM",
    "QARMistralConfig",
    "QARMistralForCausalLM",
    "QARQwen2Config",
    "QARQwen2ForCausalLM",
    "QARQwen3Config",
    "QARQwen3ForCausalLM",
    "RowSparseAdamW",
    "apply_qar",
    "average_row_gradients",
    "clip_grad_norm_",
    "delete_experts",
    "exclude_from_ddp",
    "load_upstream",
    "merge_shared",
    "remove_qar",
    "sparse_parameters",
]
