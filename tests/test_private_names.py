"""The private names of other packages that this one uses exist as it uses them.

An upgrade that renames one, or changes its parameters, fails here by name instead of deep in a run.
"""

import importlib
import inspect

import pytest
import torch
from accelerate import PartialState
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, Trainer
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

LISTS = ("params_with_grad", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")
OVERRIDDEN_OR_CALLED = [
    (Trainer, "_clip_grad_norm", ("model",)),
    (Trainer, "_get_grad_norm", ("model", "grad_norm")),
    (Trainer, "_get_output_dir", ("trial",)),
    (Trainer, "_get_train_sampler", ("train_dataset",)),
    (Trainer, "_load_from_checkpoint", ("resume_from_checkpoint", "model")),
    (Trainer, "_load_optimizer_and_scheduler", ("checkpoint",)),
    (Trainer, "_prepare_for_training", ("max_steps", "train_dataloader", "resume_from_checkpoint")),
    (Trainer, "_save_checkpoint", ("model", "trial")),
    (Trainer, "_save_optimizer_and_scheduler", ("output_dir",)),
    (Trainer, "save_model", ("output_dir", "_internal_call")),
    (PreTrainedModel, "_init_weights", ("module",)),
    (nn.Module, "_apply", ("fn", "recurse")),
    (torch.optim.AdamW, "_init_group", ("group", *LISTS)),
]


@pytest.mark.parametrize(("owner", "name", "expected"), OVERRIDDEN_OR_CALLED)
def test_methods_take_the_parameters_that_are_passed(owner, name, expected):
    assert tuple(inspect.signature(getattr(owner, name)).parameters) == ("self", *expected)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "_assert_async"),
        ("torch", "_grouped_mm"),
        ("torch.cuda", "_sleep"),
        ("torch.utils._python_dispatch", "TorchDispatchMode"),
        ("torch.utils._pytree", "tree_leaves"),
    ],
)
def test_functions_exist(module, name):
    assert callable(getattr(importlib.import_module(module), name))


def test_torch():
    assert torch._C._len_torch_dispatch_stack() == 0
    x = torch.zeros(2, 3)
    assert x.view(6)._is_view() and not torch.ops.aten._unsafe_view.default(x, (6,))._is_view()
    assert x._version == 0
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), x[:1], x.shape, check_invariants=True)
    assert sparse._indices().tolist() == [[1]] and sparse._values().shape == (1, 3)
    hooks = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
    assert {"_modules", *hooks} <= vars(nn.Linear(1, 1)).keys()
    limits = ("recompile_limit", "fail_on_recompile_limit_hit")
    assert all(hasattr(torch._dynamo.config, name) for name in limits)


def test_data_parallelism_asks_a_model_what_to_ignore():
    model = nn.Linear(1, 1)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["weight"])
    assert model._ddp_params_and_buffers_to_ignore == ["weight"]


def test_transformers():
    size = {"num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaModel(LlamaConfig(vocab_size=2, hidden_size=2, intermediate_size=2, **size))
    assert set(model._no_split_modules) == {"LlamaDecoderLayer"}
    assert model.config._attn_implementation == "sdpa"
    assert dict.get(_CAN_RECORD_REGISTRY, str(LlamaModel)) == LlamaModel._can_record_outputs


def test_accelerate():
    assert isinstance(PartialState._shared_state, dict)
    hooked = add_hook_to_module(nn.Linear(1, 1), ModelHook())
    assert {"_hf_hook", "_old_forward", "forward"} <= vars(hooked).keys()


def test_triton():
    driver = pytest.importorskip("triton.runtime.driver").driver
    assert "_active" in vars(driver)
