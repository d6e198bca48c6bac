"""The paper's recipe: every responder of MQDialog has a file, and what they set is what the paper set."""

import pytest

from qar_models import QARConfig
from train.config import load_config

LLAMA3 = ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", 64)
QWEN = ("Qwen/Qwen1.5-7B-Chat", "qwen", 16)
RESPONDERS = {
    "bigbang_leonard": (*LLAMA3, 20),
    "bigbang_sheldon": (*LLAMA3, 20),
    "friends_rachel": (*LLAMA3, 20),
    "friends_ross": (*LLAMA3, 20),
    "modernfamily_claire": (*LLAMA3, 40),
    "modernfamily_phil": (*LLAMA3, 40),
    "palace_emperor": (*QWEN, 100),
    "palace_zhenhuan": (*QWEN, 40),
    "swordsman_baizhantang": (*QWEN, 20),
    "swordsman_lvxiucai": (*QWEN, 40),
    "swordsman_tongxiangyu": (*QWEN, 20),
    "wechat": (*QWEN, 20),
}
SHARED = {
    "method": "qar",
    "tower": "replace",
    "experts": "shared",
    "contrastive_weight": 0.5,
    "memory_size": 512,
    "projection_dim": 512,
    "lora_rank": 16,
    "lora_alpha": 8.0,
    "lora_dropout": 0.05,
    "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "trainable_layers": None,
    "learning_rate": 2e-4,
    "expert_learning_rate": 2e-4,
    "weight_decay": 0.1,
    "expert_weight_decay": 0.1,
    "adam_beta2": 0.95,
    "warmup_ratio": 0.01,
    "batch_size": 4,
    "gradient_accumulation": 8,
    "gradient_checkpointing": True,
    "max_tokens": 592,
    "names_in_prompt": True,
    "windows": "every_reply",
    "dtype": "bfloat16",
    "deepspeed": "train/ds/zero2.json",
}


@pytest.fixture
def recipes(request):
    return request.config.rootpath / "train" / "configs" / "mqdialog"


def test_all_twelve_are_there(recipes):
    found = {path.stem for path in recipes.glob("*.yaml")}
    assert found - {"base", "llama3", "qwen"} == set(RESPONDERS)


@pytest.mark.parametrize("name", RESPONDERS)
def test_values(recipes, request, name):
    config = load_config(recipes / f"{name}.yaml")
    assert (config.model, config.style, config.expert_rank, config.epochs) == RESPONDERS[name]
    show, _, responder = name.partition("_")
    folder = f"diags_two_role_{responder}_clustered" if responder else "diags_two_role_clustered"
    assert config.data == f"data/mqdialog/{show}/{folder}"
    assert name in config.output_dir
    assert {key: getattr(config, key) for key in SHARED} == SHARED
    assert (request.config.rootpath / config.deepspeed).is_file()
    assert 0 < config.validation < 1


def test_the_rest_is_the_default_of_the_model():
    assert QARConfig(num_queriers=1).temperature == 0.1
