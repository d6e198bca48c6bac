"""Queriers come and go, and nobody else's answer changes by a bit."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from tiny_models import (
    ASKING,
    NAMES,
    TOWERS,
    answers,
    aware_model,
    left_padded_batch,
    named_model,
    train,
    training_batch,
)
from transformers import AutoModelForCausalLM

from qar_models import remove_qar
from qar_models.experts import TrainedExperts


def assert_same_experts(got, expected):
    assert torch.equal(got, expected)


def test_names():
    model = named_model()
    assert model.queriers == {name: index for index, name in enumerate(NAMES)}
    assert aware_model().queriers == {}


def test_names_are_looked_up_in_one_table():
    model = named_model()
    assert model.qar.ids_by_name is model.qar.ids_by_name
    mine = model.queriers
    assert json.loads(json.dumps(mine)) == pickle.loads(pickle.dumps(mine)) == copy.deepcopy(mine) == mine
    mine["guest"] = -1
    assert "guest" not in model.queriers
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert json.loads(json.dumps(model.qar.to_dict()))["querier_names"] == list(NAMES)
    model.qar = dataclasses.replace(model.qar, querier_names=NAMES[::-1])
    assert list(model.queriers) == list(NAMES[::-1])
    assert all(list(other.queriers) == list(NAMES) for other in copies)


def test_naming_a_model_without_names():
    model = aware_model()
    with pytest.raises(ValueError, match="have no names yet"):
        model.add_queriers("Leonard")
    with pytest.raises(ValueError, match="got 2 names, expected 5"):
        model.name_queriers(("a", "b"))
    model.name_queriers(NAMES)
    assert model.queriers["Howard"] == 2


@pytest.mark.parametrize("settings", [{"init": "zero"}, {"init": "mean"}, {"like": "Howard"}], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
def test_adding_changes_nobody_elses_answer(tower, settings, tmp_path):
    model = named_model(tower=tower)
    before = answers(model)
    model.add_queriers(["Leonard", "Priya"], **settings)
    assert model.queriers["Leonard"] == 5 and model.queriers["Priya"] == 6
    assert torch.equal(answers(model), before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.queriers == model.queriers
    assert torch.equal(answers(loaded, ("Priya", "Amy", "小雪")), answers(model, ("Priya", "Amy", "小雪")))


def test_how_new_queriers_start():
    model = named_model()
    model.add_queriers("Zero")
    model.add_queriers("Mean", init="mean")
    model.add_queriers("Twin", like="Howard")
    experts = model.model.layers[1].experts
    assert experts.down[5].abs().sum() == 0 and experts.gate[5].abs().sum() > 0
    torch.testing.assert_close(experts.up[6], experts.up[:6].mean(0))
    assert torch.equal(experts.down[7], experts.down[2])
    batch = left_padded_batch()
    unknown = model(**batch, querier_ids=torch.tensor([-1, -1, -1])).logits
    torch.testing.assert_close(answers(model, ("Zero",) * 3), unknown)
    assert torch.equal(answers(model, ("Twin",) * 3), answers(model, ("Howard",) * 3))


@pytest.mark.parametrize(
    "change", [lambda model: model.add_queriers("Leonard"), lambda model: model.remove_queriers("Amy")]
)
def test_what_is_frozen_stays_frozen(change):
    model = named_model()
    for name in ("gate", "up"):
        getattr(model.model.layers[0].experts, name).requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    change(model)
    assert frozen == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("tower", TOWERS)
def test_removing_changes_nobody_elses_answer(tower):
    model = named_model(tower=tower)
    before = answers(model)
    model.remove_queriers(["Bernadette", "a/b"])
    assert model.queriers == {"Amy": 0, "Howard": 1, "小雪": 2}
    assert model.model.layers[0].experts.gate.shape[0] == model.config.qar["num_queriers"] == 3
    assert torch.equal(answers(model), before)
    with pytest.raises(ValueError, match="querier_ids: got 3"):
        model(**left_padded_batch(), querier_ids=torch.tensor([0, 1, 3]))


def contrastive_batch(model):
    batch = training_batch()
    return batch | {
        "response_mask": batch["attention_mask"],
        "cluster_ids": torch.tensor([0, 1, 1]),
        "querier_ids": torch.tensor([model.queriers[name] for name in ASKING]),
    }


def test_the_contrastive_memory_follows():
    model = named_model(num_clusters=2, projection_dim=8, memory_size=2).train()
    for _ in range(3):
        model(**contrastive_batch(model))
    contrast = model.contrast
    kept = contrast.memory[:, :, [0, 2, 3, 4]].clone()
    expected = model.eval()(**contrastive_batch(model)).contrastive_loss
    model.add_queriers("Leonard")
    model.remove_queriers("Bernadette")
    assert torch.equal(contrast.memory[:, :, :4], kept)
    assert contrast.memory[:, :, 4].abs().sum() == 0 and contrast.writes[:, 4].sum() == 0
    assert torch.equal(model(**contrastive_batch(model)).contrastive_loss, expected)
    model.train()(**contrastive_batch(model)).loss.backward()


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize(
    "change", [lambda m: m.add_queriers("Leonard"), lambda m: m.remove_queriers("Amy")], ids=["add", "remove"]
)
def test_a_change_that_memory_does_not_suffice_for_changes_nothing(change, count, monkeypatch):
    model = named_model(num_clusters=2, projection_dim=8, memory_size=2)
    before, qar, config = dict(model.state_dict()), model.qar, dict(model.config.qar)
    calls = []

    def fail(make):
        def scarce(*args):
            calls.append(args)
            if len(calls) == count:
                raise MemoryError("no memory")
            return make(*args)

        return scarce

    for name in ("index_select", "new_zeros"):
        monkeypatch.setattr(torch.Tensor, name, fail(getattr(torch.Tensor, name)))
    with pytest.raises(MemoryError, match="no memory"):
        change(model)
    monkeypatch.undo()
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert model.qar is qar and model.config.qar == config


def test_training_another_querier_for_which_memory_does_not_suffice(monkeypatch):
    model = named_model()
    model.train_only("Howard")
    train(model, 1)
    before = answers(model)
    made = []

    class Scarce(TrainedExperts):
        def __init__(self, *args):
            made.append(args)
            if len(made) == 2:
                raise MemoryError("no memory")
            super().__init__(*args)

    monkeypatch.setattr("qar_models.membership.TrainedExperts", Scarce)
    with pytest.raises(MemoryError, match="no memory"):
        model.train_only("Amy")
    assert torch.equal(answers(model), before)
    model.train_only(None)
    assert torch.equal(answers(model), before)


def test_adding_copies_every_expert_once(monkeypatch):
    model = named_model()
    monkeypatch.setattr(torch.Tensor, "index_select", None)
    model.add_queriers("Leonard")
    assert model.queriers["Leonard"] == 5


def test_shared_experts_still_have_queriers_to_contrast():
    model = named_model(experts="shared", num_clusters=2, projection_dim=8)
    model.add_queriers("Leonard")
    assert model.contrast.memory.shape[2] == model.qar.num_queriers == 6
    assert model.model.layers[0].experts.gate.shape[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.add_queriers("Amy"), r"names: got \['Amy'\], expected new names"),
        (
            lambda m: m.add_queriers(["Leonard", "Leonard"]),
            r"names: got \['Leonard'\], expected new",
        ),
        (lambda m: m.add_queriers([]), r"names: got \[\]"),
        (lambda m: m.add_queriers(["Leonard", ""]), "querier_names: got an empty name"),
        (lambda m: m.add_queriers(" \n"), "querier_names: got an empty name"),
        (lambda m: m.add_queriers(["Leonard", 7]), "names: got 7, expected strings"),
        (lambda m: m.add_queriers([None]), "names: got None, expected strings"),
        (lambda m: m.add_queriers(None), "names: got None, expected strings"),
        (lambda m: m.remove_queriers(7), "names: got 7, expected strings"),
        (
            lambda m: m.add_queriers("Leonard", like="Stuart"),
            r"got \['Stuart'\], expected distinct names out of",
        ),
        (lambda m: m.add_queriers("Leonard", init="ones"), "init: got 'ones', expected 'zero' or 'mean'"),
        (lambda m: m.remove_queriers("Stuart"), r"got \['Stuart'\]"),
        (lambda m: m.remove_queriers(["Amy", "Amy"]), r"got \['Amy', 'Amy'\], expected distinct names"),
        (lambda m: m.remove_queriers(NAMES), "expected at least one to stay"),
        (lambda m: m.train_only("Stuart"), r"got \['Stuart'\]"),
        (lambda m: m.train_only([]), r"names: got \[\]"),
    ],
)
def test_mistaken_names_are_refused_and_change_nothing(change, message):
    model = named_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=message):
        change(model)
    assert model.queriers == {name: index for index, name in enumerate(NAMES)}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("experts", ["per_querier", "shared+per_querier"])
@pytest.mark.parametrize("tower", TOWERS)
def test_training_one_querier_leaves_everybody_else_alone(tower, experts):
    model = named_model(tower=tower, experts=experts)
    others = answers(model, ("Bernadette", "Amy", "小雪"))
    howard = answers(model, ("Howard",) * 3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train_only(["Howard"])
    assert torch.equal(answers(model, ("Howard",) * 3), howard)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    during = answers(model, ("Howard", "Amy", "小雪"))
    assert model.state_dict().keys() == state.keys()
    model.train_only(None)
    assert_same_experts(answers(model, ("Howard", "Amy", "小雪")), during)
    assert torch.equal(answers(model, ("Bernadette", "Amy", "小雪")), others)
    for name, tensor in model.state_dict().items():
        same = tensor == state[name]
        if name.endswith((".experts.gate", ".experts.up", ".experts.down")):
            assert same.flatten(1).all(1).tolist() == [True, True, False, True, True]
        else:
            assert same.all()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_others_in_the_batch_get_no_gradient():
    model = named_model(unknown_querier="mean")
    model.train_only(["小雪", "Howard"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"model.layers.{i}.experts.trained.{n}" for i in (0, 1) for n in ("gate", "up", "down")
    }
    batch = training_batch() | {"querier_ids": torch.tensor([0, 2, -1])}
    model(**batch).loss.backward()
    grad = model.model.layers[0].experts.trained.down.grad
    assert (grad.flatten(1).abs().sum(1) > 0).tolist() == [False, True]


def test_unknown_queriers_while_one_trains():
    model = named_model(unknown_querier="mean")
    batch, ids = left_padded_batch(), torch.tensor([2, -1, 0])
    before = model(**batch, querier_ids=ids).logits
    model.train_only("Howard")
    assert torch.equal(model(**batch, querier_ids=ids).logits, before)


def test_the_mean_follows_who_trains():
    model = named_model(unknown_querier="mean")
    batch, ids = left_padded_batch(), torch.tensor([-1, -1, -1])
    model.train_only("Howard")
    for layer in model.model.layers:
        layer.experts.trained.down.data.add_(1.0)
    meanwhile = model(**batch, querier_ids=ids).logits
    model.train_only(None)
    torch.testing.assert_close(model(**batch, querier_ids=ids).logits, meanwhile)


def test_a_checkpoint_while_one_trains_is_an_ordinary_one(tmp_path):
    model = named_model()
    model.train_only("Howard")
    train(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_experts(answers(loaded), answers(model))
    fresh = named_model()
    fresh.train_only("Howard")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(answers(fresh), answers(model))


def test_train_only_switches_and_restores_what_was_frozen():
    model = named_model()
    model.model.embed_tokens.requires_grad_(False)
    model.train_only("Howard")
    train(model, 1)
    howard = answers(model, ("Howard",) * 3)
    model.train_only("Amy")
    assert torch.equal(answers(model, ("Howard",) * 3), howard)
    with pytest.raises(ValueError, match="end it with train_only"):
        model.add_queriers("Leonard")
    model.train_only(None)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


def test_train_only_with_gradient_checkpointing():
    model = named_model().train()
    model.train_only("Howard")
    batch, grads = training_batch() | {"querier_ids": torch.tensor([2, 0, 2])}, []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        grads.append([layer.experts.trained.gate.grad.clone() for layer in model.model.layers])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*grads, strict=True))
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_remove_qar_ends_it():
    model = named_model()
    model.train_only("Howard")
    assert all(parameter.requires_grad for parameter in remove_qar(model).parameters())


def test_train_only_through_an_adapter():
    model = get_peft_model(named_model(), LoraConfig(r=2, target_modules=["gate_proj"]))
    model.train_only("Howard")
    assert all(".experts.trained." in name for name, p in model.named_parameters() if p.requires_grad)
    train(model, 1)
    model.train_only(None)
    assert any("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_shared_experts_belong_to_nobody(tmp_path):
    model = named_model(experts="shared")
    for call in (lambda: model.train_only("Amy"), lambda: model.save_experts(tmp_path)):
        with pytest.raises(ValueError, match="no querier has an expert of their own"):
            call()


def test_errors_name_only_the_first_of_many(tmp_path):
    many = [f"querier {index}" for index in range(50)]
    model = aware_model(num_queriers=50, querier_names=many, expert_rank=1)
    model.save_experts(tmp_path)
    for call in (
        lambda: model.remove_queriers("Stuart"),
        lambda: model.load_experts(tmp_path, "Stuart"),
        lambda: model.add_queriers(many),
        lambda: model.name_queriers([*many[:-1], 7]),
    ):
        with pytest.raises((TypeError, ValueError), match=r"and 40 more") as caught:
            call()
        assert str(caught.value).count("querier ") <= 10


def test_offloaded_weights_are_refused_before_any_work(tmp_path):
    named_model().save_experts(tmp_path / "saved")
    model = cpu_offload(named_model(), execution_device=torch.device("cpu"))
    expected = answers(model)
    for call in (
        lambda: model.add_queriers("Leonard"),
        lambda: model.remove_queriers("Amy"),
        lambda: model.train_only("Amy"),
        lambda: model.save_experts(tmp_path / "new"),
        lambda: model.load_experts(tmp_path / "saved"),
    ):
        with pytest.raises(
            ValueError, match=r"model: got offloaded .* weights, expected all of them on a device"
        ):
            call()
    assert torch.equal(answers(model), expected) and not (tmp_path / "new").exists()


def test_one_name_is_not_its_letters():
    with pytest.raises(TypeError, match="names: got 'ABCDE', expected a sequence of names"):
        aware_model().name_queriers("ABCDE")
