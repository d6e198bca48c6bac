import dataclasses

import pytest
import torch
from rich.console import Console

from train.chat import Chat
from train.data.transcript import Turn
from train.demo import samples
from train.errors import UserError
from train.finetune import finetune
from train.generate import answer
from train.heldout import held_out_windows, querier_similarity, score
from train.trained import load_trained, untrained

QUERIERS = ("Ada", "Bram", "Cleo")


@pytest.fixture
def held_out(config, tiny_data):
    return held_out_windows(config, tiny_data)


@pytest.fixture
def trained(config):
    return load_trained(finetune(config))


def test_nll_is_that_of_the_last_reply_alone(trained, held_out):
    model = trained.model
    scores = held_out.nll(model, held_out.querier_ids)
    for window, (nll, tokens) in zip(held_out.windows, scores, strict=True):
        ids = torch.tensor([window.input_ids])
        with torch.no_grad():
            logits = model(ids, querier_ids=torch.tensor([window.querier_id])).logits[0].double()
        learnt = [i for i, label in enumerate(window.reply_labels) if label != -100]
        expected = -sum(logits[i - 1].log_softmax(-1)[window.input_ids[i]] for i in learnt)
        assert tokens == len(learnt)
        assert nll == pytest.approx(float(expected), rel=1e-4)


def test_replies_in_a_mixed_batch_equal_those_alone(trained, held_out):
    model = trained.model
    everything = list(range(len(held_out.windows)))
    together = held_out.generate(model, everything, held_out.querier_ids, 8)
    alone = [held_out.generate(model, [i], [held_out.querier_ids[i]], 8)[0] for i in everything]
    assert together == alone


def test_swapped_ids_are_always_of_somebody_else(held_out):
    for seed in range(20):
        swapped = held_out.swapped_ids(QUERIERS, seed)
        assert all(0 <= other < 3 for other in swapped)
        assert all(a != b for a, b in zip(swapped, held_out.querier_ids, strict=True))


def test_a_pair_is_swapped_for_another_of_the_same_responder(held_out, monkeypatch):
    pairs = ["Ann > Cy", "Bo > Cy", "Ann > Di", "Eve > Di", "Cy > Di", "Di > Cy", "Ann > Flo"]
    truly = list(range(len(pairs))) * 5
    monkeypatch.setattr(type(held_out), "querier_ids", truly)
    for true, other in zip(truly, held_out.swapped_ids(pairs, 0), strict=True):
        assert other != true
        assert pairs[other].split(" > ")[1] == pairs[true].split(" > ")[1] or true == 6


def test_a_reply_ends_at_the_end_of_sequence_too(held_out, monkeypatch):
    stops = []
    monkeypatch.setattr("train.heldout.generate_replies", lambda *args: stops.extend(args[5]))
    held_out.tokenizer.eos_token = "<unk>"
    held_out.generate(None, [0], [0], 4)
    assert set(stops) == {held_out.tokenizer.unk_token_id, held_out.windows[0].end_mark}


def test_swapping_changes_nothing_without_experts(held_out, config, tiny_data):
    model = untrained(config, tiny_data.responder, tuple(tiny_data.queriers)).model
    assert held_out.nll(model, held_out.querier_ids) == held_out.nll(model, held_out.swapped_ids(QUERIERS, 0))


def test_every_window_is_scored_as_asked_and_under_another_id(trained, held_out, tiny_data):
    records, swapped = score(trained, held_out, 32, 4)
    assert len(records) == len(swapped) == len(tiny_data.dev)
    assert all(0 <= record["rougeL"] <= 1 for record in records)


def test_models_of_any_seed_answer_the_same_windows(trained, held_out, monkeypatch):
    asked = []
    monkeypatch.setattr(
        held_out, "answer", lambda model, ids, chosen, most: asked.append((ids, chosen)) or []
    )
    for seed in (0, 7):
        score(dataclasses.replace(trained, config=trained.config.replace(seed=seed)), held_out, 2, 4)
    own, others = asked[:2]
    assert asked[2:] == [own, others] and own[1] == others[1] and len(own[1]) == 2


def test_experts_are_like_themselves_and_unlike_others(trained, held_out):
    matrix = torch.tensor(querier_similarity(trained.model, held_out))
    torch.testing.assert_close(matrix.diagonal(), torch.ones(3))
    assert matrix.min() < 0.9


def test_experts_are_compared_on_the_words_of_windows_not_on_padding(trained, held_out):
    model, moves = trained.model, []
    for window in held_out.windows:
        ids = torch.tensor([window.input_ids]).expand(3, -1)
        with torch.no_grad():
            states = model.model(ids, querier_ids=torch.arange(3)).last_hidden_state
        moves.append((states - states.mean(0)).flatten(1))
    expected = torch.nn.functional.normalize(torch.cat(moves, 1), dim=1)
    found = torch.tensor(querier_similarity(model, held_out))
    assert len({len(window.input_ids) for window in held_out.windows}) > 1
    torch.testing.assert_close(found, expected @ expected.T, rtol=1e-4, atol=1e-4)


def test_samples_are_answered_to_who_asked_and_to_others(trained, held_out, tiny_data):
    first, second = samples(trained, tiny_data, held_out, [0, 5], max_new_tokens=4)
    assert second["asked_by"] == held_out.examples[5].querier == next(iter(second["answers"]))
    assert len(first["answers"]) == 3
    alone = held_out.generate(trained.model, [5], [0], 4)
    assert second["answers"][tiny_data.queriers[0]] == alone[0]


def test_windows_are_answered_as_asked_by_the_ids_given(trained, held_out, monkeypatch):
    model = trained.model
    others, chosen, asked = held_out.swapped_ids(QUERIERS, 0), [0, 2], []
    monkeypatch.setattr(
        held_out, "generate", lambda _model, indices, ids, _tokens: asked.extend(ids) or ["."] * len(indices)
    )
    records = held_out.answer(model, others, chosen, 4)
    assert asked == [others[index] for index in chosen] != [held_out.querier_ids[index] for index in chosen]
    assert [(r["nll_sum"], r["tokens"]) for r in records] == held_out.nll(model, others)
    assert [index for index, record in enumerate(records) if record.get("reply")] == chosen


def test_answer_knows_its_queriers(trained, tiny_data):
    history = [Turn(tiny_data.queriers[0], tiny_data.train[0].query)]
    replies = answer(trained, history, tiny_data.queriers, max_new_tokens=4)
    assert list(replies) == tiny_data.queriers
    with pytest.raises(UserError, match="querier 'Nobody' is unknown"):
        answer(trained, history, ["Nobody"])


def test_windows_of_one_dialogue_are_resampled_together(tiny_data):
    first = dataclasses.replace(tiny_data.train[0], id="scene_1_dialogue_2_part3")
    assert first.dialogue == "scene_1_dialogue_2"


def test_chat_switches_who_asks_and_survives_slips(trained, tiny_data, capsys):
    first, second = tiny_data.queriers[:2]
    chat = Chat(trained, first, Console(width=200), max_new_tokens=4)
    chat.handle(tiny_data.train[0].query)
    assert [turn.speaker for turn in chat.history] == [first, tiny_data.responder]
    chat.handle(f"/as {second}")
    assert chat.querier == second
    with pytest.raises(UserError, match="querier 'Nobody' is unknown"):
        chat.handle("/as Nobody")
    with pytest.raises(UserError, match="command '/dance' is unknown"):
        chat.handle("/dance")
    capsys.readouterr()
    chat.handle("/all")
    shown = capsys.readouterr().out
    assert all(name in shown for name in tiny_data.queriers)
    assert chat.querier == second
