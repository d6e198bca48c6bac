import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from train.base_model import load_base, weights_checksum
from train.config import DTYPES
from train.data.encode import encode_all
from train.data.mqdialog import write_mqdialog
from train.errors import UserError
from train.experiment import run, windows
from train.experiment.cell import result_of, run_cell
from train.experiment.load import load_experiment
from train.experiment.results import collect, published
from train.experiment.table import NOT_MEASURED, markdown, published_table
from train.experiment.windows import cell_data
from train.metrics import wording


@pytest.fixture
def plan(config, tmp_path):
    """A file of three methods under two seeds, four steps each."""
    train = {key: value for key, value in config.to_dict().items() if key not in ("output_dir", "seed")}
    values = {
        "output_dir": str(tmp_path / "experiment"),
        "train": {**train, "lora_targets": list(train["lora_targets"]), "epochs": 1},
        "methods": {
            "zero_shot": {"trained": False},
            "ft": {"method": "ft"},
            "qar": {"experts": "per_querier"},
        },
        "seeds": [0, 1],
        "generated": 3,
        "max_new_tokens": 4,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_cells_survive_a_stop_and_end_in_a_table(plan, tmp_path, monkeypatch):
    experiment = load_experiment(plan)
    ran = []

    def run_some(experiment, cell):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(cell.name)
        return run_cell(experiment, cell)

    run_cell = run.run_cell
    monkeypatch.setattr(run, "run_cell", run_some)
    with pytest.raises(KeyboardInterrupt):
        run.run_experiment(experiment, tmp_path, "tiny")
    assert ran == ["zero_shot-seed0", "ft-seed0", "qar-seed0"]
    assert json.loads((tmp_path / "tiny.json").read_text())["missing"] == ["ft-seed1", "qar-seed1"]
    before = result_of(experiment, experiment.cells()[0])

    monkeypatch.setattr(run, "run_cell", lambda *cell: ran.append(cell[1].name) or run_cell(*cell))
    run.run_experiment(experiment, tmp_path, "tiny")
    assert ran[3:] == ["ft-seed1", "qar-seed1"]
    assert result_of(experiment, experiment.cells()[0]) == before

    results = json.loads((tmp_path / "tiny.json").read_text())
    assert results["missing"] == [] and list(results["methods"]) == ["zero_shot", "ft", "qar"]
    per_seed = results["methods"]["qar"]["per_seed"]
    assert [one["seed"] for one in per_seed] == [0, 1]
    assert results["methods"]["qar"]["nll"] == pytest.approx(sum(one["nll"] for one in per_seed) / 2)
    difference = results["methods"]["qar"]["nll"] - results["methods"]["ft"]["nll"]
    assert results["paired"]["qar_vs_ft"]["nll"]["diff"] == pytest.approx(difference)
    assert set(results["swap"]) == {"qar"}
    assert results["swap"]["qar"]["rougeL_true"] == pytest.approx(results["methods"]["qar"]["rougeL"])
    assert "| qar - ft |" in (tmp_path / "tiny.md").read_text()
    assert "published" not in (tmp_path / "tiny.md").read_text()  # this is no play
    assert (tmp_path / "tiny.svg").read_text().rstrip().endswith("</svg>")


def test_what_cannot_go_on_is_refused_before_anything_is_written(plan, config, tmp_path):
    base = shutil.copytree(config.model, tmp_path / "base")

    def start(*overrides):
        experiment = load_experiment(plan, ["seeds=[0]", "pairs=[]", f"train.model={base}", *overrides])
        run.run_experiment(experiment, tmp_path / "experiment", "tiny")

    start()
    files = [path for path in (tmp_path / "experiment").rglob("*") if path.is_file()]
    written = {path: path.read_bytes() for path in files}
    with pytest.raises(UserError, match=r"ft-seed0.*started with epochs=1\.0, got 2\.0"):
        start("train.epochs=2")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].neg()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    windows._bases.cache_clear()  # a process reads its base once
    with pytest.raises(UserError, match=r"ft-seed0.*had other weights"):
        start()
    assert all(path.read_bytes() == content for path, content in written.items())


def test_a_base_is_known_in_the_dtype_of_the_run(config):
    model, _ = load_base(config.model)
    known = {dtype: windows.base_of(config.model, dtype) for dtype in DTYPES.values()}
    assert known == {dtype: weights_checksum(model, dtype) for dtype in DTYPES.values()}
    assert len(set(known.values())) == len(DTYPES)


@pytest.mark.parametrize("damage", ["{", "[]", '{"key": 1}'])
def test_a_damaged_result_is_found_before_anything_runs(plan, tmp_path, monkeypatch, damage):
    experiment = load_experiment(
        plan, ["seeds=[0]", "methods={ft: {method: ft}, zero_shot: {trained: false}}", "pairs=[]"]
    )
    result = tmp_path / "experiment" / "cells" / "zero_shot-seed0" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text(damage)
    monkeypatch.setattr(run, "run_cell", lambda *_: pytest.fail("ran before the refusal"))
    with pytest.raises(
        UserError, match=r"zero_shot-seed0/result\.json.*damaged.*; delete the file to compute"
    ):
        run.run_experiment(experiment, tmp_path, "tiny")


def test_a_method_that_diverged_has_a_result(plan, tmp_path, monkeypatch):
    def diverged(experiment, cell):
        result = run_cell(experiment, cell)
        result["records"] = [record | {"nll_sum": float("nan")} for record in result["records"]]
        (Path(experiment.config(cell).output_dir) / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr(run, "run_cell", diverged)
    overrides = ["seeds=[0]", "methods={a: {trained: false}, b: {trained: false}}", "pairs=[[a, b]]"]
    run.run_experiment(load_experiment(plan, overrides), tmp_path, "tiny")
    results = json.loads((tmp_path / "tiny.json").read_text(), parse_constant=pytest.fail)
    assert results["methods"]["a"]["nll"] is None and results["paired"]["a_vs_b"]["nll"]["ci95"] is None
    assert "| a | 1 | not measured |" in (tmp_path / "tiny.md").read_text()


def test_a_cell_of_other_settings_is_not_taken(plan):
    experiment = load_experiment(plan)
    cell = experiment.cells()[0]
    run_cell(experiment, cell)
    assert result_of(experiment, cell) is not None
    for changes in (
        {"generated": 2},
        {"max_new_tokens": 5},
        {"train": {**experiment.train, "max_tokens": 99}},
    ):
        assert result_of(dataclasses.replace(experiment, **changes), cell) is None


def test_a_finished_cell_gets_a_score_that_was_added_since(plan):
    experiment = load_experiment(plan, ["seeds=[0]", "methods={qar: {experts: per_querier}}", "pairs=[]"])
    (cell,) = experiment.cells()
    run_cell(experiment, cell)
    expected = collect(experiment)
    assert expected["methods"]["qar"]["rouge1"] is not None
    path = Path(experiment.config(cell).output_dir) / "result.json"
    result = json.loads(path.read_text())
    for row in (*result["records"], *result["swapped"]):
        for key in ("rouge1", "bleu3"):
            row.pop(key)
    path.write_text(json.dumps(result))
    assert collect(experiment) == expected


def test_methods_are_scored_on_the_windows_that_all_have_room_for(plan, tmp_path, tiny_data, tiny_tokenizer):
    experiment = load_experiment(plan, ["seeds=[0]", "pairs=[[qar, zero_shot]]"])
    lengths = sorted(
        len(w.input_ids) for w in encode_all(tiny_data.dev, tiny_tokenizer, names_in_prompt=False)
    )
    tight = dataclasses.replace(experiment.methods[0], changes={"max_tokens": lengths[-1] - 1})
    experiment = dataclasses.replace(experiment, methods=(tight, experiment.methods[2]))
    run.run_experiment(experiment, tmp_path, "tiny")
    read = [{r["id"] for r in result_of(experiment, cell)["records"]} for cell in experiment.cells()]
    assert read[0] == read[1] and 0 < len(read[0]) < len(tiny_data.dev)
    results = json.loads((tmp_path / "tiny.json").read_text())
    assert results["conditions"]["held_out_windows"] == len(read[0]) and results["paired"]
    hopeless = dataclasses.replace(tight, changes={"max_tokens": 8})
    with pytest.raises(UserError, match="no held-out window"):
        cell_data(dataclasses.replace(experiment, methods=(hopeless,)), experiment.cells()[1])


def test_a_result_of_other_text_is_not_taken(plan, config, tiny_data):
    experiment = load_experiment(plan)
    cell = experiment.cells()[0]
    run_cell(experiment, cell)
    assert result_of(experiment, cell) is not None
    first, *rest = tiny_data.dev
    shown = dataclasses.replace(first.turns[-1], text="Something else.")
    changed = [dataclasses.replace(first, turns=(*first.turns[:-1], shown)), *rest]
    shutil.rmtree(config.data)
    write_mqdialog(dataclasses.replace(tiny_data, dev=changed), Path(config.data), "planted")
    windows._data.cache_clear()  # a process reads its data once
    assert result_of(experiment, cell) is None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed=1", "unknown key 'seed'; did you mean 'seeds'?"),
        ("seeds=3", "key 'seeds': got 3"),
        ("queriers=Hamlet", "key 'queriers': got 'Hamlet', expected a list of names"),
        ("generated=0", "key 'generated': got 0"),
        ("splits=[0, 0]", "key 'splits': got [0, 0], expected a list of distinct whole numbers"),
        ("splits=[0, 1]", "key 'splits': got [0, 1], but no 'responders' to prepare"),
        ("transcript=show.csv", "key 'transcript': got 'show.csv', but no 'responders' to prepare"),
        ("transcript=3", "key 'transcript': got 3, expected the path of a file"),
        ("columns={who: name}", "unknown key 'who'"),
        ("columns=name", "key 'columns': got 'name', expected a mapping"),
        ("columns={scene: 3}", "key 'columns': got {'scene': 3}, expected a mapping"),
        ("pairs=[[qar, control]]", "'control' is not one of the methods"),
        ("pairs=[[qar]]", "key 'pairs': got [['qar']], expected a list of pairs"),
        ("methods={ft: {trained: 3}}", "method 'ft': key 'trained': got 3, expected bool"),
        ("methods={a_vs_b: {}}", "joins two methods"),
        ("methods={ft: {methd: ft}, qar: {}}", "method 'ft': unknown key 'methd'; did you mean 'method'?"),
        ("methods={ft: {seed: 3}}", "'seed' is set for each cell"),
        ("train.epochs=no", "method 'zero_shot': key 'epochs'"),
        ("other.epochs=1", "expected key=value or train.key=value"),
        ("train.epochs=[", "override 'train.epochs=[': the value is not valid YAML"),
        ("transcript=5", "key 'transcript': got 5, expected the path of a file"),
        ("epochs", "expected key=value"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_runs(plan, override, complaint):
    with pytest.raises(UserError, match=complaint.replace("?", r"\?").replace("[", r"\[")):
        load_experiment(plan, [override])


def test_every_split_holds_other_dialogues_out_and_counts_in_the_table(plan, tmp_path):
    overrides = [
        "responders=[Horatio]",
        "splits=[0, 1]",
        "seeds=[0]",
        "methods={zero_shot: {trained: false}}",
    ]
    experiment = load_experiment(plan, [*overrides, "pairs=[]"])
    run.run_experiment(experiment, tmp_path, "tiny")
    assert [cell.name for cell in experiment.cells()] == ["zero_shot-seed0", "zero_shot-seed0-split1"]
    first, second = ({r["id"] for r in result_of(experiment, cell)["records"]} for cell in experiment.cells())
    assert first != second
    results = json.loads((tmp_path / "tiny.json").read_text())
    assert results["methods"]["zero_shot"]["examples"] == len(first | second)
    assert results["conditions"]["held_out_windows"] == len(first | second)
    assert [one["split"] for one in results["methods"]["zero_shot"]["per_seed"]] == [0, 1]
    assert "published" in (tmp_path / "tiny.md").read_text()


def test_a_transcript_of_ones_own_is_prepared(plan, tmp_path):
    lines = [
        f"day {day},{who},{what} {day}" for day in range(20) for who, what in (("Ann", "why"), ("Bo", "so"))
    ]
    (tmp_path / "show.csv").write_text("\n".join(["episode,who,text", *lines]))
    source = [f"transcript={tmp_path / 'show.csv'}", "columns={scene: episode, speaker: who}"]
    overrides = [*source, "responders=[Bo]", "methods={zero_shot: {trained: false}}", "pairs=[]", "seeds=[0]"]
    experiment = load_experiment(plan, overrides)
    run.run_experiment(experiment, tmp_path, "tiny")
    records = result_of(experiment, experiment.cells()[0])["records"]
    assert len(records) == 4 and {record["querier"] for record in records} == {"Ann > Bo"}
    demanding = load_experiment(plan, [*overrides, "min_turns=21", f"output_dir={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="nobody has at least 21 turns and 3 dialogues"):
        demanding.prepare()


def test_methods_are_compared_on_the_splits_that_both_have(plan, tmp_path):
    overrides = ["responders=[Horatio]", "splits=[0, 1]", "seeds=[0]", "pairs=[[a, b]]"]
    untrained = "methods={a: {trained: false}, b: {trained: false, names_in_prompt: false}}"
    experiment = load_experiment(plan, [*overrides, untrained])
    experiment.prepare()
    cells = experiment.cells()
    for cell in cells[:3]:
        run_cell(experiment, cell)
    results = collect(experiment)
    assert results["missing"] == ["b-seed0-split1"]
    assert len(results["paired"]["a_vs_b"]["nll"]["per_seed"]) == 1


def test_prompt_baselines_are_rows_of_the_table(plan, tmp_path):
    profiles = tmp_path / "profiles.yaml"
    names = ("Wren", "Ada", "Bram", "Cleo")
    profiles.write_text("\n".join(f"{name}: somebody who asks" for name in names))
    methods = {
        name: {"trained": False, "context": name, "profiles": str(profiles)}
        for name in ("role_profile", "querier_profile", "few_shot")
    }
    overrides = [f"methods={json.dumps(methods)}", "pairs=[[few_shot, role_profile]]", "train.max_tokens=300"]
    experiment = load_experiment(plan, overrides)
    run.run_experiment(experiment, tmp_path, "tiny")
    results = json.loads((tmp_path / "tiny.json").read_text())
    assert len({scores["nll"] for scores in results["methods"].values()}) == 3  # contexts reach the model
    with pytest.raises(UserError, match="without profiles"):
        load_experiment(plan, ["methods={ft: {context: role_profile}, qar: {}}"])


def test_the_papers_numbers_stand_beside():
    table = published_table(published())
    assert "| english | 5.90 | 6.50 | 5.24 | 5.54 | 5.35 | 7.21 |" in table
    for found in published().values():
        responders = [scores for name, scores in found.items() if name != "average"]
        assert len(responders) == 6
        for method, mean in found["average"].items():
            known = [scores[method] for scores in responders if scores[method] is not None]
            assert mean == pytest.approx(sum(known) / len(known), abs=0.01)


@pytest.mark.parametrize(
    "name",
    [
        "plays",
        "plays_all_replies",
        "company",
        "company_all_layers",
        "company_splits",
        "wesnoth",
        "wesnoth_seeds",
        "wesnoth_one_turn",
        "wesnoth_chinese",
    ],
)
def test_committed_results_are_what_their_page_shows(name, request):
    folder = request.config.rootpath / "docs/results"
    results = json.loads((folder / f"{name}.json").read_text())
    page = (folder / f"{name}.md").read_text()
    assert all(table in page for table in markdown(results).split("\n\n"))


def test_a_column_is_shown_where_a_method_has_its_score(request, monkeypatch):
    committed = json.loads((request.config.rootpath / "docs/results/company.json").read_text())
    before = markdown(committed)
    monkeypatch.setitem(wording.LABELS, "added", "added later")
    monkeypatch.setattr("train.experiment.table.TABLE", (*wording.TABLE, "added"))
    assert markdown(committed) == before
    first, *others = committed["methods"].values()
    first["added"] = 0.5
    head, _, *rows = markdown(committed).split("\n\n")[0].splitlines()
    assert head.endswith("| added later | empty or failed |")
    values = [row.split(" | ")[-2] for row in rows]
    assert values == ["50.0", *(len(others) * [NOT_MEASURED])]


def test_failed_replies_are_counted_beside_the_empty_ones(request):
    committed = json.loads((request.config.rootpath / "docs/results/company.json").read_text())
    next(iter(committed["methods"].values())).update(empty=2, failed=3)
    assert markdown(committed).splitlines()[2].endswith("| 5 |")


def test_the_readme_shows_the_plays(request):
    results = json.loads((request.config.rootpath / "docs/results/plays.json").read_text())
    readme = (request.config.rootpath / "README.md").read_text()
    assert all(table in readme for table in markdown(results).split("\n\n")[:2])
