"""Row-sparse expert gradients: the present queriers' rows, and nobody else's, are ever touched."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import QUERIERS, TOWERS, aware_model, batch_of, plain_model, qar_config
from transformers import AutoModelForCausalLM

from benchmarks.owned import training_step, written_bytes
from qar_models import RowSparseAdamW, clip_grad_norm_, sparse_parameters

BANK = (".experts.gate", ".experts.up", ".experts.down")


def pair(**settings):
    """The same model with dense and with sparse expert gradients."""
    return [aware_model(expert_gradients=layout, **settings).train() for layout in ("dense", "sparse")]


def gradients(model, batch, **options):
    model.zero_grad()
    model(**batch, use_cache=False, **options).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("experts", ["per_querier", "shared+per_querier"])
@pytest.mark.parametrize("tower", TOWERS)
def test_gradients_are_the_dense_ones(tower, experts):
    dense, sparse = pair(tower=tower, experts=experts)
    batch = batch_of(3, 0, 3)
    expected, got = gradients(dense, batch), gradients(sparse, batch)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert gradient.is_sparse == name.endswith(BANK)
        if gradient.is_sparse:
            assert gradient._indices().tolist() == [[0, 3]]
            assert gradient._values().shape[0] == 2
            gradient = gradient.to_dense()
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("policy", ["none", "mean"])
@pytest.mark.parametrize("frozen", BANK)
def test_weights_that_are_frozen_one_by_one(frozen, policy):
    model = aware_model(expert_gradients="sparse", unknown_querier=policy).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    found = gradients(model, batch_of(3, -1, 0))
    sparse = {name for name, gradient in found.items() if gradient.is_sparse}
    assert sparse == set(sparse_parameters(model)) == {name for name in found if name.endswith(BANK)}
    assert len(sparse) == 4


def test_unknown_queriers():
    for policy in ("none", "mean"):
        dense, sparse = pair(unknown_querier=policy)
        batch = batch_of(-1, 2, -1)
        with torch.no_grad():
            assert torch.equal(sparse(**batch).loss, dense(**batch).loss)
        assert gradients(sparse, batch)["model.layers.0.experts.up"]._indices().tolist() == [[2]]
        nobody = gradients(sparse, batch_of(-1, -1, -1))
        assert all(g._values().shape[0] == 0 for name, g in nobody.items() if name.endswith(BANK))


def train(model, optimizer, asking):
    for step, queriers in enumerate(asking):
        optimizer.zero_grad()
        model(**batch_of(*queriers, seed=step), use_cache=False).loss.backward()
        optimizer.step()


def test_a_step_writes_as_much_however_many_are_owned():
    shape = {"present": 8, "rows_each": 2, "hidden": 32, "rank": 8}
    few, many = (written_bytes(training_step(owned, layout="sparse", **shape)) for owned in (8, 400))
    assert many < 1.02 * few
    dense = written_bytes(training_step(400, layout="dense", **shape))
    assert dense > 10 * many


SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.mark.parametrize("tower", TOWERS)
def test_everybody_present_is_adamw(tower):
    dense, sparse = pair(tower=tower, num_queriers=3)
    asking = [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)]
    for options in ({"fused": True}, {"foreach": True}, {"fused": False}):
        train(dense, torch.optim.AdamW(dense.parameters(), **SETTINGS, **options), asking)
        train(sparse, RowSparseAdamW(sparse.parameters(), **SETTINGS, **options), asking)
        for (name, expected), got in zip(dense.named_parameters(), sparse.parameters(), strict=True):
            assert torch.equal(got, expected), (name, options)


def test_the_absent_are_untouched_to_the_bit():
    _, model = pair()
    optimizer = RowSparseAdamW(model.parameters(), **SETTINGS)
    train(model, optimizer, [(0, 1, 3), (3, 3, 1)])
    bank = sparse_parameters(model)
    assert set(bank) == {name for name, _ in model.named_parameters() if name.endswith(BANK)}
    before = {
        n: (p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()})
        for n, p in bank.items()
    }
    train(model, optimizer, [(1, 4, 4)] * 3)
    for name, (weights, state) in before.items():
        now = {"weights": bank[name], **optimizer.state[bank[name]]}
        for what, old in {"weights": weights, **state}.items():
            assert torch.equal(now[what][[0, 2, 3]], old[[0, 2, 3]]), (name, what)
            assert not torch.equal(now[what][1], old[1]) and not torch.equal(now[what][4], old[4])
        assert state["step"].tolist() == [1, 2, 0, 2, 0] and now["step"].tolist() == [1, 5, 0, 2, 3]


def test_a_querier_trains_as_by_adamw_on_their_own_steps():
    torch.manual_seed(0)
    bank = torch.nn.Parameter(torch.randn(4, 3, 5))
    row = torch.nn.Parameter(bank[2].detach().clone())
    ours, theirs = RowSparseAdamW([bank], **SETTINGS), torch.optim.AdamW([row], **SETTINGS)
    for step in range(6):
        ids = torch.tensor([[2, 0], [1, 3], [0, 2]][step % 3])
        rows = torch.randn(2, 3, 5)
        bank.grad = torch.sparse_coo_tensor(ids[None], rows, bank.shape)
        ours.step()
        if 2 in ids:
            row.grad = rows[ids == 2][0]
            theirs.step()
    torch.testing.assert_close(bank[2], row)
    with pytest.raises(ValueError, match="amsgrad: got True"):
        RowSparseAdamW([bank], amsgrad=True)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
def test_repeated_rows_are_added(order):
    bank = torch.nn.Parameter(torch.zeros(4, 2))
    other = torch.nn.Parameter(bank.detach().clone())
    ids, rows = torch.tensor([1, 3, 1]), torch.tensor([[1.0, 2], [3, 4], [5, -3]])
    bank.grad = torch.sparse_coo_tensor(ids[None, order], rows[order], (4, 2))
    other.grad = torch.sparse_coo_tensor([[1, 3]], torch.tensor([[6.0, -1], [3, 4]]), (4, 2))
    for parameter in (bank, other):
        RowSparseAdamW([parameter]).step()
    assert torch.equal(bank, other) and bank[1, 1] > 0 > bank[1, 0]


def test_clipping_counts_every_gradient():
    dense, sparse = pair()
    batch = batch_of(3, 0, 3)
    for model in (dense, sparse):
        gradients(model, batch)
    expected = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.01)
    torch.testing.assert_close(clip_grad_norm_(sparse.parameters(), 0.01), expected)
    for (name, p), q in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(q.grad.to_dense() if q.grad.is_sparse else q.grad, p.grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_resumes(dtype):
    def fresh():
        model = aware_model(expert_gradients="sparse").to(dtype).train()
        return model, RowSparseAdamW(model.parameters(), **SETTINGS)

    asking = [(0, 1, 3), (3, 3, 1), (1, 4, 0)]
    model, optimizer = fresh()
    train(model, optimizer, asking)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, resumed = fresh()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for pair_ in ((model, optimizer), (other, resumed)):
        train(*pair_, asking)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_loaded_in_between_stay(dtype):
    model = aware_model(expert_gradients="sparse").to(dtype).train()
    optimizer = RowSparseAdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, [(0, 1, 3)] * 4)
    learnt = model.model.layers[0].experts.gate.detach().clone()
    model.load_state_dict(start)
    train(model, optimizer, [(0, 1, 3)])
    now, before = model.model.layers[0].experts.gate.detach(), start["model.layers.0.experts.gate"]
    assert (now[0] - before[0]).abs().max() < 0.5 * (learnt[0] - before[0]).abs().max()


def test_experts_that_are_loaded_in_between_stay(tmp_path):
    model = aware_model(expert_gradients="sparse", querier_names=("Amy", "Bo", "Cy", "Di", "Eve"))
    model = model.bfloat16().train()
    model.save_experts(tmp_path)
    before = model.model.layers[0].experts.gate.detach()[3].clone()
    optimizer = RowSparseAdamW(sparse_parameters(model).values(), lr=1e-2, weight_decay=0.0)
    train(model, optimizer, [(0, 1, 3)] * 4)
    learnt = model.model.layers[0].experts.gate.detach()[3].clone()
    model.load_experts(tmp_path, "Di")
    train(model, optimizer, [(0, 1, 3)])
    now = model.model.layers[0].experts.gate.detach()[3]
    assert (now - before).abs().max() < 0.5 * (learnt - before).abs().max()


def test_an_optimizer_state_that_is_loaded_alone_takes_the_weights_as_they_are():
    bank = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    optimizer = RowSparseAdamW([bank], lr=0.1, weight_decay=0.0)

    def step():
        bank.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 4, dtype=torch.bfloat16), bank.shape)
        optimizer.step()

    step()
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(20):
        step()
    optimizer.load_state_dict(saved)
    before = bank.detach().clone()
    step()
    assert (bank - before).abs().max() < 0.2


def test_experts_that_peft_wraps_are_found_once_and_have_no_members():
    model = aware_model(expert_gradients="sparse", querier_names=("Amy", "Bo", "Cy", "Di", "Eve"))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]))
    found = sparse_parameters(wrapped)
    assert len({id(p) for p in found.values()}) == len(found) == 3 * len(model.model.layers)
    assert found.keys() <= dict(wrapped.named_parameters()).keys()
    for change in (
        lambda: model.train_only("Amy"),
        lambda: model.add_queriers("Flo"),
        lambda: model.save_experts("nowhere"),
    ):
        with pytest.raises(ValueError, match="experts: got a ModulesToSaveWrapper around them"):
            change()


def test_a_single_parameter_is_clipped_too():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.full((3, 4), 2.0)
    torch.testing.assert_close(clip_grad_norm_(weight, 1.0), torch.tensor(48.0).sqrt())
    torch.testing.assert_close(weight.grad.norm(), torch.tensor(1.0))


def test_16_bit_weights_learn_in_small_steps():
    bank = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    bank, optimizer = copy.deepcopy((bank, RowSparseAdamW([bank], lr=1e-4, weight_decay=0.0)))
    for _ in range(60):
        bank.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4, dtype=torch.bfloat16), bank.shape)
        optimizer.step()
    assert optimizer.state[bank]["master"].dtype == torch.float32
    torch.testing.assert_close(bank[1].float(), torch.full((4,), 0.994), rtol=0, atol=2e-3)
    assert (bank[1] < 1).all() and (bank[[0, 2]] == 1).all()


def test_checkpoints_are_the_same(tmp_path):
    dense, sparse = pair()
    assert dense.state_dict().keys() == sparse.state_dict().keys()
    train(sparse, RowSparseAdamW(sparse.parameters(), **SETTINGS), [(0, 1, 3)])
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.qar.expert_gradients == "sparse" and sparse_parameters(loaded)
    as_dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, qar={**loaded.config.qar, "expert_gradients": "dense"}
    )
    assert not sparse_parameters(as_dense)
    batch = batch_of(4, 0, 3)
    expected = sparse.eval()(**batch).logits
    assert torch.equal(loaded(**batch).logits, expected)
    assert torch.equal(as_dense(**batch).logits, expected)
    as_dense.train()(**batch).loss.backward()
    torch.optim.AdamW(as_dense.parameters()).step()


def test_membership():
    model = aware_model(expert_gradients="sparse", querier_names=tuple("abcde")).train()
    model.add_queriers("f")
    model.remove_queriers("a")
    bank = gradients(model, batch_of(4, 1, 4))["model.layers.1.experts.gate"]
    assert bank.shape[0] == QUERIERS and bank._indices().tolist() == [[1, 4]]
    model.train_only("c")
    assert not sparse_parameters(model)
    alone = gradients(model, batch_of(1, 1, 4))
    assert all(".experts.trained." in name and not g.is_sparse for name, g in alone.items())
    model.train_only(None)
    assert gradients(model, batch_of(0, 1, 4))["model.layers.1.experts.gate"].is_sparse


def test_gradient_checkpointing_and_accumulation():
    _, model = pair()
    first, second = batch_of(3, 0, 3), batch_of(2, 0, 2, seed=1)
    expected = [gradients(model, batch) for batch in (first, second)]
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        for batch in (first, second):
            model(**batch, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            if name.endswith(BANK):
                got = parameter.grad.coalesce()
                assert got.indices().tolist() == [[0, 2, 3]]
                torch.testing.assert_close(got.to_dense(), sum(e[name].to_dense() for e in expected))


def test_compiled():
    torch._dynamo.reset()
    base = plain_model(num_hidden_layers=1)
    model = aware_model(base=base, expert_gradients="sparse").train()
    batch = batch_of(3, 0, 3)
    expected = gradients(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(**batch, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        got, want = parameter.grad, expected[name]
        assert got.is_sparse == want.is_sparse, name
        torch.testing.assert_close(*((got.to_dense(), want.to_dense()) if want.is_sparse else (got, want)))


def test_autocast():
    _, model = pair()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch_of(3, 0, 3), use_cache=False).loss
    loss.backward()
    assert model.model.layers[0].experts.down.grad._values().dtype == torch.float32


def test_sharded_experts_are_refused_in_training_alone(monkeypatch):
    monkeypatch.setattr("qar_models.modeling.is_sharded", lambda weight: True)
    model, batch = aware_model(expert_gradients="sparse"), batch_of(3, 0, 3)
    with pytest.raises(NotImplementedError, match="expert_gradients: got 'sparse' with sharded experts"):
        model.train()(**batch)
    assert model.eval()(**batch).loss.isfinite()


def test_a_shared_expert_alone_has_nothing_sparse():
    with pytest.raises(ValueError, match="expert_gradients: got 'sparse' with experts='shared'"):
        qar_config(experts="shared", expert_gradients="sparse")


@pytest.mark.parametrize("layouts", [("dense", "sparse"), ("sparse", "dense")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_moves_between_layouts(layouts, dtype):
    everybody = batch_of(0, 1, 2) | {"querier_ids": torch.tensor([[0, 1, 2, 3, 4] * 2] * 3)}
    model, other = (aware_model(expert_gradients=layout).to(dtype).train() for layout in layouts)
    optimizer = RowSparseAdamW(model.parameters(), **SETTINGS)
    for _ in range(2):
        gradients(model, everybody)
        optimizer.step()
    other.load_state_dict(model.state_dict())
    resumed = RowSparseAdamW(other.parameters(), **SETTINGS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, resumed)):
        gradients(one, everybody)
        its.step()
    equal = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 0.05, "atol": 5e-3}
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, another, **equal)
    steps = {int(state["step"].max()) for state in resumed.state.values()}
    assert steps == {3}
