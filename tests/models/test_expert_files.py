"""Experts on disk: they go where they belong, and nothing that is damaged goes anywhere."""

import json
import multiprocessing
import shutil
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from tiny_models import (
    NAMES,
    TOWERS,
    VOCAB,
    answers,
    aware_model,
    named_model,
    plain_model,
    randomize_experts,
    train,
)

from qar_models import delete_experts, expert_files, merge_shared
from qar_models.base_identity import weight_sample


@pytest.mark.parametrize("tower", TOWERS)
def test_experts_move_between_models(tower, tmp_path):
    source = named_model(tower=tower)
    source.save_experts(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    target = aware_model(tower=tower, num_queriers=1, querier_names=["Stuart"])
    stuart = answers(target, ("Stuart",) * 3)
    target.load_experts(tmp_path, ["小雪", "Amy", "Howard"])
    assert list(target.queriers) == ["Stuart", "小雪", "Amy", "Howard"]
    assert torch.equal(answers(target), answers(source))
    assert torch.equal(answers(target, ("Stuart",) * 3), stuart)
    target.load_experts(tmp_path)
    assert set(target.queriers) == {"Stuart", *NAMES}


def test_known_queriers_are_replaced_and_others_in_the_folder_stay(tmp_path):
    model = named_model()
    model.save_experts(tmp_path)
    before = answers(model)
    files = set(tmp_path.iterdir())
    model.train_only("Howard")
    train(model)
    model.save_experts(tmp_path, "Howard")
    trained = answers(model)
    assert len(set(tmp_path.iterdir())) == len(files) and set(tmp_path.iterdir()) != files
    fresh = named_model()
    assert torch.equal(answers(fresh), before)
    fresh.load_experts(tmp_path)
    assert torch.equal(answers(fresh), trained)
    assert torch.equal(trained[1:], before[1:]) and not torch.equal(trained[0], before[0])


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_fit_their_base_in_every_dtype(saved, loaded, tmp_path):
    named_model().to(saved).save_experts(tmp_path)
    named_model().to(saved).to(loaded).load_experts(tmp_path)
    named_model().to(loaded).load_experts(tmp_path)


def test_weights_too_small_for_float16_are_those_that_it_rounds_them_to(tmp_path):
    model = named_model()
    model.model.norm.weight.data.fill_(1e-7)
    model.save_experts(tmp_path)
    model.half().load_experts(tmp_path)


def slightly_changed(model):
    """As an adapter merged into it would: by a thousandth."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    return model


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda: named_model(base=plain_model(seed=5)), r"other values in lm_head\.weight"),
        (lambda: named_model(base=plain_model(num_hidden_layers=1)), r"a weight model\.layers\.1\.\S+"),
        (lambda: named_model(base=plain_model(intermediate_size=128)), r"mlp\.\S+ of 64x160, not 64x128"),
        (lambda: named_model(tower="replace"), "tower='residual'"),
        (lambda: named_model(expert_scale=0.5), r"expert_scale=1\.0"),
        (lambda: slightly_changed(named_model()), r"other values in model\.layers\.1\.mlp\.up_proj\.weight"),
        (
            lambda: get_peft_model(named_model(), LoraConfig(r=2, target_modules=["gate_proj"])),
            r"no weight model\.layers\.0\.mlp\.gate_proj\.base_layer\.weight",
        ),
    ],
)
def test_experts_of_another_base_are_refused(other, difference, tmp_path):
    named_model().save_experts(tmp_path)
    model = other()
    message = rf"index\.json: got experts of a base model with .*{difference}, expected this one's"
    for call in (model.load_experts, model.save_experts):
        with pytest.raises(ValueError, match=message):
            call(tmp_path)


def test_merged_bases_take_their_experts_if_told_so(tmp_path):
    model = named_model(experts="shared+per_querier")
    model.save_experts(tmp_path)
    expected = answers(model)
    merge_shared(model)
    randomize_experts(model, seed=3)
    with pytest.raises(ValueError, match=r"(?s)with a weight .*check_base=False"):
        model.load_experts(tmp_path)
    model.load_experts(tmp_path, check_base=False)
    torch.testing.assert_close(answers(model), expected)
    for settings, message in (
        ({"tower": "replace"}, "tower='residual'"),
        ({"expert_scale": 2}, "expert_scale=1"),
    ):
        with pytest.raises(ValueError, match=message):
            named_model(**settings).load_experts(tmp_path, check_base=False)


def test_a_base_with_more_tokens_is_the_same(tmp_path):
    model = named_model()
    model.save_experts(tmp_path)
    model.resize_token_embeddings(VOCAB + 8)
    model.load_experts(tmp_path)
    model.lm_head.weight.data.neg_()
    with pytest.raises(ValueError, match=r"other values in lm_head\.weight"):
        model.load_experts(tmp_path)
    model = named_model()
    model.model.embed_tokens.weight.data[64:] += 1  # far behind the tokens that every vocabulary begins with
    with pytest.raises(ValueError, match=r"other values in model\.embed_tokens\.weight"):
        model.load_experts(tmp_path)


def test_saving_experts_leaves_other_weights_alone(tmp_path):
    model = named_model()

    def unpack(*_):
        raise AssertionError("bitsandbytes packs its weights anew here, and forgets the scales")

    model.model.layers[0].mlp.gate_proj._save_to_state_dict = unpack
    model.save_experts(tmp_path)


class Packed(torch.nn.Parameter):
    """As bitsandbytes' 4-bit weights: bytes, laid out anew when they are first used."""


def test_four_bit_weights_are_known_by_their_shape(tmp_path):
    model = named_model()
    linear = model.model.layers[0].mlp.gate_proj
    for layout in ((5120, 1), (160, 32)):
        linear.weight = Packed(torch.randint(255, layout, dtype=torch.uint8), requires_grad=False)
        linear.weight.quant_state = SimpleNamespace(shape=torch.Size((160, 64)))
        model.save_experts(tmp_path)
        model.load_experts(tmp_path)
    with pytest.raises(ValueError, match=r"gate_proj\.weight of 160x64 Packed, not 160x64, expected"):
        named_model().load_experts(tmp_path)


class Quantised(torch.Tensor):
    """As torchao's weights: a tensor that has no views, and gives its values when asked."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.dequantize:
            return args[0].as_subclass(torch.Tensor) * 2
        if func in (torch.Tensor.reshape, torch.Tensor.view):
            raise NotImplementedError("aten.view")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_without_views_are_sampled():
    values = torch.arange(32.0)
    assert torch.equal(weight_sample(values.as_subclass(Quantised)), weight_sample(values * 2))


def test_experts_of_another_rank_are_refused(tmp_path):
    named_model(expert_rank=4).save_experts(tmp_path)
    with pytest.raises(ValueError, match=r"got layers\.0\.down \(64, 4\), expected \(64, 8\), in the"):
        named_model().load_experts(tmp_path)


@pytest.mark.parametrize("index", ["{", "{}", '{"base": "0123", "queriers": {}}'])
def test_a_damaged_index_is_refused(index, tmp_path):
    (tmp_path / "index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json: damaged .*, expected an index"):
        named_model().load_experts(tmp_path)


def test_damaged_files_are_refused_and_change_nothing(tmp_path):
    named_model().save_experts(tmp_path)
    victim = tmp_path / json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["queriers"]["小雪"]
    model = aware_model(num_queriers=1, querier_names=["Stuart"])
    for damage in (lambda: victim.write_bytes(victim.read_bytes()[:-1]), victim.unlink):
        damage()
        with pytest.raises(ValueError, match="expected the whole expert of '小雪'; damaged"):
            model.load_experts(tmp_path)
        assert list(model.queriers) == ["Stuart"]


def test_a_crash_while_writing_leaves_the_old_state(tmp_path, monkeypatch):
    model = named_model()
    model.save_experts(tmp_path)
    expected, files = answers(model), set(tmp_path.iterdir())
    randomize_experts(model, seed=9)
    calls = []

    def fail_at_the_third(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError("disk full")
        shutil.move(source, target)

    monkeypatch.setattr("os.replace", fail_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        model.save_experts(tmp_path)
    monkeypatch.undo()
    assert set(tmp_path.iterdir()) == files
    model.load_experts(tmp_path)
    assert torch.equal(answers(model), expected)


MANY = tuple(f"querier {index}" for index in range(20))


def save_one_by_one(folder, names, barrier):
    torch.set_num_threads(1)  # those of the parent are not there
    model = aware_model(num_queriers=len(MANY), querier_names=MANY)
    barrier.wait()
    for name in names:
        model.save_experts(folder, name)


def replace_again_and_again(folder, barrier, stop):
    torch.set_num_threads(1)
    model = named_model()
    barrier.wait()
    seed = 0
    while not stop.is_set():
        seed += 1
        randomize_experts(model, seed)
        model.save_experts(folder, "Howard")


def test_several_processes_save_into_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    shares = [MANY[first::4] for first in range(4)]
    running = [context.Process(target=save_one_by_one, args=(tmp_path, share, barrier)) for share in shares]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0, 0]
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert set(index["queriers"]) == set(MANY)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["queriers"].values())
    aware_model(num_queriers=1, querier_names=["Stuart"]).load_experts(tmp_path)


def test_waiting_for_a_turn_is_said_and_ends(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(expert_files, "_PATIENCE", (0.01, 0.01))
    tmp_path.chmod(0o777)
    with FileLock(tmp_path / ".lock"), pytest.raises(TimeoutError, match=r"\.lock: still locked after"):
        named_model().save_experts(tmp_path)
    assert "waiting for another process" in caplog.text
    (tmp_path / ".lock").unlink()
    named_model().save_experts(tmp_path)
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o666  # whoever may write here may lock


def test_an_expert_is_read_while_another_process_replaces_it(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, stop = context.Barrier(2), context.Event()
    model = named_model()
    model.save_experts(tmp_path)
    writer = context.Process(target=replace_again_and_again, args=(tmp_path, barrier, stop))
    writer.start()
    barrier.wait()
    read = set()
    try:
        for _ in range(200):
            model.load_experts(tmp_path)
            read.add(model.model.layers[0].experts.down[2].sum().item())
    finally:
        stop.set()
        writer.join()
    assert writer.exitcode == 0 and len(read) > 1


def test_what_a_crash_has_left_behind_goes_with_the_next_change(tmp_path):
    model = named_model()
    model.save_experts(tmp_path)
    files = set(tmp_path.iterdir())
    for left in ("0" * 64 + ".safetensors", "." + "0" * 64 + ".safetensors.123"):
        (tmp_path / left).touch()
    (tmp_path / "mine.safetensors").touch()
    model.save_experts(tmp_path, "Amy")
    assert set(tmp_path.iterdir()) == {*files, tmp_path / "mine.safetensors"}


def test_deleted_experts_are_gone(tmp_path):
    model = named_model()
    model.add_queriers("Twin", like="Howard")  # in Howard's file
    model.save_experts(tmp_path)
    files = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["queriers"]
    delete_experts(tmp_path, ["Amy", "小雪"])
    delete_experts(tmp_path, "Howard")
    kept = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["queriers"]
    assert kept == {name: files[name] for name in ("Bernadette", "a/b", "Twin")}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(kept.values())
    with pytest.raises(ValueError, match=r"queriers: got \['Amy'\], expected names of \['Bernadette', "):
        delete_experts(tmp_path, ["a/b", "Amy"])
    with pytest.raises(ValueError, match=r"expected a folder with index\.json"):
        delete_experts(tmp_path / "none", "Amy")
    named_model().load_experts(tmp_path, "a/b")
    delete_experts(tmp_path, list(kept))
    assert not list(tmp_path.glob("*.safetensors"))
    model.save_experts(tmp_path)


def test_unknown_names_and_folders_are_refused(tmp_path):
    model = named_model()
    with pytest.raises(ValueError, match=r"expected a folder with index\.json, written by save_experts"):
        model.load_experts(tmp_path)
    model.save_experts(tmp_path, ["Amy"])
    with pytest.raises(ValueError, match=r"queriers: got \['Howard'\], expected names of \['Amy'\]"):
        model.load_experts(tmp_path, ["Howard"])
    with pytest.raises(ValueError, match=r"names: got \['Stuart'\]"):
        model.save_experts(tmp_path, ["Stuart"])


@pytest.mark.parametrize(
    "change",
    [
        {"queriers": None},
        {"queriers": ["Amy"]},
        {"queriers": {"Amy": 3}},
        {"dtype": "bfloat17"},
        {"weights": ["x"]},
    ],
)
def test_an_index_with_a_wrong_entry_is_refused(change, tmp_path):
    named_model().save_experts(tmp_path)
    path = tmp_path / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["base"].update({key: value for key, value in change.items() if key in ("dtype", "weights")})
    index.update({key: value for key, value in change.items() if key == "queriers"})
    path.write_text(json.dumps({key: value for key, value in index.items() if value is not None}), "utf-8")
    with pytest.raises(ValueError, match=r"index\.json: damaged .*, expected an index"):
        named_model().load_experts(tmp_path)


def test_no_names_are_not_all_names(tmp_path):
    named_model().save_experts(tmp_path)
    model = named_model()
    with pytest.raises(ValueError, match=r"queriers: got \[\], expected names of"):
        model.load_experts(tmp_path, [])


def test_experts_of_a_base_with_integer_weights(tmp_path):
    def quantised(change=0):
        model = named_model()
        projection = model.model.layers[0].mlp.gate_proj
        weight = (projection.weight.detach() * 10).to(torch.int8) + change
        projection.weight = torch.nn.Parameter(weight, requires_grad=False)
        return model

    quantised().save_experts(tmp_path)
    quantised().load_experts(tmp_path, "Amy")
    with pytest.raises(ValueError, match="other values"):
        quantised(1).load_experts(tmp_path, "Amy")
