import argparse
import dataclasses
import re
import sys

import pytest

from train import finetune
from train.cli import positive_int
from train.config import TrainConfig, load_config
from train.data import build, show
from train.errors import UserError
from train.experiment.load import load_experiment


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_values_and_overrides(tmp_path):
    path = write(tmp_path, "data: d\noutput_dir: o\nlearning_rate: 1e-4\nlora_targets: [q_proj]\n")
    config = load_config(path, ["epochs=3", "trainable_layers=null", "tower=replace", "deepspeed=ds.json"])
    assert config.learning_rate == 1e-4
    assert config.epochs == 3.0
    assert config.trainable_layers is None
    assert config.lora_targets == ("q_proj",)
    assert (config.tower, config.deepspeed) == ("replace", "ds.json")


def test_texts_are_taken_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path, "data: ~/d\noutput_dir: o\nprofiles: p.yaml\n")
    config = load_config(path, ["output_dir=runs/al #2", "model=~/llama", "profiles=~"])
    assert (config.data, config.output_dir) == (f"{tmp_path}/d", "runs/al #2")
    assert (config.model, config.profiles) == (f"{tmp_path}/llama", None)
    assert load_config(path, ["output_dir=2026", "model='some/hub name'"]).model == "some/hub name"
    assert load_config(path, ["deepspeed=''"]).deepspeed is None
    with pytest.raises(UserError, match="model: is empty, expected a path"):
        load_config(path, ["model=''"])
    with pytest.raises(UserError, match="override 'batch_size=two': got 'two', expected int"):
        load_config(path, ["batch_size=two"])


def test_queriers_share_experts(tmp_path):
    path = write(tmp_path, "data: d\noutput_dir: o\nshare_experts: {Raj: Amy, Leo: Ann}\n")
    config = load_config(path)
    qar = config.qar_config(("Amy", "Ann", "Leo", "Raj", "Zoe"), 0, 0)
    assert qar.querier_experts == (0, 1, 1, 0, 2)
    assert config.replace(method="ft").qar_config(("Amy", "Raj"), 0, 0).querier_experts is None
    with pytest.raises(UserError, match=r"share_experts: got 'Leo', expected queriers \(Amy, Ann, Raj\)"):
        config.qar_config(("Amy", "Ann", "Raj"), 0, 0)
    for wrong, named in (
        ("share_experts={Raj: Amy, Amy: Leo}", "got 'Amy'"),
        ("experts=shared", "all queriers share one"),
    ):
        with pytest.raises(UserError, match=named):
            load_config(path, [wrong])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "data: d\noutput_dir: o\nlearning_rat: 1\n",
            "unknown key 'learning_rat'; did you mean 'learning_rate'",
        ),
        ("output_dir: o\n", "key 'data' is missing"),
        ("data: d\noutput_dir: o\nepochs: many\n", "key 'epochs': got 'many', expected a number"),
        ("data: d\noutput_dir: o\nbatch_size: 2.5\n", "key 'batch_size': got 2.5, expected int"),
        ("data: d\noutput_dir: o\nbatch_size: 0\n", "batch_size: got 0, expected at least 1"),
        (
            "data: d\noutput_dir: o\ntower: twin\n",
            "key 'tower': got 'twin', expected one of residual, replace",
        ),
        ("data: d\noutput_dir: o\nlora_targets: q\n", "key 'lora_targets': got 'q', expected a list"),
        ("- 1\n", "expected a mapping"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, named):
    with pytest.raises(UserError, match=r"run\.yaml|batch_size") as error:
        load_config(write(tmp_path, text))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("contrastive_weight=-1", "contrastive_weight: got -1.0, expected a number of at least 0"),
        ("memory_size=0", "memory_size: got 0, expected at least 1"),
        ("expert_rank=0", "expert_rank: got 0, expected at least 1"),
        ("epochs=.nan", "epochs: got nan, expected a positive number"),
        ("weight_decay=-1", "weight_decay: got -1.0, expected a number of at least 0"),
        ("warmup_ratio=-1", "warmup_ratio: got -1.0, expected at least 0 and less than 1"),
        ("lora_dropout=2", "lora_dropout: got 2.0, expected at least 0 and less than 1"),
        ("seed=-1", "seed: got -1, expected 0 to"),
        ("max_turns=1", "max_turns: got 1, expected at least 2"),
        ("lora_targets=[", "override 'lora_targets=[': the value is not valid YAML"),
    ],
)
def test_values_out_of_range_are_named(tmp_path, override, named):
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, "data: d\noutput_dir: o\n"), [override])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["tower=replace", "unknown_querier=none"], "unknown_querier: got 'none' with tower='replace'"),
        (["experts=per_querier", "unknown_querier=shared"], "unknown_querier: got 'shared' with experts="),
        (["max_turns=2", "windows=covering"], "windows: got 'covering' with max_turns"),
        (["epochs=0.5", "validation=0.1"], "epochs: got 0.5 with validation=0.1"),
    ],
)
def test_values_that_exclude_each_other_are_named(tmp_path, overrides, named):
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, "data: d\noutput_dir: o\n"), overrides)
    assert named in str(error.value)


def test_what_a_method_does_not_use_is_not_checked():
    config = TrainConfig("d", "o", method="ft", tower="replace", unknown_querier="none")
    assert config.qar_config(("a", "b"), num_clusters=5, first_expert_layer=3).num_clusters == 0


def test_every_key_is_documented():
    names = re.findall(r"^ {8}(\w+(?:, \w+)*): ", TrainConfig.__doc__, re.MULTILINE)
    documented = [name for group in names for name in group.split(", ")]
    assert sorted(documented) == sorted(field.name for field in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_counts_on_the_command_line(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"got {text}, expected a whole number"):
        positive_int(text)
    assert positive_int("12") == 12


@pytest.mark.parametrize(
    ("module", "option"), [(build, "--min-turns"), (build, "--clusters"), (show, "--sample")]
)
def test_counts_of_the_data_tools(module, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool", option, "-5"])
    with pytest.raises(SystemExit):
        module.main()
    assert f"{option}: got -5, expected a whole number" in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_an_option(monkeypatch):
    line = ["finetune", "--config", "any.yaml", "data=d", "--resume", "epochs=3"]
    monkeypatch.setattr(sys, "argv", line)
    started = {}
    monkeypatch.setattr(finetune, "load_config", lambda path, overrides: overrides)
    monkeypatch.setattr(finetune, "finetune", lambda config, resume: started.update({resume: config}))
    finetune.main()
    assert started == {True: ["data=d", "epochs=3"]}


def test_missing_file_and_bad_override(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="override 'epochs': expected key=value"):
        load_config(write(tmp_path, "data: d\noutput_dir: o\n"), ["epochs"])


def test_a_file_extends_another(tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 3\nbatch_size: 4\nstyle: qwen\n")
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nbatch_size: 2\n")
    path = write(tmp_path, "extends: middle.yaml\ndata: d\noutput_dir: o\nstyle: llama3\n")
    config = load_config(path, ["epochs=5"])
    assert (config.epochs, config.batch_size, config.style) == (5, 2, "llama3")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("extends: absent.yaml\n", "absent.yaml: cannot be read"),
        ("extends: run.yaml\n", "extends itself"),
        ("extends: [a]\n", "key 'extends': got ['a'], expected the path"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path, text, named):
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text))
    assert named in str(error.value)


def test_every_shipped_config_is_valid(request):
    """An experiment has a loader of its own; a recipe's base is loaded by those that extend it."""
    configs = request.config.rootpath / "train" / "configs"
    experiments = sorted((configs / "experiments").glob("*.yaml"))
    bases = {configs / "mqdialog" / f"{name}.yaml" for name in ("base", "llama3", "qwen")}
    found = [*configs.glob("*.yaml"), *set(configs.glob("mqdialog/*.yaml")) - bases]
    assert len(found) >= 15 and experiments
    for path in found:
        assert isinstance(load_config(path), TrainConfig)
    for path in experiments:
        assert load_experiment(path).cells()
