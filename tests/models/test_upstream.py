"""Checkpoints of the paper's code: recorded numbers, and a golden file of a plain re-implementation."""

import json
import os
from pathlib import Path

import pytest
import torch
from golden_upstream import FOLDER, NAME, run
from safetensors.torch import load_file
from tiny_models import QUERIER_IDS, left_padded_batch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from qar_models import load_upstream

HERE = Path(__file__).resolve().parent
FIXTURES = Path(os.environ.get("QAR_UPSTREAM_FIXTURES", HERE.parents[2] / "shared" / "fixtures" / "upstream"))
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}
LEARNING_RATE = 0.05


class Recording:
    """One recorded training run: a checkpoint, its settings, and what happened at every step."""

    def __init__(self, folder, name):
        info = json.loads((folder / f"{name}.json").read_text())
        self.family, self.args, self.steps = info["family"], info["args"], info["steps"]
        self.checkpoint = load_file(folder / f"{name}.model.safetensors")
        self.tensors = load_file(folder / f"{name}.record.safetensors")

    def config(self):
        return CONFIGS[self.family](
            vocab_size=self.args["vocab"],
            hidden_size=self.args["hid"],
            intermediate_size=self.args["inter"],
            num_hidden_layers=self.args["layers"],
            num_attention_heads=self.args["heads"],
            num_key_value_heads=self.args["kv"],
            rms_norm_eps=1e-6,
            attn_implementation="eager",
        )

    def load(self, **changes):
        settings = {
            "num_queriers": self.args["queriers"],
            "num_clusters": self.args["clusters"],
            "memory_size": self.args["K"],
            "temperature": self.args["T"],
            "weight": self.args["lam"],
            "projection_dim": self.args["proj"],
        }
        return load_upstream(self.config(), self.checkpoint, **{**settings, **changes})

    def batch(self, prefix):
        given = {
            name.removeprefix(f"{prefix}.in."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.in.")
        }
        return {
            "input_ids": given["input_ids"],
            "attention_mask": given["attention_mask"],
            "labels": given["labels"],
            "querier_ids": given["role_pair_id"] - 2,
            "response_mask": given["role_pos_ids"] == 1,
            "cluster_ids": given["cluster_ids"],
        }

    def gradients(self, step):
        prefix = f"step{step}.grad."
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


def our_gradient(model, name):
    """The gradient of the reference's parameter ``name``."""
    parameters = dict(model.named_parameters())
    if "mlp_specific" in name:
        ours = name.replace("mlp_specific", "experts").replace("_proj_low_rank.weight", "")
        return parameters[ours].grad[0]
    if name.startswith("role_proj_v"):
        view, cluster, kind = name.removeprefix("role_proj_v").split(".")
        return parameters[f"contrast.head_{kind}"].grad[int(view) - 1, int(cluster)]
    return parameters[name.replace("model.norm_role_proj", "contrast.norm_role_proj")].grad


def check_run(recording, model):
    model.train()
    for step, recorded in enumerate(recording.steps):
        out = model(**recording.batch(f"step{step}"))
        close(out.logits, recording.tensors[f"step{step}.logits"])
        assert out.lm_loss.item() == pytest.approx(recorded["loss_lm"], abs=3e-6)
        assert out.contrastive_loss.item() == pytest.approx(recorded["loss_specific"], abs=3e-6)
        assert out.loss.item() == pytest.approx(recorded["loss"], abs=3e-6)
        model.zero_grad()
        out.loss.backward()
        for name, expected in recording.gradients(step).items():
            torch.testing.assert_close(
                our_gradient(model, name),
                expected,
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, name=name: f"{name}: {m}",
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    for view in (1, 2):
        close(model.contrast.memory[view - 1], recording.tensors[f"final.role_avg_emb_view{view}"])
    assert torch.equal(model.contrast.writes, recording.tensors["final.role_avg_emb_ptr"])
    close(model.eval()(**recording.batch("eval")).logits, recording.tensors["eval.logits"])


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="no recorded reference numbers; set QAR_UPSTREAM_FIXTURES")
@pytest.mark.parametrize("name", ["llama_a", "qwen2_a"])
def test_matches_the_recorded_reference(name):
    recording = Recording(FIXTURES, name)
    check_run(recording, recording.load())


@pytest.fixture
def golden():
    return Recording(FOLDER, NAME)


def test_matches_the_golden_run(golden):
    check_run(golden, golden.load())


def test_the_golden_file_is_what_its_code_writes(golden):
    info, checkpoint, record = run()
    assert info["args"] == golden.args
    for step, recorded in zip(info["steps"], golden.steps, strict=True):
        assert step == pytest.approx(recorded)
    for name, tensor in (checkpoint | record).items():
        close(tensor, (golden.checkpoint | golden.tensors)[name])


def test_saved_loaded_and_continued(golden, tmp_path):
    model = golden.load()
    model.save_pretrained(tmp_path)
    check_run(golden, AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"))


@pytest.mark.parametrize("wrap", [False, True])
def test_continues_from_a_full_ring_however_its_pointer_counts(golden, wrap):
    final = {n.removeprefix("final."): t for n, t in golden.tensors.items() if n.startswith("final.")}
    if wrap:
        final["role_avg_emb_ptr"] = final["role_avg_emb_ptr"] % golden.args["K"]
    golden.checkpoint |= final
    contrast = golden.load().contrast
    count = golden.tensors["final.role_avg_emb_ptr"]
    assert count.max() > golden.args["K"]
    assert torch.equal(contrast.writes.clamp(max=2), count.clamp(max=2))
    assert torch.equal(contrast.writes % 2, count % 2)
    close(contrast.totals, contrast.memory.sum(3).double())


def test_generates(golden):
    model, batch = golden.load().eval(), left_padded_batch()
    batch["input_ids"] %= golden.args["vocab"]
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (3, 13)
    assert model.generate(**batch, querier_ids=QUERIER_IDS, max_new_tokens=3).shape == (3, 13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("model.norm_specific.weight"), r"1 missing tensors.*model\.norm_specific\.weight"),
        (lambda d: d.pop("role_proj_v1.1.bias"), r"1 missing tensors.*role_proj_v1\.1\.bias"),
        (lambda d: d.update({"model.extra": torch.zeros(1)}), r"1 unknown tensors.*model\.extra"),
        (
            lambda d: d.update({"lm_head.weight": torch.zeros(3, 16)}),
            r"got lm_head\.weight of shape \(3, 16\)",
        ),
        (
            lambda d: d.pop("model.layers.0.mlp_specific.gate_proj_low_rank.weight"),
            "expected a checkpoint of the reference code",
        ),
    ],
)
def test_a_wrong_checkpoint_is_refused(golden, change, message):
    change(golden.checkpoint)
    with pytest.raises(ValueError, match=message):
        golden.load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_queriers": 4}, r"role_avg_emb_view1 of shape \(2, 5, 2, 8\), expected \(2, 6, 2, 8\)"),
        ({"num_clusters": 3}, r"2 missing tensors|4 missing tensors"),
        ({"memory_size": 3}, r"role_avg_emb_view1 of shape \(2, 5, 2, 8\), expected \(2, 5, 3, 8\)"),
        ({"projection_dim": 4}, r"role_proj_v1\.0\.weight of shape \(8, 16\), expected \(4, 16\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(golden, settings, message):
    with pytest.raises(ValueError, match=message):
        golden.load(**settings)


def test_another_family_is_refused(golden):
    with pytest.raises(TypeError, match=r"got GPT2Config, expected one of LlamaConfig, .*Qwen2Config"):
        load_upstream(
            GPT2Config(),
            golden.checkpoint,
            num_queriers=3,
            num_clusters=2,
            memory_size=2,
            temperature=0.2,
            weight=0.7,
            projection_dim=8,
        )


def test_ids_of_the_phantom_classes_are_refused(golden):
    batch = golden.batch("step0")
    batch["querier_ids"][0] = 3
    with pytest.raises(ValueError, match="expected ids from -1 to 2"):
        golden.load().train()(**batch)
