"""What each baseline puts before the query."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from train.baselines import few_shot, load_profiles, querier_profile, role_profile
from train.config import TrainConfig
from train.data.layout import Example, MQDialog
from train.data.mqdialog import write_mqdialog
from train.data.responders import load_dialogues, merge
from train.data.transcript import Turn
from train.dataset import CONTEXTS, load_data, with_context
from train.errors import UserError

PROFILES = {"Bob": "Bob is a cook.", "Ann": "Ann is a sailor.", "Cy": "Cy is a clerk."}


def window(name, query, reply="Well.", querier_id=0, responder="Bob"):
    querier = ("Ann", "Cy")[querier_id]
    return Example(name, (Turn(querier, query), Turn(responder, reply)), responder, querier, querier_id, 0)


@pytest.fixture
def data():
    train = [
        window("d1_part0", "Where is the red ship?"),
        window("d1_part1", "Where is the red ship now?"),
        window("d2_part0", "Who ate my soup?"),
        window("d3_part0", "Is the ship here?", querier_id=1),
        window("d4_part0", "Good morning to you.", querier_id=1),
    ]
    return MQDialog("Bob", ["Ann", "Cy"], 1, train, [window("d9_part0", "Has the red ship sailed?")])


def test_profiles_say_who_answers_and_who_asks(data):
    assert role_profile(data, PROFILES).dev[0].context == "Bob is a cook."
    asked = querier_profile(data, PROFILES)
    assert asked.dev[0].context == "You are talking with Ann. Ann is a sailor."
    assert asked.train[-1].context == "You are talking with Cy. Cy is a clerk."


def test_contexts_chain_and_change_nothing_else(data):
    both = querier_profile(role_profile(data, PROFILES), PROFILES).dev[0]
    assert both.context == "Bob is a cook.\nYou are talking with Ann. Ann is a sailor."
    assert dataclasses.replace(both, context="") == data.dev[0]


def test_missing_profiles_are_all_named_or_fall_back_to_the_name(data):
    with pytest.raises(UserError, match="no profile of: Ann, Cy"):
        querier_profile(data, {"Bob": "A cook."})
    with pytest.raises(UserError, match="no profile of: Bob"):
        role_profile(data, {})
    with pytest.raises(UserError, match="'ignore'"):
        role_profile(data, {}, missing="ignore")
    assert querier_profile(data, {}, missing="name").dev[0].context == "You are talking with Ann."
    assert role_profile(data, {}, missing="name").dev[0].context == ""


def test_shots_are_the_most_similar_queries_of_other_dialogues(data):
    shown = few_shot(data, k=2).dev[0].context
    assert shown.index("Ann: Where is the red ship?\nBob: Well.") < shown.index("Cy: Is the ship here?")
    assert "now" not in shown and "soup" not in shown  # one window of a dialogue, and two dialogues


def test_a_window_is_never_shown_its_own_dialogue(data):
    own = few_shot(data, k=5).train[0].context
    assert "red ship" not in own  # neither this window nor the other one of d1
    assert own.count("Bob: Well.") == 3  # all there are


def test_equal_names_of_two_queriers_are_two_dialogues(data):
    train = [window("d1_part0", "Where is the ship?"), window("d1_part1", "Who ate my soup?", querier_id=1)]
    first, second = few_shot(dataclasses.replace(data, train=train)).train
    assert "soup" in first.context and "ship" in second.context


def test_shots_come_from_the_training_part_of_the_same_responder(data):
    other = [window("d1_part0", "Has the red ship sailed?", "Aye, aye.", responder="Dee")]
    both = merge(
        [data, MQDialog("Dee", ["Ann", "Cy"], 1, other, [window("d8_part0", "Ship?", responder="Dee")])]
    )
    shown = few_shot(both, k=5)
    assert "Aye" not in shown.dev[0].context and "sailed" not in shown.dev[0].context
    assert shown.dev[1].context.count("Dee:") == 1
    assert querier_profile(both, PROFILES).dev[0].context.startswith("You are talking with Ann.")


def test_training_windows_are_shown_nothing_of_the_validation_part(data, tmp_path):
    train = [window(f"d{n}_part0", f"Where is ship {n}?", f"Answer {n}.", n % 2) for n in range(8)]
    write_mqdialog(dataclasses.replace(data, train=train), tmp_path, "show")
    config = TrainConfig(data=str(tmp_path), output_dir="o", validation=0.3, context="few_shot")
    found = load_data(config)
    replies = [example.reply for example in found.valid]
    assert len(replies) == 2
    assert not any(reply in example.context for reply in replies for example in found.data.train)
    assert all(example.context for example in (*found.data.train, *found.valid))
    plain = load_dialogues(tmp_path)
    assert found.data.dev == few_shot(plain).dev  # what is scored is shown all that was there to learn
    assert {e.id: e for e in found.valid}.items() <= {e.id: e for e in few_shot(plain).train}.items()


def test_shots_of_text_without_spaces(data):
    chinese = [window("d1_part0", "今天天气好吗"), window("d2_part0", "你吃饭了吗")]
    asked = dataclasses.replace(data, train=chinese, dev=[window("d9_part0", "昨天天气怎样")])
    assert "天气好吗" in few_shot(asked, k=1).dev[0].context


def test_no_shots_at_all_are_refused(data):
    with pytest.raises(UserError, match="at least 1"):
        few_shot(data, k=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "got list"), ("Bob: [1]\n", "profile of 'Bob'"), ("Bob: ''\n", "'Bob'"), ("a: b: c", "YAML")],
)
def test_profile_files_are_checked(tmp_path, text, message):
    path = tmp_path / "profiles.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_profiles(path)


def test_the_plays_have_a_profile_of_every_responder_of_the_experiment():
    configs = Path(__file__).parents[2] / "train" / "configs"
    responders = yaml.safe_load((configs / "experiments" / "plays.yaml").read_text())["responders"]
    assert set(responders) <= set(load_profiles(configs / "profiles" / "plays.yaml"))


def test_a_context_without_a_function_is_not_silently_none(data):
    assert set(CONTEXTS) == set(get_args(get_type_hints(TrainConfig)["context"]))
    assert with_context(data, TrainConfig("d", "o")) == data
    with pytest.raises(UserError, match="context: got 'summary', expected none, role_profile, "):
        with_context(data, TrainConfig("d", "o", context="summary"))
