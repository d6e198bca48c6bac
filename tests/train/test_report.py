import copy
import json
import os
import re
import sys
from html.parser import HTMLParser

import fake_run
import pytest

from train import evaluate
from train.experiment.figure import figure
from train.experiment.results import finite
from train.experiment.table import NOT_MEASURED, markdown
from train.metrics import compare, summarise, swap_summary, wording
from train.plotting import PALETTE
from train.report import charts, render, sections, write_html
from train.report.findings import findings, headline

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
    return fake_run.parts()


@pytest.fixture(scope="module")
def page(run):
    return render(**run)


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
    parts = copy.deepcopy(run)
    parts["results"]["conditions"]["responders"] = ['"><i>']
    for method in ("ft", "qar"):
        scores = parts["results"]["methods"][method]["per_querier"]
        scores["<u>"] = scores["Amy"]
    parts["similarity"]["names"][0] = "<s>"
    page = render(**parts)
    assert "&lt;script&gt;alert(" in page and "&lt;b&gt;tonight&lt;/b&gt; &amp; talk" in page
    assert not {"script", "b>tonight", "i", "u", "s"} & set(Collector(page).tags)


def test_where_one_person_asks_there_is_nobody_to_swap_or_compare_with(run):
    alone = {"names": ["Amy"], "matrix": [[1.0]]}
    page = render(**run | {"results": run["results"] | {"swap": {}}, "similarity": alone})
    assert set(SECTIONS) - set(titles(page)) == {"Querier swap", "Querier similarity"}
    assert "Asked as another querier" not in page


def test_a_diverged_method_is_reported_not_hidden(run):
    broken = [row | {"nll_sum": float("nan")} for row in fake_run.records("qar")]
    methods = run["results"]["methods"] | {"qar": summarise(broken)}
    paired = {"qar_vs_ft": compare(broken, fake_run.records("ft"))}
    swap = {"qar": swap_summary(broken, broken)}
    results = finite(run["results"] | {"methods": methods, "paired": paired, "swap": swap})
    assert results["methods"]["qar"]["nll"] is None
    curves = run["curves"] | {"qar": [{"step": 0, "lm_loss": 3.0}, {"step": 1, "lm_loss": float("nan")}]}
    page = render(**run | {"results": results, "curves": curves})
    assert "QAR has no finite NLL" in page and "QAR is better than FT on ROUGE-L." in page
    assert "By querier" not in titles(page)
    assert "Asked as another querier" not in page and "nan" not in page


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
    assert expected in headline({"paired": {"qar_vs_ft": paired}})


@pytest.mark.parametrize(
    ("ci", "expected"),
    [
        ([0.1, 0.3], "does use the id"),
        ([-0.1, 0.3], "no sign"),
        ([-0.3, -0.1], "do not help"),
        (None, "not evidence"),
    ],
)
def test_swap_sentence_follows_its_interval(run, ci, expected):
    swap = {"nll_diff": 0.1, "nll_ci95": ci}
    lines = findings(run["results"] | {"swap": {"qar": swap}}, run["planted"])
    assert any(expected in line for line in lines)


def test_scores_are_shown_in_nats_and_points(run, page):
    qar = run["results"]["methods"]["qar"]
    low, high = (f"{100 * end:.1f}" for end in qar["ci95"]["rougeL"])
    assert f"{100 * qar['rougeL']:.1f} <small>[{low}, {high}]</small>" in page
    assert f"QAR {qar['nll']:.3f}, FT" in page
    change = f"{run['results']['paired']['qar_vs_ft']['nll']['diff']:+.3f}".replace("-", "\N{MINUS SIGN}")
    assert f"difference {change} [" in page


def test_the_largest_gain_comes_first(run):
    methods = run["results"]["methods"]
    nll = {side: {name: own["nll"] for name, own in methods[side]["per_querier"].items()} for side in PALETTE}
    names = [cells[0][0] for _, cells in sections.per_querier(methods).numbers.rows]
    assert names == sorted(fake_run.QUERIERS, key=lambda name: nll["qar"][name] - nll["ft"][name])


@pytest.mark.parametrize(
    ("change", "drawn", "other"), [(-0.1, "#123456", "#654321"), (0.1, "#654321", "#123456")]
)
def test_a_loss_that_falls_has_the_colour_of_the_better(change, drawn, other):
    figure = charts.difference_bars(["Amy"], [change], "#123456", "#654321", "")
    assert drawn in figure and other not in figure


def test_figures_say_which_side_is_which(run):
    assert "(right is better)" in figure(run["results"], {})
    assert charts._error([1.0], [(0.5, 3.0)]).tolist() == [[0.5], [2.0]]
    alike = charts.heat_map(["Amy", "Raj"], [[1.0, 0.25], [0.25, 1.0]], "cosine")
    assert ">0.25<" in alike and ">1.00<" not in alike  # the diagonal is blank


@pytest.fixture
def compared_too(monkeypatch):
    """``COMPARED`` with one score more, wherever it is read."""
    more = (*wording.COMPARED, "rouge1")
    for name, module in list(sys.modules.items()):
        if name.startswith("train.") and name != "train.heldout" and hasattr(module, "COMPARED"):
            monkeypatch.setattr(module, "COMPARED", more)


def test_a_score_that_is_compared_too_is_shown_wherever_the_others_are(compared_too):
    parts = fake_run.parts()
    results = parts["results"] | {"missing": []}
    assert {"rouge1_true", "rouge1_swapped", "rouge1_diff", "rouge1_ci95"} <= set(results["swap"]["qar"])
    page = render(**parts)
    assert page.count("<svg") == 11  # a figure more of the methods, and one of the swap
    assert "ROUGE-1 (higher is better): QAR " in page and "ROUGE-1: swapped − true = " in page
    assert "<th>ROUGE-1, FT</th>" in page.replace(' scope="col"', "")
    for scores in results["methods"].values():
        scores["per_seed"] = [{}]
    head, _, first, *_ = markdown(results).split("\n\n")[1].splitlines()
    assert head.endswith("| ROUGE-1 |") and NOT_MEASURED not in first
    assert "ROUGE-1 of generated replies" in re.sub(r"<!--|-->", "", figure(results, {}))
    found = {"scores": results["methods"]["qar"], "swap": results["swap"]["qar"], "left_out": 0}
    assert any("ROUGE-1: " in note for note in evaluate._notes(found))


def test_what_was_compared_without_a_score_stays_as_it_was(compared_too, monkeypatch, request):
    results = json.loads((request.config.rootpath / "docs/results/company.json").read_text())
    for differences in results["paired"].values():
        differences.pop("rouge1")
    page = (request.config.rootpath / "docs/results/company.md").read_text()
    assert all(table in page for table in markdown(results).split("\n\n"))
    lacking = {"nll": {"diff": -0.1, "ci95": [-0.2, -0.1]}}
    assert headline({"paired": {"qar_vs_ft": lacking}}) == "QAR is better than FT on NLL per token."


def test_the_page_says_what_the_scores_are_over(run, page):
    rows = fake_run.records("qar")
    tokens = sum(row["tokens"] for row in rows)
    assert (
        f"NLL (in nats) and perplexity of all {tokens} reply tokens of {len(rows)} held-out windows;" in page
    )


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("paper", ["#ffffff", "#15181b"])
@pytest.mark.parametrize("method", PALETTE)
def test_palette_stands_out_in_both_themes(method, paper):
    light, dark = sorted((luminance(PALETTE[method]), luminance(paper)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 2.9


def test_an_interrupted_write_leaves_the_old_file(page, tmp_path, monkeypatch):
    path = write_html(page, tmp_path / "new" / "run")
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_html("another", path.parent)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["report.html"]
