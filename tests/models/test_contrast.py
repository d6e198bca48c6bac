"""The contrastive loss against the paper's formulas as plain loops in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import aware_model, qar_config, training_batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from qar_models.contrast import QuerierContrast

HIDDEN, CLUSTERS, QUERIERS, SLOTS, WIDTH, TEMPERATURE = 12, 3, 4, 3, 6, 0.1


def new_contrast(slots=SLOTS, device="cpu", seed=0):
    config = qar_config(
        num_queriers=QUERIERS,
        num_clusters=CLUSTERS,
        memory_size=slots,
        projection_dim=WIDTH,
        temperature=TEMPERATURE,
    )
    contrast = QuerierContrast(config, HIDDEN, nn.RMSNorm(HIDDEN, device=device))
    if device == "cpu":
        torch.manual_seed(seed)
        contrast.reset_parameters(0.5)
    return contrast.train()


def random_batch(size, generator):
    return {
        "querier_states": torch.randn(size, 7, HIDDEN, generator=generator),
        "response_mask": torch.rand(size, 7, generator=generator) < 0.6,
        "querier_ids": torch.randint(-1, QUERIERS, (size,), generator=generator),
        "cluster_ids": torch.randint(0, CLUSTERS, (size,), generator=generator),
    }


class PlainContrast:
    """One Python list of past projections per view, cluster and querier."""

    def __init__(self, contrast, slots=SLOTS):
        self.contrast, self.slots = contrast, slots
        self.past = {}

    def step(self, querier_states, response_mask, querier_ids, cluster_ids):
        losses, new = [], []
        for states, mask, querier, cluster in zip(
            querier_states.double(), response_mask, querier_ids.tolist(), cluster_ids.tolist(), strict=True
        ):
            if querier < 0 or not mask.any():
                continue
            pooled = self.contrast.norm_role_proj.double()(states)[mask].mean(0)
            views = [
                self.contrast.head_weight.double()[view, cluster] @ pooled
                + self.contrast.head_bias.double()[view, cluster]
                for view in (0, 1)
            ]
            new.append((cluster, querier, views))
            if (cluster, querier) in self.past:
                losses += [self.cross_entropy(views[view], 1 - view, cluster, querier) for view in (0, 1)]
        for cluster, querier, views in new:
            # the memory is float32 whatever the model's dtype
            entry = [view.detach().float().double() for view in views]
            self.past[cluster, querier] = [*self.past.get((cluster, querier), []), entry][-self.slots :]
        loss = sum(losses) / len(losses) if losses else torch.tensor(0.0)
        return loss.clamp(0, 10) if losses else loss

    def cross_entropy(self, view, other, cluster, querier):
        scores = {}
        for candidate in range(QUERIERS):
            entries = self.past.get((cluster, candidate))
            if entries:
                prototype = sum(entry[other] for entry in entries) / len(entries)
                scores[candidate] = view @ prototype / view.norm() / prototype.norm() / TEMPERATURE
        total = torch.stack(list(scores.values())).logsumexp(0)
        return total - scores[querier]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_loss_and_gradients_over_several_steps(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    contrast, twin = new_contrast(seed=seed).double(), new_contrast(seed=seed).double()
    plain = PlainContrast(twin)
    for size in sizes:
        batch = random_batch(size, generator)
        batch["response_mask"][0, 0] = True
        states = [batch["querier_states"].double().requires_grad_() for _ in range(2)]
        got = contrast(**{**batch, "querier_states": states[0]})
        expected = plain.step(**{**batch, "querier_states": states[1]})
        torch.testing.assert_close(got.detach(), expected.detach().double(), rtol=1e-6, atol=1e-7)
        if expected.requires_grad:
            got.backward()
            expected.backward()
            torch.testing.assert_close(states[0].grad, states[1].grad, rtol=1e-5, atol=1e-7)
    for (cluster, querier), entries in plain.past.items():
        remembered = contrast.memory[:, cluster, querier].double()
        for view in (0, 1):
            expected = torch.stack([entry[view] for entry in entries])
            got = remembered[view, : len(entries)]
            torch.testing.assert_close(sort_rows(got), sort_rows(expected), rtol=0, atol=1e-12)
        total = remembered.sum(1)
        torch.testing.assert_close(contrast.totals[:, cluster, querier], total, rtol=0, atol=1e-12)


def sort_rows(rows):
    return rows[rows[:, 0].argsort()]


def fixed_batch(querier_ids, cluster=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch(len(querier_ids), generator)
    batch["response_mask"][:, 0] = True
    return {
        **batch,
        "querier_ids": torch.tensor(querier_ids),
        "cluster_ids": torch.full((len(querier_ids),), cluster),
    }


def test_the_ring_keeps_the_last_entries_in_order():
    contrast, stored = new_contrast(), []
    for step, count in enumerate((2, 5, 1)):
        batch = fixed_batch([1] * count, seed=step)
        views = contrast.eval()._project(pooled_states(contrast, batch), batch["cluster_ids"])
        contrast.train()(**batch)
        stored += list(views.detach().unbind(1))
    ring = contrast.memory[:, 0, 1]
    # entry n sits in slot n % K; 8 entries, K = 3: the last three are 5, 6, 7
    for entry in (5, 6, 7):
        torch.testing.assert_close(ring[:, entry % SLOTS], stored[entry])
    assert contrast.writes[0].tolist() == [0, 8, 0, 0]


def pooled_states(contrast, batch):
    normed = contrast.norm_role_proj(batch["querier_states"])
    mask = batch["response_mask"].unsqueeze(-1)
    return (normed * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_answer_is_averaged_in_bf16(packed):
    """Packed rows were summed, and counted, in bf16: 256 + 1 is 256 there."""
    torch.manual_seed(0)
    states, mask = 1 + torch.randn(2, 700, HIDDEN).bfloat16(), torch.ones(2, 700, dtype=torch.int64)
    ids = {"querier_ids": torch.tensor([0, 2]), "cluster_ids": torch.tensor([0, 1])}
    exact, rounded = new_contrast().bfloat16().float(), new_contrast().bfloat16()
    exact(states.float(), mask, **ids)
    if packed:
        bounds = torch.tensor([0, 700, 1400])
        rounded(states.view(1, 1400, -1), mask.view(1, -1), **ids, cu_seq_lens=bounds)
    else:
        rounded(states, mask, **ids)
    torch.testing.assert_close(rounded.totals, exact.totals, rtol=0.05, atol=0.05)


def test_a_first_batch_has_no_prototypes_and_no_loss():
    contrast, batch = new_contrast(), fixed_batch([0, 1])
    loss = contrast(**batch)
    loss.backward()
    assert loss == 0 and contrast.head_weight.grad.abs().sum() == 0
    assert contrast(**batch) > 0


def test_unknown_queriers_neither_score_nor_are_remembered():
    contrast = new_contrast()
    contrast(**fixed_batch([0, 1, 2]))
    before = contrast.memory.clone()
    assert contrast(**fixed_batch([-1, -1])) == 0
    assert torch.equal(contrast.memory, before)


def test_a_sequence_without_a_reply_neither_scores_nor_is_remembered():
    contrast = new_contrast()
    contrast(**fixed_batch([0, 1, 2]))
    batch, writes = fixed_batch([0, 1, 2], seed=1), contrast.writes.clone()
    batch["response_mask"][1] = False
    expected = contrast.eval()(**{name: tensor[[0, 2]] for name, tensor in batch.items()})
    torch.testing.assert_close(contrast(**batch), expected)
    contrast.train()(**batch)
    assert (contrast.writes - writes)[0].tolist() == [1, 0, 1, 0]


def test_evaluation_leaves_the_memory_alone():
    contrast, batch = new_contrast(), fixed_batch([0, 1, 2])
    contrast(**batch)
    before = {name: buffer.clone() for name, buffer in contrast.named_buffers()}
    assert contrast.eval()(**batch) > 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in contrast.named_buffers())


def test_the_loss_is_clipped():
    contrast = new_contrast()
    contrast.temperature = 1e-3
    batch = fixed_batch([0, 1])
    contrast(**batch)
    swapped = {**batch, "querier_ids": torch.tensor([1, 0])}
    assert contrast.eval()(**swapped) == contrast.train()(**swapped) == 10


def test_heads_train():
    contrast, batch = new_contrast(), fixed_batch([0, 1, 2, 3])
    contrast(**batch)
    first = contrast.eval()(**batch)
    optimizer = torch.optim.SGD(contrast.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        contrast(**batch).backward()
        optimizer.step()
    assert contrast(**batch) < first - 0.05


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_casting_the_model_rounds_neither_memory_nor_totals(cast):
    contrast = new_contrast()
    contrast(**fixed_batch([0, 1, 1]))
    before = {name: buffer.clone() for name, buffer in contrast.named_buffers()}
    cast(contrast)
    assert contrast.head_weight.element_size() == 2
    states = fixed_batch([0, 1]) | {"querier_states": torch.randn(2, 7, HIDDEN).to(contrast.head_weight)}
    assert contrast.eval()(**states).dtype == torch.float32  # in 16 bits logits would have two digits
    for name, buffer in contrast.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    moved = contrast.to("meta")
    assert moved.memory.device.type == "meta" and moved.memory.dtype == torch.float32
    assert contrast.to_empty(device="cpu").totals.dtype == torch.float64


def test_saved_and_resumed_training_is_equal(tmp_path):
    model = aware_model(num_clusters=2, memory_size=2, projection_dim=8).train()
    batch = training_batch()
    batch |= {"response_mask": batch["attention_mask"], "cluster_ids": torch.tensor([0, 1, 1])}
    model(**batch)
    model.save_pretrained(tmp_path)
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    for _ in range(3):
        loss = model(**batch).contrastive_loss
        assert loss > 0 and torch.equal(loss, resumed(**batch).contrastive_loss)
    for name, buffer in model.contrast.named_buffers():
        assert torch.equal(buffer, dict(resumed.contrast.named_buffers())[name])


def test_loading_in_another_dtype_keeps_the_memory_exact(tmp_path):
    model = aware_model(num_clusters=2, memory_size=2, projection_dim=8).train()
    batch = training_batch()
    model(**batch, response_mask=batch["attention_mask"], cluster_ids=torch.tensor([0, 1, 1]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.contrast.head_weight.dtype == torch.bfloat16
    for name, buffer in model.contrast.named_buffers():
        got = dict(loaded.contrast.named_buffers())[name]
        assert got.dtype == buffer.dtype and torch.equal(got, buffer)


def test_the_total_is_the_weighted_sum():
    model = aware_model(tower="replace", num_clusters=2, memory_size=2, projection_dim=8).train()
    batch = training_batch()
    batch |= {"response_mask": batch["attention_mask"], "cluster_ids": torch.tensor([0, 1, 1])}
    model(**batch)
    out = model(**batch)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.5 * out.contrastive_loss)
    # the loss reaches the experts through the specific tower's last state
    model.zero_grad()
    out.contrastive_loss.backward()
    assert model.model.layers[0].experts.down.grad[3].abs().sum() > 0
    assert model.model.norm.weight.grad is None


class LargestAllocation(TorchDispatchMode):
    """The largest storage that an operation makes anew."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_cost_does_not_depend_on_the_size_of_the_memory():
    largest = []
    for slots in (2, 1000):
        contrast, batch = new_contrast(slots), fixed_batch([0, 1, 1, -1])
        contrast(**batch)
        with LargestAllocation() as allocations:
            contrast(**batch).backward()
        largest.append(allocations.bytes)
    assert largest[0] == largest[1] < math.prod(contrast.memory.shape)


def test_no_sequence_has_a_copy_of_its_clusters_prototypes():
    contrast, size = new_contrast(), 64
    contrast(**fixed_batch([0, 1, 2, 3]))
    views = torch.randn(2, size, WIDTH, requires_grad=True)
    clusters = torch.zeros(size, dtype=torch.int64)
    with LargestAllocation() as allocations:
        contrast._loss(views, clusters, clusters, clusters == 0).backward()
    assert allocations.bytes < 4 * 2 * size * QUERIERS * WIDTH


def test_a_large_memory_is_counted_and_warned_of(caplog, monkeypatch):
    config = qar_config(num_queriers=1000, num_clusters=10, memory_size=512, projection_dim=512)
    contrast = QuerierContrast(config, HIDDEN, nn.RMSNorm(HIDDEN, device="meta"))
    held = contrast.memory.nbytes + contrast.totals.nbytes
    assert config.contrastive_memory_bytes == held > 20e9
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", logger="qar_models.contrast"):
        QuerierContrast(
            qar_config(num_queriers=999, num_clusters=10), HIDDEN, nn.RMSNorm(HIDDEN, device="meta")
        )
    assert "memory takes" in caplog.text and "smaller memory_size" in caplog.text


def test_no_value_is_read_back_from_the_device():
    # reading a value of a tensor without data raises
    contrast = new_contrast(device="meta")
    states = torch.empty(5, 7, HIDDEN, device="meta", requires_grad=True)
    ids = torch.zeros(5, dtype=torch.int64, device="meta")
    contrast(states, torch.ones(5, 7, device="meta"), ids, ids).backward()
    assert states.grad.shape == states.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_overflow_is_not_remembered(value):
    contrast = new_contrast()
    batch = fixed_batch([0, 1, 1, 2], cluster=0, seed=0)
    contrast(**batch)
    expected = {name: buffer.clone() for name, buffer in contrast.named_buffers()}
    contrast(**batch | {"querier_states": torch.full_like(batch["querier_states"], value)})
    assert all(torch.equal(buffer, expected[name]) for name, buffer in contrast.named_buffers())
    assert contrast(**batch).isfinite()
