import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from train import finetune as module
from train import setup
from train.base_model import load_base, load_tokenizer
from train.callbacks import StopOnInterrupt
from train.checkpoints import last_checkpoint
from train.cli import run
from train.data.encode import IGNORE
from train.dry_run import dry_run
from train.errors import UserError
from train.finetune import finetune
from train.run_file import RUN
from train.trained import EXPERTS, TRAINED, build, load_trained, save_trained
from train.trainer import WEIGHTS


def losses(config):
    log = json.loads((Path(config.output_dir) / "log.json").read_text())
    return [row["loss"] for row in log if "loss" in row]


def experts_of(folder):
    return load_file(Path(folder) / EXPERTS)


def test_learns_saves_small_checkpoints_and_is_reused(config):
    folder = finetune(config)
    found = losses(config)
    assert len(found) == 6
    assert sum(found[-2:]) < sum(found[:2])
    stored = load_file(Path(config.output_dir) / "checkpoint-6" / WEIGHTS)
    assert any(".experts." in name for name in stored)
    assert any("lora_A" in name for name in stored)
    assert not any(name.endswith(("base_layer.weight", "embed_tokens.weight")) for name in stored)
    assert len(list(Path(config.output_dir).glob("checkpoint-*"))) == 2
    before = (folder / EXPERTS).stat().st_mtime_ns
    assert finetune(config) == folder
    assert (folder / EXPERTS).stat().st_mtime_ns == before


def test_trained_model_loads_and_experts_answer_differently(config, tiny_data):
    trained = load_trained(finetune(config))
    ids = torch.arange(5).repeat(2, 1)
    out = trained.model(ids, querier_ids=torch.tensor([0, 1])).logits
    assert not torch.allclose(out[0], out[1])
    assert trained.queriers == tuple(tiny_data.queriers)


@pytest.mark.parametrize("target", ["lm_head", "model.embed_tokens"])
def test_an_adapter_of_one_end_of_a_tied_base_leaves_the_other(config, tiny_data, tmp_path, target):
    config = config.replace(lora_targets=("q_proj", target), trainable_layers=None, lora_dropout=0.0)
    base, _ = load_base(config.model)
    peft = build(base, config, tuple(tiny_data.queriers), 1)
    torch.manual_seed(0)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    save_trained(peft, config, tiny_data.responder, None, tmp_path / "trained")
    ids, asker = torch.arange(5)[None], torch.tensor([0])
    loaded = load_trained(tmp_path / "trained").model
    torch.testing.assert_close(loaded(ids, querier_ids=asker).logits, peft(ids, querier_ids=asker).logits)


def test_ft_has_no_experts_and_ignores_who_asks(config):
    trained = load_trained(finetune(config.replace(method="ft")))
    assert all(layer.experts is None for layer in trained.model.model.layers)
    ids = torch.arange(5).repeat(2, 1)
    out = trained.model(ids, querier_ids=torch.tensor([0, 1])).logits
    torch.testing.assert_close(out[0], out[1])


def interrupting_at(step):
    class Interrupting(StopOnInterrupt):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGINT)
            super().on_step_end(args, state, control, **kwargs)

    return Interrupting


@pytest.mark.parametrize("changes", [{}, {"contrastive_weight": 0.5, "memory_size": 4, "projection_dim": 8}])
def test_interrupted_run_resumes_to_the_same_model(config, changes, monkeypatch):
    config = config.replace(**changes)
    unbroken = experts_of(finetune(config))
    broken = config.replace(output_dir=config.output_dir + "_broken")

    monkeypatch.setattr(module, "StopOnInterrupt", interrupting_at(3))
    with pytest.raises(KeyboardInterrupt):
        finetune(broken)
    assert last_checkpoint(Path(broken.output_dir)).name == "checkpoint-3"
    with pytest.raises(UserError, match="--resume continues it"):
        finetune(broken)
    monkeypatch.undo()
    resumed = experts_of(finetune(broken, resume=True))
    assert resumed.keys() == unbroken.keys()
    for name, tensor in unbroken.items():
        assert torch.equal(tensor, resumed[name]), name


def test_how_often_a_run_is_saved_may_change_when_it_resumes(config, monkeypatch):
    monkeypatch.setattr(module, "StopOnInterrupt", interrupting_at(1))
    with pytest.raises(KeyboardInterrupt):
        finetune(config.replace(save_steps=100))
    monkeypatch.undo()
    finetune(config.replace(save_steps=2, save_total_limit=9), resume=True)
    saved = {path.name for path in Path(config.output_dir).glob("checkpoint-*")}
    assert saved == {f"checkpoint-{step}" for step in (1, 2, 4, 6)}


def test_signals_are_given_back_and_a_thread_trains_without(config):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    nothing = torch.tensor(math.nan, requires_grad=True)
    with pytest.raises(UserError, match="the loss is nan"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.QARTrainer, "compute_loss", lambda *args, **kwargs: nothing)
        finetune(config)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with ThreadPoolExecutor() as pool:
        assert (
            pool.submit(finetune, config.replace(output_dir=f"{config.output_dir}_thread")).result().is_dir()
        )


def test_a_run_that_converts_its_model_draws_the_same_experts(config, tmp_path, monkeypatch):
    folder = finetune(config)
    load = setup.load_base

    def converting(*args):
        torch.rand(3)
        return load(*args)

    monkeypatch.setattr(setup, "load_base", converting)
    again = finetune(config.replace(output_dir=str(tmp_path / "runs" / "again")))
    assert all(torch.equal(tensor, experts_of(again)[name]) for name, tensor in experts_of(folder).items())


def test_damaged_checkpoint_falls_back_to_the_one_before(config, caplog):
    finetune(config)
    run = Path(config.output_dir)
    weights = run / "checkpoint-6" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:64])
    assert last_checkpoint(run).name == "checkpoint-4"
    assert "checkpoint-6 is damaged" in caplog.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"lora_targets": ("q_proj", "v_porj")},
            "lora_targets: no module of a trained layer is called 'v_porj'",
        ),
        (
            {"lora_targets": ("q_proj", "embed_tokens")},
            "no module of a trained layer is called 'embed_tokens'",
        ),
        (
            {"lora_targets": ("foo",)},
            "lora_targets: got foo: Target modules .*'foo'.* not found in .* model$",
        ),
        ({"lora_targets": ("mlp",)}, "lora_targets: got mlp: Target module .* is not supported$"),
        ({"trainable_layers": 9}, "trainable_layers: got 9, but the model has 3"),
        ({"model": "./absent"}, "^model './absent': no such folder"),
        ({"report_to": "foo"}, "report_to: 'foo' is not installed or unknown"),
        ({"data": "absent"}, "absent"),
        ({"max_tokens": 5}, "max_tokens=5"),
        pytest.param(
            {"dtype": "float16"},
            "dtype: float16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="float16 works on this machine"),
        ),
    ],
)
def test_mistakes_are_named_before_training(config, changes, named):
    with pytest.raises(UserError, match=f"(?s){named}"):
        finetune(config.replace(**changes))
    assert not (Path(config.output_dir) / "trained").exists()


def test_a_model_of_another_family_is_named(config, tmp_path):
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder)
    for path in Path(config.model).glob("tokenizer*"):
        shutil.copy(path, folder)
    with pytest.raises(UserError, match="gpt2': got GPT2LMHeadModel, expected one of LlamaForCausalLM"):
        finetune(config.replace(model=str(folder)))


def test_a_misspelt_name_is_not_waited_for_without_a_network(config, monkeypatch):
    def unknown(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(time, "sleep", lambda *_: pytest.fail("waits to ask again"))
    for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    with pytest.raises(UserError, match="model 'nohubname': cannot be loaded"):
        load_tokenizer("nohubname")


def test_models_that_do_not_fit_are_named(config, tmp_path):
    folder = shutil.copytree(config.model, tmp_path / "own")
    changed = config.replace(model=str(folder))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"max_position_embeddings": 8}))
    with pytest.raises(
        UserError, match=r"max_tokens: got 592, and a window of \d+ tokens, but .* 8 positions"
    ):
        finetune(changed)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-20])
    with pytest.raises(UserError, match="own': cannot be loaded"):
        finetune(changed)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {key: settings[key] for key in settings if key not in ("eos_token", "pad_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match="own': its tokenizer has no padding"):
        finetune(changed)


def test_a_place_that_cannot_be_written_is_one_line(config, tmp_path, capsys):
    (tmp_path / "mine").write_text("notes")
    with pytest.raises(SystemExit) as raised:
        run(lambda: finetune(config.replace(output_dir=str(tmp_path / "mine"))))
    assert raised.value.code == 2
    assert "mine is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("work", [finetune, dry_run])
@pytest.mark.parametrize("place", ["/proc/x", "link/run", "link"])
def test_a_place_where_nothing_can_be_made_is_refused_before_the_model_is_loaded(
    config, place, work, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("loaded before the refusal"))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(SystemExit, match="2"):
        run(lambda: work(config.replace(output_dir=str(tmp_path / place))))
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert error.count("\n") == 1


def test_replace_tower_and_full_depth_train_too(config):
    folder = finetune(config.replace(tower="replace", experts="per_querier", trainable_layers=None))
    assert any("norm_specific" in name for name in experts_of(folder))
    assert sum(losses(config)[-2:]) < sum(losses(config)[:2])


def test_sixteen_bits_train_masters_in_full_precision(config):
    finetune(config)
    half = config.replace(dtype="bfloat16", output_dir=f"{config.output_dir}_bf16", contrastive_weight=0.5)
    folder = finetune(half)
    assert experts_of(folder)["model.layers.1.experts.down"].dtype == torch.float32
    log = json.loads((Path(half.output_dir) / "log.json").read_text())
    assert [row["lm_loss"] for row in log if "lm_loss" in row] == pytest.approx(losses(config), rel=0.05)


def test_a_base_with_other_weights_is_refused(config, tmp_path):
    base = shutil.copytree(config.model, tmp_path / "base")
    folder = finetune(config.replace(model=str(base), dtype="bfloat16"))
    for dtype in (None, torch.float32, torch.float16):
        assert load_trained(folder, dtype).responder
    stored = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(stored | {name: stored[name].neg()}, base / "model.safetensors", metadata={"format": "pt"})
    for dtype in (None, torch.bfloat16, torch.float32):  # float16 has not all of their digits
        with pytest.raises(UserError, match="other weights than those that"):
            load_trained(folder, dtype)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="had other weights; another output_dir starts anew"):
        finetune(config.replace(model=str(base), dtype="bfloat16"), resume=True)


def test_a_base_is_found_from_anywhere_and_a_project_may_move(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(config.model, "project/base")
    shutil.copytree(config.data, "project/data")
    monkeypatch.chdir("project")
    folder = finetune(config.replace(model="base", data="data", output_dir="run")).resolve()
    monkeypatch.chdir(tmp_path)
    assert load_trained(folder).responder
    shutil.move("project", "moved")
    monkeypatch.chdir("moved")
    assert load_trained(Path("run/trained")).responder
    assert finetune(config.replace(model="base", data="data", output_dir="run")) == Path("run/trained")


def test_a_finished_run_is_known_after_a_setting_was_added(config):
    folder = finetune(config)
    for path in (folder / TRAINED, Path(config.output_dir) / RUN):  # as an earlier version wrote them
        about = json.loads(path.read_text())
        assert about["config"].pop("projection_dim") == config.projection_dim
        path.write_text(json.dumps(about))
    assert finetune(config) == folder
    with pytest.raises(UserError, match="--resume continues it"):
        finetune(config.replace(projection_dim=8))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_adapter_is_named_and_not_looked_for_elsewhere(config, name, monkeypatch):
    folder = finetune(config)
    (folder / name).unlink()
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *_: pytest.fail("PEFT looked for the adapter"))
    with pytest.raises(UserError, match=f"trained/{name}: is missing$"):
        load_trained(folder)


def test_damaged_result_is_refused(config):
    folder = finetune(config)
    (folder / EXPERTS).write_bytes((folder / EXPERTS).read_bytes()[:50])
    with pytest.raises(UserError, match=EXPERTS):
        load_trained(folder)
    with pytest.raises(UserError, match="no trained model there"):
        load_trained(folder.parent)
    (folder / TRAINED).write_text('{"config": ')
    with pytest.raises(UserError, match="damaged JSON"):
        finetune(config)
    (folder / TRAINED).write_text("{}")
    with pytest.raises(UserError, match="damaged, 'config' is missing"):
        load_trained(folder)


def test_a_loaded_model_has_the_dtype_of_training_and_experts_of_one_shape(config):
    folder = finetune(config.replace(dtype="bfloat16"))
    ids, asker = torch.arange(5)[None], torch.tensor([0])
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = load_trained(folder, dtype).model
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert model(ids, querier_ids=asker).logits.isfinite().all()
    stored = experts_of(folder)
    name = next(name for name in stored if name.endswith("experts.down"))
    save_file(stored | {name: stored[name][:1]}, folder / EXPERTS)  # would be broadcast
    with pytest.raises(UserError, match="holds other experts"):
        load_trained(folder)


def test_command_line_shows_one_line_and_fails(tmp_path, request):
    command = [sys.executable, "-m", "train.finetune", "--config", str(tmp_path / "absent.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
    assert "absent.yaml" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ignore_index_is_the_models():
    from qar_models.causal_lm import IGNORE_INDEX

    assert IGNORE_INDEX == IGNORE
