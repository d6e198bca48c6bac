import copy
import json
import os
import re
from html.parser import HTMLParser

import fake_run
import pytest

from train import cli
from train.metrics import summarise
from train.report import render, write_report
from train.report.__main__ import main
from train.report.charts import PALETTE
from train.report.wording import findings, headline

SECTIONS = (
    "Methods",
    "One question, several queriers",
    "By querier",
    "Querier swap",
    "Planted test",
    "Querier similarity",
    "Training",
    "Run",
)


@pytest.fixture(scope="module")
def run():
    return fake_run.report(), fake_run.curves(), fake_run.similarity(), fake_run.samples()


@pytest.fixture(scope="module")
def page(run):
    return render(*run)


class Collector(HTMLParser):
    """Tags opened, attributes that load or link, and whether every tag is closed in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, page):
        super().__init__()
        self.tags, self.targets, self.stack = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [value for name, value in attrs if name.split(":")[-1] in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def titles(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_page_is_self_contained_and_well_formed(page):
    found = Collector(page)
    assert found.stack == []
    assert not {"script", "link", "img", "image", "iframe"} & set(found.tags)
    assert all(target.startswith("#") for target in found.targets)
    assert not re.search(r"url\((?!#)|@import", page)
    assert "default-src 'none'" in page


def test_all_sections_and_figures_are_there(page):
    assert titles(page) == list(SECTIONS)
    assert page.count("<svg") == 9
    assert 'role="img"' in page and "佟湘玉" in page


def test_text_from_data_is_escaped(run):
    report = copy.deepcopy(run[0])
    report["dataset"]["show"] = '"><i>'
    report["methods"]["<u>"] = report["methods"]["ft"]
    page = render(report, {"<s>": [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.9}]}, *run[2:])
    assert "&lt;script&gt;alert(" in page and "&lt;b&gt;tonight&lt;/b&gt; &amp; talk" in page
    assert not {"script", "b>tonight", "i", "u", "s"} & set(Collector(page).tags)


def test_missing_parts_leave_their_section_out(run):
    scores = {key: run[0]["methods"]["ft"][key] for key in ("nll", "rougeL", "ci95")}
    report = {"methods": {"ft": scores | {"rougeL": None}}, "paired": None, "querier_swap": None}
    page = render(report, {}, None, [])
    assert titles(page) == ["Methods"]
    assert page.count("<svg") == 1  # NLL alone: there is no ROUGE-L to draw
    assert "does not compare" in page and "None" not in page and "nan" not in page


def test_a_diverged_method_is_reported_not_hidden(run, tmp_path):
    broken = [row | {"nll_sum": float("nan")} for row in fake_run.records("qar")]
    scores = summarise(broken)
    assert scores["ci95"]["nll"] is None
    report = run[0] | {"methods": run[0]["methods"] | {"qar": scores}, "paired": None}
    page = write_report(report, tmp_path, *run[1:]).read_text()
    assert "QAR has no finite NLL" in page and "does not compare" in page
    assert "By querier" not in titles(page)


def test_an_empty_reply_is_shown_as_empty(page):
    assert "(empty reply)" in page
    assert "2 of 240 replies were empty" in page


@pytest.mark.parametrize(
    ("nll", "rouge", "expected"),
    [
        ([-0.2, -0.1], [0.01, 0.02], "QAR is better than FT on NLL per token and ROUGE-L."),
        ([0.1, 0.2], [-0.02, -0.01], "QAR is worse than FT on NLL per token and ROUGE-L."),
        (
            [-0.2, -0.1],
            [-0.01, 0.02],
            "better than FT on NLL per token, and not clearly different from FT on ROUGE-L (the",
        ),
        ([0.1, 0.2], [0.01, 0.02], "better than FT on ROUGE-L, and worse than FT on NLL per token"),
        ([-0.1, 0.1], None, "compared with FT on ROUGE-L without an interval"),
        (
            [-0.1, 0.0],
            [0.0, 0.1],
            "not clearly different from FT on NLL per token and ROUGE-L (the 95 % interval includes",
        ),
    ],
)
def test_headline_claims_what_the_intervals_allow(nll, rouge, expected):
    paired = {"nll": {"diff": 0.0, "ci95": nll}, "rougeL": {"diff": 0.0, "ci95": rouge}}
    assert expected in headline({"methods": {}, "paired": {"qar_vs_ft": paired}})


@pytest.mark.parametrize(
    ("ci", "expected"),
    [
        ([0.1, 0.3], "does use the id"),
        ([-0.1, 0.3], "no sign"),
        ([-0.3, -0.1], "do not help"),
        (None, "not evidence"),
    ],
)
def test_swap_sentence_follows_its_interval(ci, expected):
    swap = {"nll_diff": 0.1, "nll_ci95": ci}
    assert expected in findings({"methods": {}, "querier_swap": swap})[0]


def test_scores_are_shown_in_nats_and_points(run, page):
    qar = run[0]["methods"]["qar"]
    low, high = (f"{100 * end:.1f}" for end in qar["ci95"]["rougeL"])
    assert f"{100 * qar['rougeL']:.1f} <small>[{low}, {high}]</small>" in page
    assert f"QAR {qar['nll']:.3f}, FT" in page
    change = f"{run[0]['paired']['qar_vs_ft']['nll']['diff']:+.3f}".replace("-", "\N{MINUS SIGN}")
    assert f"difference {change} [" in page


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("paper", ["#ffffff", "#15181b"])
@pytest.mark.parametrize("method", PALETTE)
def test_palette_stands_out_in_both_themes(method, paper):
    light, dark = sorted((luminance(PALETTE[method]), luminance(paper)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 2.9


def test_write_report_writes_page_and_valid_json(run, tmp_path):
    report = run[0] | {"seconds": {"train_qar": float("nan")}}
    path = write_report(report, tmp_path / "new" / "run", *run[1:])
    assert path.name == "report.html" and sorted(os.listdir(path.parent)) == ["report.html", "report.json"]
    saved = json.loads((path.parent / "report.json").read_text(), parse_constant=pytest.fail)
    assert saved["methods"]["qar"]["nll"] == report["methods"]["qar"]["nll"]
    assert saved["seconds"] == {"train_qar": None}


def test_a_page_that_cannot_be_rendered_leaves_the_old_files(run, tmp_path):
    write_report(*run[:1], tmp_path, *run[1:])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyError):
        write_report({"methods": {}}, tmp_path, {}, None, [{"reference": "no query"}])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_write_leaves_the_old_file(run, tmp_path, monkeypatch):
    path = write_report(*run[:1], tmp_path, *run[1:])
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report({"methods": {}}, tmp_path, {}, None, [])
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]


def save_run(folder, run):
    for name, part in zip(("report", "curves", "similarity", "samples"), run, strict=True):
        (folder / f"{name}.json").write_text(json.dumps(part))


def test_command_line_renders_the_same_page(run, tmp_path, capsys):
    path = write_report(*run[:1], tmp_path, *run[1:])
    first = path.read_bytes()
    path.unlink()
    save_run(tmp_path, run)
    main([str(tmp_path)])
    assert path.read_bytes() == first
    assert capsys.readouterr().out == f"{path}\n"


def test_command_line_needs_report_json_only(run, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(run[0]))
    main([str(tmp_path)])
    assert "Training" not in titles((tmp_path / "report.html").read_text())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("report.json", None, "report.json: cannot be read"),
        ("report.json", '{"methods": {', "report.json:1: damaged JSON"),
        ("report.json", "[]", "report.json: damaged, expected a JSON object"),
        ("report.json", "{}", "lacks what the report needs"),
        ("curves.json", "", "curves.json: the file is empty"),
        ("samples.json", "{}", "samples.json: damaged, expected a JSON list"),
        ("samples.json", "[{}]", "lacks what the report needs"),
        ("similarity.json", '{"names": ["a", "b"], "matrix": [[1]]}', "lacks what the report needs"),
    ],
)
def test_command_line_names_what_is_damaged_in_one_line(run, tmp_path, capsys, name, content, expected):
    save_run(tmp_path, run)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as error:
        cli.run(lambda: main([str(tmp_path)]))
    assert error.value.code == cli.USER_ERROR_EXIT
    shown = capsys.readouterr().err
    assert expected in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "report.html").exists()
