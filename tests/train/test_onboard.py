import dataclasses
from pathlib import Path

import pytest
import torch
from recast import answered_by
from safetensors.torch import load_file

from train.data.mqdialog import write_mqdialog
from train.errors import UserError
from train.finetune import finetune
from train.heldout import held_out_windows
from train.onboard import onboard
from train.setup import make_trainer
from train.trained import EXPERTS, load_trained

NEWCOMER = "Newcomer"


def _with_newcomer(tiny_data):
    """The second querier's dialogues, under a new name."""
    renamed = {
        split: [
            dataclasses.replace(
                example,
                querier=NEWCOMER,
                querier_id=0,
                turns=tuple(dataclasses.replace(t, speaker=NEWCOMER) if t.speaker == example.querier else t
                            for t in example.turns),
            )
            for example in getattr(tiny_data, split)
            if example.querier_id == 1
        ]
        for split in ("train", "dev")
    }  # fmt: skip
    return dataclasses.replace(tiny_data, queriers=[NEWCOMER], **renamed)


def test_newcomer_learns_and_nobody_else_changes(config, tiny_data, tmp_path):
    source = finetune(config)
    data = _with_newcomer(tiny_data)
    write_mqdialog(data, tmp_path / "new", "planted")
    extended = load_trained(onboard(source, tmp_path / "new", NEWCOMER, tmp_path / "extended", epochs=8))
    before = load_trained(source)
    assert extended.queriers == (*before.queriers, NEWCOMER)

    ids = torch.arange(12).repeat(3, 1)
    known = torch.tensor([0, 1, 2])
    assert torch.equal(
        extended.model(ids, querier_ids=known).logits, before.model(ids, querier_ids=known).logits
    )

    untaught = load_trained(source)
    untaught.model.add_queriers(NEWCOMER, init="mean")
    held_out = held_out_windows(config.replace(trainable_layers=None), data)
    asked_by = [3] * len(data.dev)
    taught, mean = (
        sum(nll for nll, _ in held_out.nll(model, asked_by)) for model in (extended.model, untaught.model)
    )
    assert taught < mean


def test_a_run_whose_queriers_share_an_expert(config, tiny_data, tmp_path):
    first, second, third = tiny_data.queriers
    source = finetune(config.replace(epochs=1, share_experts={second: first}))
    trained = load_trained(source)
    assert trained.model.qar.querier_experts == (0, 0, 1)
    ids = torch.arange(12).repeat(3, 1)
    logits = trained.model(ids, querier_ids=torch.tensor([0, 1, 2])).logits
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    write_mqdialog(_with_newcomer(tiny_data), tmp_path / "new", "planted")
    extended = load_trained(onboard(source, tmp_path / "new", NEWCOMER, tmp_path / "extended", epochs=1))
    assert extended.queriers == (first, second, third, NEWCOMER)
    assert extended.model.qar.querier_experts == (0, 0, 1, 2)
    assert torch.equal(extended.model(ids, querier_ids=torch.tensor([0, 1, 2])).logits, logits)


def test_a_newcomer_learns_as_long_and_as_fast_as_asked(config, tiny_data, tmp_path, monkeypatch):
    source, settings = finetune(config.replace(epochs=0.2)), []
    write_mqdialog(_with_newcomer(tiny_data), tmp_path / "new", "planted")

    def trainer(model, tokenizer, windows, config, **options):
        settings.append((config.epochs, config.expert_learning_rate))
        return make_trainer(model, tokenizer, windows, config, **options)

    monkeypatch.setattr("train.onboard.make_trainer", trainer)
    onboard(source, tmp_path / "new", NEWCOMER, tmp_path / "out", epochs=0.5, learning_rate=0.125)
    assert settings == [(0.5, 0.125)]


def test_experts_of_others_are_not_rounded_to_the_dtype_of_the_base(config, tiny_data, tmp_path):
    source = finetune(config.replace(dtype="bfloat16", epochs=1))
    write_mqdialog(_with_newcomer(tiny_data), tmp_path / "new", "planted")
    before, after = (
        load_file(folder / EXPERTS)
        for folder in (source, onboard(source, tmp_path / "new", NEWCOMER, tmp_path / "out", epochs=0.5))
    )
    banks = [name for name in before if name.endswith((".gate", ".up", ".down"))]
    assert banks and all(torch.equal(after[name][:3], before[name]) for name in banks)


def test_refusals_name_what_is_wrong(config, tiny_data, tmp_path):
    source = finetune(config)
    with pytest.raises(UserError, match="trained: is a trained model already; --force replaces it"):
        onboard(source, tmp_path / "data", "Ghost", source)
    known = tiny_data.queriers[0]
    with pytest.raises(UserError, match=f"querier '{known}' is known"):
        onboard(source, tmp_path / "data", known, tmp_path / "out")
    with pytest.raises(UserError, match="no training window of querier 'Ghost'"):
        onboard(source, tmp_path / "data", "Ghost", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for place, message in (("link", "holds no trained model"), ("/proc/out", "/proc takes no files")):
        with pytest.raises(UserError, match=message):
            onboard(source, tmp_path / "data", NEWCOMER, tmp_path / place)


@pytest.mark.parametrize("changes", [{"method": "ft"}, {"experts": "shared"}], ids=str)
def test_models_without_experts_of_ones_own_are_refused(config, tmp_path, changes):
    source = finetune(config.replace(epochs=0.2, **changes))
    expected = "got method=.*experts=.*, expected a model whose queriers have experts of their own"
    with pytest.raises(UserError, match=expected):
        onboard(source, tmp_path / "data", NEWCOMER, tmp_path / "out")


def test_newcomers_clusters_are_not_those_of_the_contrastive_loss(config, tiny_data, tmp_path):
    """The newcomer's folder has a clustering of its own, with ids that mean nothing to the model."""
    source = finetune(config.replace(epochs=0.2, contrastive_weight=1.0, memory_size=4, projection_dim=8))
    data = _with_newcomer(tiny_data)
    clusters = tiny_data.num_clusters + 3
    moved = [dataclasses.replace(example, cluster_id=clusters - 1) for example in data.train]
    write_mqdialog(dataclasses.replace(data, num_clusters=clusters, train=moved), tmp_path / "new", "planted")
    extended = load_trained(onboard(source, tmp_path / "new", NEWCOMER, tmp_path / "out", epochs=0.5))
    before, after = (model.contrast.state_dict() for model in (load_trained(source).model, extended.model))
    assert torch.equal(after["writes"][:, :3], before["writes"]) and not after["writes"][:, 3].any()
    assert torch.equal(after["memory"][:, :, :3], before["memory"])


def test_newcomer_to_several_responders_is_a_pair(config, tiny_data, tmp_path):
    write_mqdialog(tiny_data, tmp_path / "both" / "one", "planted")
    other = answered_by(tiny_data, "Amy")
    write_mqdialog(other, tmp_path / "both" / "two", "planted")
    source = finetune(config.replace(data=str(tmp_path / "both"), epochs=0.2))
    write_mqdialog(_with_newcomer(other), tmp_path / "new", "planted")
    extended = load_trained(onboard(source, tmp_path / "new", NEWCOMER, tmp_path / "out", epochs=0.5))
    assert extended.queriers[-1] == f"{NEWCOMER} > Amy"
    with pytest.raises(UserError, match="the responder is Zed, expected Amy or "):
        write_mqdialog(_with_newcomer(answered_by(other, "Zed")), tmp_path / "zed", "planted")
        onboard(source, tmp_path / "zed", NEWCOMER, tmp_path / "other")


def test_prompts_with_dialogues_of_others_are_refused(config, tiny_data, tmp_path, monkeypatch):
    source = load_trained(finetune(config))
    told = dataclasses.replace(source, config=source.config.replace(context="few_shot"))
    monkeypatch.setattr("train.onboard.load_trained", lambda *_: told)
    write_mqdialog(_with_newcomer(tiny_data), tmp_path / "new", "planted")
    with pytest.raises(UserError, match="got context=few_shot"):
        onboard(Path(config.output_dir) / "trained", tmp_path / "new", NEWCOMER, tmp_path / "out")
    assert not (tmp_path / "out").exists()
