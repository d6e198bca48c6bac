"""Rows are grouped once for as long as the same people ask."""

import copy
import dataclasses
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qar_models import querier_ids
from qar_models.querier_ids import TowerMemo
from tests.models.tiny_models import aware_model

CPU = torch.device("cpu")


@pytest.fixture
def qar():
    return aware_model("llama", "residual", "per_querier").qar


def towers(memo, qar, ids, seq_len=1):
    return memo(qar, ids, len(ids), seq_len, CPU, (), None)


def test_on_the_host_equal_ids_share_their_towers(qar):
    memo, ids = TowerMemo(), torch.tensor([1, 0])
    first = towers(memo, qar, ids)
    assert towers(memo, qar, torch.tensor([1, 0])) is first
    assert towers(memo, qar, ids, seq_len=2) is not first
    ids[0] = 2
    assert towers(memo, qar, ids).segments.row_expert.tolist() == [2, 0]


def test_elsewhere_the_same_tensor_shares_its_towers_where_it_stays(qar, monkeypatch):
    monkeypatch.setattr(querier_ids, "is_readable", lambda ids: False)
    memo, ids = TowerMemo(), torch.tensor([1, 0])
    with querier_ids.assume_ids_unchanged():
        first = towers(memo, qar, ids)
        assert towers(memo, qar, ids) is first
        assert towers(memo, qar, torch.tensor([1, 0])) is not first
        towers(memo, qar, ids)
    ids[0] = 2  # a buffer that a server writes the next batch's ids to
    assert towers(memo, qar, ids).segments.row_expert.tolist() == [2, 0]
    with querier_ids.assume_ids_unchanged():
        assert towers(memo, qar, ids).segments.row_expert.tolist() == [2, 0]


def test_a_captured_graph_groups_its_rows_itself(qar, monkeypatch):
    """Its replays find other ids in the same tensor."""
    memo, ids = TowerMemo(), torch.tensor([1, 0])
    monkeypatch.setattr(querier_ids, "is_readable", lambda ids: False)
    with querier_ids.assume_ids_unchanged():
        before = towers(memo, qar, ids)
        monkeypatch.setattr(querier_ids, "is_capturing", lambda: True)
        captured = towers(memo, qar, ids)
        monkeypatch.undo()
    assert captured is not before


def test_threads_do_not_get_each_others_towers(qar):
    memo, start = TowerMemo(), threading.Barrier(4)

    def ask(querier):
        start.wait()
        ids = torch.tensor([querier])
        return {towers(memo, qar, ids).segments.row_expert.item() for _ in range(200)}

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [{0}, {1}, {2}, {3}]


def test_generation_groups_the_rows_of_prompt_and_answer_once(monkeypatch):
    made = []
    monkeypatch.setattr(
        querier_ids,
        "make_towers",
        lambda *given, real=querier_ids.make_towers: made.append(1) or real(*given),
    )
    for on_host in (True, False):
        monkeypatch.setattr(querier_ids, "is_readable", lambda ids, answer=on_host: answer)
        model = aware_model("llama", "residual", "per_querier").eval()
        made.clear()
        model.generate(
            torch.randint(3, 60, (2, 5)), querier_ids=torch.tensor([0, 1]), max_new_tokens=6, min_new_tokens=6
        )
        assert len(made) == 2, on_host


def test_other_queriers_or_policies_are_grouped_anew():
    model = aware_model(querier_names=tuple("ABCDE"))
    input_ids, ids = torch.tensor([[5, 6, 7]]), torch.tensor([4])
    model(input_ids, querier_ids=ids)
    model.remove_queriers("B")
    with pytest.raises(ValueError, match="querier_ids: got 4, expected ids from -1 to 3"):
        model(input_ids, querier_ids=ids)
    model(input_ids, querier_ids=-torch.ones(1, dtype=torch.int64))
    model.qar = dataclasses.replace(model.qar, unknown_querier="error")
    with pytest.raises(ValueError, match="unknown_querier='error'"):
        model(input_ids, querier_ids=-torch.ones(1, dtype=torch.int64))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_does_not_carry_the_last_batch(duplicate):
    model, ids = aware_model(), torch.tensor([0, 2])
    batch = {"input_ids": torch.randint(3, 60, (2, 5)), "querier_ids": ids}
    expected = model(**batch).logits
    copied = duplicate(model)
    assert copied.model.tower_memo._last == TowerMemo()._last
    assert torch.equal(copied(**batch).logits, expected)
