"""Several queriers may share an expert, and stay different people to everything else."""

import dataclasses

import pytest
import torch
from tiny_models import NAMES, TOWERS, answers, left_padded_batch, named_model, qar_config, train
from transformers import AutoModelForCausalLM

SHARING = (0, 1, 0, 2, 1)  # the first and the third share, and so do the second and the fifth
FIRST, SECOND, THIRD, FOURTH, FIFTH = NAMES
EVERYBODY = torch.arange(5)


def sharing_model(**settings):
    return named_model(querier_experts=SHARING, **settings)


def with_own_copies(model):
    """The same model, but that everybody has a copy of their expert."""
    own = named_model(tower=model.qar.tower)
    state = model.state_dict()
    for name in own.state_dict():
        if name.endswith((".experts.gate", ".experts.up", ".experts.down")):
            state[name] = state[name][list(SHARING)]
    own.load_state_dict(state)
    return own


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"querier_experts": (0, 1)}, ValueError, r"querier_experts: got \[0, 1\], expected 5 numbers"),
        ({"querier_experts": (0, 1, 3, 0, 0)}, ValueError, "from 0 on and none left out"),
        ({"querier_experts": (0, 1, -1, 0, 0)}, ValueError, "from 0 on and none left out"),
        ({"querier_experts": (0, 1.0, 0, 0, 0)}, TypeError, "expected integers"),
        ({"querier_experts": (0,) * 5, "experts": "shared"}, ValueError, "where all queriers share one"),
    ],
)
def test_bad_maps(settings, error, message):
    with pytest.raises(error, match=message):
        qar_config(**settings)


def test_an_expert_each_is_no_map():
    assert qar_config(querier_experts=[0, 1, 2, 3, 4]) == qar_config()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
def test_answers_and_gradients_are_those_of_equal_experts(tower, compiled):
    torch._dynamo.reset()
    model = sharing_model(tower=tower)
    own, batch = with_own_copies(model), left_padded_batch(batch_size=5)
    assert model.model.layers[0].experts.gate.shape[0] == 3
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for asked in (run, own):
        logits = asked(**batch, querier_ids=EVERYBODY, use_cache=False).logits
        logits.square().mean().backward()
    torch.testing.assert_close(
        run(**batch, querier_ids=EVERYBODY, use_cache=False).logits,
        own(**batch, querier_ids=EVERYBODY, use_cache=False).logits,
    )
    got, copies = (each.model.layers[1].experts.up.grad for each in (model, own))
    summed = torch.zeros_like(got).index_add_(0, torch.tensor(SHARING), copies)
    torch.testing.assert_close(got, summed)


def test_unknown_queriers_have_no_expert():
    model, batch = sharing_model(), left_padded_batch()
    unknown = model(**batch, querier_ids=torch.tensor([-1, -1, -1])).logits
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.experts.down)
    torch.testing.assert_close(model(**batch, querier_ids=torch.tensor([0, 1, 4])).logits, unknown)


def test_they_are_different_people_to_the_contrastive_loss():
    model = sharing_model(num_clusters=2, projection_dim=8, memory_size=2)
    assert model.contrast.totals.shape[2] == 5


def test_saved_and_loaded(tmp_path):
    model = sharing_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.qar == model.qar and loaded.qar.querier_experts == SHARING
    assert torch.equal(answers(loaded), answers(model))


def test_joining_and_leaving_an_expert():
    model = sharing_model()
    before = answers(model, (FIRST, SECOND, FIFTH))
    model.add_queriers(["Leonard", "Priya"], share=THIRD)
    model.add_queriers("Penny")
    assert model.qar.querier_experts == (*SHARING, 0, 0, 3)
    assert torch.equal(answers(model, (FIRST, SECOND, FIFTH)), before)
    assert torch.equal(answers(model, ("Leonard",) * 3), answers(model, (FIRST,) * 3))
    model.remove_queriers([FIRST, THIRD])  # two who share the expert stay
    model.remove_queriers(FOURTH)  # nobody has this one any more
    assert model.qar.querier_experts == (1, 1, 0, 0, 2)
    assert torch.equal(answers(model, ("Priya", SECOND, FIFTH)), before)
    model.remove_queriers([FIFTH, "Priya", "Leonard"])
    assert model.qar.querier_experts is None and list(model.queriers) == [SECOND, "Penny"]
    with pytest.raises(ValueError, match="no querier has an expert of their own"):
        named_model(experts="shared").add_queriers("Leonard", share=FIRST)


def test_training_one_trains_the_expert_that_they_share():
    model = sharing_model()
    before = answers(model, (FIRST, THIRD, FOURTH))
    model.train_only([FIRST, THIRD])
    assert model.model.layers[0].experts.trained.gate.shape[0] == 1
    train(model, asking=(FIRST, THIRD, FIRST))
    model.train_only(None)
    after = answers(model, (FIRST, THIRD, FOURTH))
    assert torch.equal(after[2], before[2])
    assert not torch.allclose(after[0], before[0]) and not torch.allclose(after[1], before[1])


def test_experts_on_disk(tmp_path):
    model, other = sharing_model(), sharing_model()
    expected = answers(model)
    model.save_experts(tmp_path / "all")
    assert len(list((tmp_path / "all").glob("*.safetensors"))) == 3
    for layer in other.model.layers:
        torch.nn.init.normal_(layer.experts.down)
    own = with_own_copies(other)
    own.save_experts(tmp_path / "own")
    for queriers in ([FIRST], [FIRST, FOURTH]):
        with pytest.raises(ValueError, match="they share an expert"):
            other.load_experts(tmp_path / "all", queriers)
    other.load_experts(tmp_path / "all")
    assert torch.equal(answers(other), expected)
    own.train_only(FIRST)
    train(own, asking=(FIRST,) * 3)
    own.save_experts(tmp_path / "own")
    with pytest.raises(ValueError, match="they share an expert"):
        other.load_experts(tmp_path / "own")
    assert torch.equal(answers(other), expected)


def test_another_map_takes_effect_at_once():
    model = sharing_model()
    expected = answers(model, (SECOND,) * 3)
    model.qar = dataclasses.replace(model.qar, querier_experts=(1, 1, 0, 2, 1))
    assert torch.equal(answers(model, (FIRST,) * 3), expected)
