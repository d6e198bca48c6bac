"""The language model loss, its gradients, and what trains."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TOWERS, aware_model, plain_model, training_batch


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, batch, **settings):
    model.zero_grad()
    model(**batch, **settings).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("tower", TOWERS)
def test_loss_is_the_mean_over_labelled_tokens(tower):
    model, batch = aware_model(tower=tower), training_batch()
    out = model(**batch)
    labels = batch["labels"][:, 1:]
    expected = F.cross_entropy(out.logits[:, :-1][labels != -100], labels[labels != -100])
    torch.testing.assert_close(out.loss, expected)
    assert torch.equal(out.lm_loss, out.loss) and out.contrastive_loss is None
    out.loss.mul_(2)  # as trainers scale it
    torch.testing.assert_close(out.lm_loss, expected)


def test_loss_equals_the_base_class():
    base, batch = plain_model(), training_batch()
    querier_ids = batch.pop("querier_ids")
    expected = base(**batch).loss, base(**batch, num_items_in_batch=torch.tensor(50)).loss
    model = aware_model(base=base, experts="per_querier")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.experts.down)
    torch.testing.assert_close(model(**batch, querier_ids=querier_ids).loss, expected[0])
    shared = model(**batch, querier_ids=querier_ids, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(shared, expected[1])


@pytest.mark.parametrize("num_items", [None, 50])
@pytest.mark.parametrize("tower", TOWERS)
def test_skipping_logits_changes_neither_loss_nor_gradients(tower, num_items):
    model, batch = aware_model(tower=tower), training_batch()
    full = model(**batch, num_items_in_batch=num_items)
    short = model(**batch, num_items_in_batch=num_items, skip_logits=True)
    assert short.logits is None
    torch.testing.assert_close(short.loss, full.loss)
    expected = backward(model, batch, num_items_in_batch=num_items)
    got = backward(model, batch, num_items_in_batch=num_items, skip_logits=True)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_a_head_of_the_familys_own_is_in_the_logits_and_in_both_ways_to_the_loss(monkeypatch):
    model, batch = aware_model(), training_batch()
    plain = model(**batch).logits

    def capped(self, states):
        return 3 * torch.tanh(self.lm_head(states) / 3)

    monkeypatch.setattr(type(model), "compute_logits", capped)
    out = model(**batch)
    torch.testing.assert_close(out.logits, 3 * torch.tanh(plain / 3))
    labels = batch["labels"][:, 1:]
    expected = F.cross_entropy(out.logits[:, :-1][labels != -100], labels[labels != -100])
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(**batch, skip_logits=True).loss, expected)


def test_micro_batches_with_num_items_sum_to_the_whole_batch():
    model = aware_model(num_clusters=2, projection_dim=8, memory_size=2)
    batch = training_batch()
    batch |= {"cluster_ids": torch.tensor([0, 1, 1]), "response_mask": batch["attention_mask"]}
    items = (batch["labels"][:, 1:] != -100).sum()
    parts = [
        model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}, num_items_in_batch=items)
        for row in range(3)
    ]
    whole = model(**batch)
    torch.testing.assert_close(sum(part.lm_loss for part in parts), whole.lm_loss)


def test_labels_of_32_bits():
    model, batch = aware_model(), training_batch()
    narrow = {**batch, "labels": batch["labels"].int()}
    assert torch.equal(model(**narrow).loss, model(**batch).loss)


def test_querier_ids_may_be_a_list_with_the_contrastive_loss():
    model, batch = aware_model(num_clusters=2, memory_size=2, projection_dim=8), training_batch()
    batch |= {"response_mask": batch["attention_mask"], "cluster_ids": torch.tensor([0, 1, 1])}
    expected = model.eval()(**batch).loss
    assert torch.equal(model(**batch | {"querier_ids": batch["querier_ids"].tolist()}).loss, expected)


def test_no_labelled_token_gives_zero_and_no_nan():
    model, batch = aware_model(), training_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for settings in ({}, {"skip_logits": True}):
        grads = backward(model, batch, **settings)
        assert model(**batch, **settings).loss == 0
        assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
def test_gradient_checkpointing_gives_equal_gradients(tower, use_reentrant):
    model, batch = aware_model(tower=tower).train(), training_batch()
    expected = backward(model, batch, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = backward(model, batch, use_cache=False)
    assert got.keys() == expected.keys()
    assert all(torch.equal(grad, expected[name]) for name, grad in got.items())


@pytest.mark.parametrize("tower", TOWERS)
def test_only_the_experts_present_get_gradients(tower):
    model, batch = aware_model(tower=tower), training_batch()
    grads = backward(model, batch)
    for name in ("gate", "up", "down"):
        grad = grads[f"model.layers.0.experts.{name}"]
        present = grad.flatten(1).abs().sum(1) > 0
        assert present.tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("tower", TOWERS)
def test_an_experts_gradient_does_not_depend_on_who_shares_the_batch(tower):
    model, batch = aware_model(tower=tower), training_batch()
    batch["labels"][1:] = -100
    one = backward(model, batch | {"querier_ids": torch.tensor([3, 0, 0])})
    other = backward(model, batch | {"querier_ids": torch.tensor([3, 1, 4])})
    for name in ("gate", "up", "down"):
        key = f"model.layers.0.experts.{name}"
        torch.testing.assert_close(one[key][3], other[key][3])
        assert one[key][3].abs().sum() > 0
