"""The MQDialog folder: what is written is read back, other ids and maps are understood, damage is named."""

import json
import os
from pathlib import Path

import pytest
import torch

from train.data.layout import PAIR_IDS, Example, MQDialog, responder_folder
from train.data.mqdialog import load_mqdialog, write_mqdialog
from train.data.transcript import Turn
from train.errors import UserError
from train.files import build_directory, load_json, write_atomic, write_tensors

QUERIERS = ["Prince Henry", "Ford"]


def data() -> MQDialog:
    def make(split, querier_id, number):
        turns = (Turn(QUERIERS[querier_id], f"{split} {number}?"), Turn("Falstaff", "Ay – é."))
        name = QUERIERS[querier_id]
        return Example(f"{split}{querier_id}_{number}", turns, "Falstaff", name, querier_id, number % 3)

    train = [make("train", querier_id, number) for querier_id in (0, 1) for number in range(4)]
    dev = [make("dev", querier_id, 0) for querier_id in (0, 1)]
    return MQDialog("Falstaff", QUERIERS, 3, train, dev)


@pytest.fixture
def folder(tmp_path):
    target = responder_folder(tmp_path, "plays", "Falstaff")
    with build_directory(target) as workspace:
        write_mqdialog(data(), workspace, "plays")
    return target


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def train_file(folder, querier="Ford"):
    (path,) = folder.glob(f"*_{querier}/*_response_L512_train.json")
    return path


def test_layout_and_round_trip(folder):
    assert folder.parts[-2:] == ("plays", "diags_two_role_falstaff_clustered")
    record = json.loads(train_file(folder, "PrinceHenry").read_text())[1]
    assert record == {
        "id": "train0_1",
        "conversations": [
            {"from": "Prince Henry", "value": "train 1?"},
            {"from": "Falstaff", "value": "Ay – é."},
        ],
        "target_role": "Falstaff",
        "target_role_short": "Falstaff",
        "input_role": "Prince Henry",
        "input_role_short": "PrinceHenry",
        "role_pair_id": 2,
        "cluster_id": 1,
    }
    found = load_mqdialog(folder)
    assert (found.responder, found.queriers, found.num_clusters) == ("Falstaff", QUERIERS, 3)
    assert sorted(found.train, key=repr) == sorted(data().train, key=repr)
    assert sorted(found.dev, key=repr) == sorted(data().dev, key=repr)


@pytest.mark.parametrize(
    "mapping",
    [
        {"Falstaff": {"Prince Henry": 9, "Ford": 4, "Nobody": 5}},
        {"Falstaff_PrinceHenry": 9, "Falstaff_Ford": 4},
        {"9": "Prince Henry", "4": "Ford"},
    ],
)
def test_any_ids_become_contiguous_in_their_order(folder, mapping):
    (folder / PAIR_IDS).write_text(json.dumps(mapping))
    for querier, pair_id in (("PrinceHenry", 9), ("Ford", "4")):
        for path in folder.glob(f"*_{querier}/*.json"):
            edit(path, lambda records, pair_id=pair_id: [r.update(role_pair_id=pair_id) for r in records])
    found = load_mqdialog(folder)
    assert found.queriers == ["Ford", "Prince Henry"]
    assert {(e.querier, e.querier_id) for e in found.train} == {("Ford", 0), ("Prince Henry", 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[2].pop("conversations"), "train.json: record 2: key 'conversations'"),
        (lambda r: r[1].pop("cluster_id"), "train.json: record 1: key 'cluster_id'"),
        (lambda r: r[1].update(role_pair_id=True), "record 1: key 'role_pair_id'"),
        (lambda r: r[0]["conversations"][1].pop("value"), "record 0: key 'value' of turn 1"),
        (lambda r: r[0]["conversations"].pop(), "record 0: 'conversations' must end with"),
        (
            lambda r: r[0].update(input_role="A > B"),
            "record 0: got the name 'A > B', expected one without ' > '",
        ),
        (lambda r: r[0].update(role_pair_id=77), "record 0: role_pair_id 77 is not in"),
        (lambda r: r[0].update(input_role="Page"), "role_pair_id 3 belongs to 'Page', not 'Ford'"),
        (lambda r: r.insert(0, "text"), "record 0: expected an object"),
    ],
)
def test_damaged_records_are_named(folder, change, message):
    edit(train_file(folder), change)
    with pytest.raises(UserError, match=message):
        load_mqdialog(folder)


def test_windows_of_two_queriers_that_share_an_id_are_told_apart(folder):
    for path in folder.glob("*/*.json"):
        if path.parent.name != "configs":
            edit(path, lambda found: [record.update(id=index) for index, record in enumerate(found)])
    loaded = load_mqdialog(folder)
    for found in (loaded.train, loaded.dev):
        assert len({example.id for example in found}) == len(found)
    assert loaded.dev[1].id == "Prince Henry/0"
    edit(train_file(folder), lambda found: found[1].update(id=0))
    with pytest.raises(UserError, match="2 train windows of querier 'Ford' have the id '0'"):
        load_mqdialog(folder)


def test_damaged_json_names_file_and_line(folder):
    path = train_file(folder)
    path.write_text(path.read_text()[:200])
    with pytest.raises(UserError, match=r"train\.json:\d+: damaged JSON"):
        load_mqdialog(folder)


@pytest.mark.parametrize("text", [5000 * "1", 100_000 * "["])
def test_json_that_python_cannot_hold_is_damaged(folder, text):
    (folder / PAIR_IDS).write_text(text)
    with pytest.raises(UserError, match=r"role_pair_id\.json: damaged JSON \(.+\)$"):
        load_mqdialog(folder)


def test_empty_split(folder):
    for path in folder.glob("*/*_dev.json"):
        path.write_text("[]")
    with pytest.raises(UserError, match="the dev split is empty"):
        load_mqdialog(folder)


@pytest.mark.parametrize("text", ["[]", '{"a": "b"}', '{"a": null}'])
def test_damaged_pair_ids(folder, text):
    (folder / PAIR_IDS).write_text(text)
    with pytest.raises(UserError, match=r"role_pair_id\.json: expected an object"):
        load_mqdialog(folder)


def test_unknown_folder_lists_what_is_there(folder):
    with pytest.raises(UserError, match=r"hamlet.*plays holds: diags_two_role_falstaff_clustered"):
        load_mqdialog(responder_folder(folder.parents[1], "plays", "Hamlet"))
    with pytest.raises(UserError, match="does not exist either"):
        load_mqdialog(folder / "no" / "such")


def test_a_failed_build_leaves_the_old_folder_and_nothing_else(folder):
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(RuntimeError), build_directory(folder) as workspace:
        (workspace / "half").write_text("half")
        raise RuntimeError
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_not_called_damaged(tmp_path):
    with pytest.raises(
        UserError, match=r"absent\.json: cannot be read \(No such file or directory\)$"
    ) as raised:
        load_json(tmp_path / "absent.json")
    assert "damaged" not in str(raised.value)


def test_a_place_where_no_file_can_be_made_is_named():
    for writing in (lambda: write_atomic(Path("/proc/x/a"), ""), build_directory(Path("/proc/x")).__enter__):
        with pytest.raises(UserError, match=r"/proc/x.*: cannot be written \(No such file"):
            writing()


def test_files_have_the_mode_that_the_process_asks_for(tmp_path):
    mask = os.umask(0o027)
    try:
        write_atomic(tmp_path / "text", "")
        write_tensors(tmp_path / "tensors", {"a": torch.zeros(1)})
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_queriers_of_one_short_name_have_a_folder_each(tmp_path):
    names = ["A B", "AB", "???", "राम", "रमा"]
    turns = (Turn("x", "Why?"), Turn("Falstaff", "So."))
    half = [Example(name, turns, "Falstaff", name, index, 0) for index, name in enumerate(names)]
    write_mqdialog(MQDialog("Falstaff", names, 1, half, half), tmp_path, "plays")
    assert load_mqdialog(tmp_path).queriers == names
    assert len({path.parent for path in tmp_path.glob("*/*_train.json")}) == len(names)


def test_neighbouring_turns_of_one_speaker_are_one(folder, caplog):
    def again(records):
        records[0]["conversations"][-1:] = [
            {"from": "Falstaff", "value": "Ay."},
            {"from": "Falstaff", "value": " "},
            {"from": "Falstaff", "value": "Very sure."},
        ]
        records[1]["conversations"] = records[1]["conversations"][-1:]  # nobody has asked
        records[2]["conversations"][-1]["value"] = " "

    edit(train_file(folder), again)
    found = [example for example in load_mqdialog(folder).train if example.querier == "Ford"]
    assert [example.reply for example in found] == ["Ay. Very sure.", "Ay – é."]
    assert found[0].query == "train 0?"
    assert "2 of 8 windows have no query or no reply" in caplog.text
