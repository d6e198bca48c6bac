"""The schema, on every result file there is and on broken ones; comparison; what is made from results."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, dispatch_cells, report, scale, tables
from benchmarks.embedding import embed, embedded
from benchmarks.figures import figures
from benchmarks.schema import load, problems
from qar_kernels.dispatch_steps import faster_path, measured_steps
from train.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(report.RESULTS.glob("*.json"))


def row(provider, p50, base=1.0, op="fused_mlp", run="fwd", spread=0.01, **shape):
    place = {"T": 256, "Q": 8, "E": 64, "R": 64, "H": 4096, "I": 14336, "dtype": "bfloat16"} | shape
    ms = {"p20": p50 * (1 - spread), "p50": p50, "p80": p50 * (1 + spread)}
    return {
        "op": op, "provider": provider, "pass": run, **place,
        "ms": ms, "peak_bytes": 1024, "ratio_to_base": p50 / base, "launches": 3,
    }  # fmt: skip


def result(*rows):
    machine = {"name": "a-card", "device": "cuda", "processor": "p", "cores": 2, "date": "2026-01-01"}
    calibration = {"copy_bytes_per_s": 4e12, "gemm_flops_per_s": 7e14}
    machine |= {"accelerator": "A card", "calibration": calibration}
    return {"machine": machine, "versions": {"torch": "2.13.0"}, "rows": list(rows)}


def sound(**place):
    rows = [
        row(provider, p50, base=1.0, run=run, T=t, **place)
        for run in ("fwd", "fwd+bwd")
        for t in (16, 64, 256, 4096)
        for provider, p50 in {
            "base": 1.0,
            "ours": 1.1,
            "ours_fused": 1.1,
            "ours_grouped": 1.2,
            "loop": 1.05,
        }.items()
    ]
    rows += [
        row(provider, p50, base=1.0, op="decode", T=t, Q=t, S=8, L=2)
        for t in (1, 8)
        for provider, p50 in {"base": 1.0, "ours": 1.2, "loop": 1.8}.items()
    ]
    return result(*rows)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_files_are_valid(path):
    machine = load(path)["machine"]
    assert path.stem == f"{machine['name']}-{machine['date']}"


def test_a_sound_result_has_no_problem():
    assert list(problems(sound())) == []


def test_a_run_that_was_stopped_early_can_be_resumed():
    calibrated = result()
    refused = result()
    refused["refused"] = [row("ours", 1.0) | {"reason": "wrong"}]
    refused["machine"].pop("calibration")
    assert list(problems(calibrated)) == list(problems(refused)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["rows"][0].pop("dtype"), r"rows\[0\]: missing \['dtype'\]"),
        (lambda r: r["rows"][0].update(extra=1), "unknown keys"),
        (lambda r: r["rows"][0].update(op="other"), "op: got 'other'"),
        (lambda r: r["rows"][0].update({"pass": "bwd"}), "pass: got 'bwd'"),
        (lambda r: r["rows"][0].update(T=0), "T: got 0"),
        (lambda r: r["rows"][0].update(Q=True), "Q: got True"),
        (lambda r: r["rows"][0].update(E=1), "more queriers present than experts owned"),
        (lambda r: r["rows"][0].update(peak_bytes=-1), "peak_bytes: got -1"),
        (lambda r: r["rows"][0]["ms"].update(p20=2.0), "expected p20 <= p50 <= p80"),
        (lambda r: r["rows"][0]["ms"].update(p50=float("nan")), "expected positive"),
        (lambda r: r["rows"][1].update(ratio_to_base=1.0), "the times give 1.1"),
        (lambda r: r["rows"].append(copy.deepcopy(r["rows"][1])), "twice: fused_mlp ours"),
        (lambda r: r["machine"].update(folder="/home/somebody"), "machine: folder holds a path"),
        (lambda r: r["machine"].pop("cores"), "machine: missing cores"),
        (lambda r: r["versions"].clear(), "versions: missing torch"),
        (lambda r: r.update(more=1), "unknown keys"),
        (lambda r: r.update(machine=None), "machine: got NoneType, expected an object"),
        (lambda r: r.update(versions=[]), "versions: got list, expected an object"),
        (lambda r: r.update(rows=[]) or r["machine"].pop("calibration"), "rows: got none"),
        (lambda r: r.update(refused=[{"op": "x"}]), r"refused\[0\]: missing"),
    ],
)
def test_the_validator_names_what_is_wrong(change, said, tmp_path):
    broken = sound()
    change(broken)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    assert any(re.search(said, problem) for problem in problems(broken))
    with pytest.raises(UserError, match=r"broken\.json: "):
        load(path)


def test_compare_shows_what_became_slower(tmp_path, capsys):
    before, after = sound(), sound()
    slower = next(r for r in after["rows"] if r["provider"] == "ours")
    for name in slower["ms"]:
        slower["ms"][name] *= 1.3
    slower["ratio_to_base"] *= 1.3
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, content in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(path) for path in paths])
    assert stopped.value.code == 1
    assert "| SLOWER | fused_mlp fwd | ours |" in capsys.readouterr().out
    compare.main([str(path) for path in reversed(paths)])
    assert "0 slower, 1 faster" in capsys.readouterr().out
    compare.main([*(str(path) for path in paths), "--threshold", "0.4"])


def test_nothing_in_common_is_no_good_news(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, rank in zip(paths, (8, 16), strict=True):
        path.write_text(json.dumps(result(row("base", 1.0, R=rank), row("ours", 1.1, R=rank))))
    with pytest.raises(UserError, match="no row in common"):
        compare.main([str(path) for path in paths])


def test_compare_takes_the_spread_into_account():
    noisy = [result(row("base", 1.0), row("ours", p50, spread=0.2)) for p50 in (1.0, 1.3)]
    (change,) = compare.changes(*noisy)
    assert change.factor == pytest.approx(1.3)
    assert change.spread == pytest.approx(0.2 + 0.2 + 0.01 + 0.01)
    assert not change.beyond(0.1)


def test_losses_are_said_as_plainly_as_wins():
    text = tables.summary(sound())
    assert "fused_mlp fwd: against the fastest other way 0 wins, 4 ties" in text
    assert "decode fwd: against the fastest other way 2 wins" in text
    lost = result(row("base", 1.0), row("ours", 1.2), row("loop", 0.9))
    assert "LOSES  T 256, Q 8 of 64, R 64, H 4096, I 14336: loop takes 0.75 of our time" in tables.summary(
        lost
    )
    assert "loop | 0.75 |" in report.page("name", lost, [])


def test_a_page_of_ways_to_train_claims_no_check_and_no_standing():
    ways = [row(name, p50, op="finetune_step") for name, p50 in (("straightforward", 1.0), ("qar", 1.1))]
    text = report.page("name", result(*ways), [])
    assert "losses agree" in text and "float64" not in text and "Ours loses no cell" not in text


def test_ours_stands_with_the_faster_storage_of_gradients():
    rows = [row(name, p50, run="fwd+bwd") for name, p50 in (("base", 1.0), ("ours", 3.0), ("loop", 1.5))]
    assert tables.against_best({r["provider"]: r for r in rows}) == ("loop", 0.5)
    rows.append(row("ours_sparse", 1.2, run="fwd+bwd"))
    assert tables.against_best({r["provider"]: r for r in rows}) == ("loop", pytest.approx(1.25))


def test_dispatch_cells_are_what_dispatch_reads(tmp_path):
    cells = dispatch_cells.dispatch_cells(sound())
    namespace = {}
    exec(dispatch_cells.source(cells), namespace)
    assert namespace["MEASUREMENTS"] == cells
    kind, near = ("A card", "bfloat16", True), (8, 300)
    assert faster_path(measured_steps(cells, *kind, False), 4096, 14336, 64, *near) == "fused"
    adapted = dispatch_cells.dispatch_cells(sound(A=16))
    assert faster_path(measured_steps(adapted, *kind, True), 4096, 14336, 64, *near) == "fused"
    assert measured_steps(adapted, *kind, False) == measured_steps(cells, *kind, True) == ()
    path, table = tmp_path / "result.json", tmp_path / "table.py"
    path.write_text(json.dumps(sound()))
    dispatch_cells.main([str(path), "--out", str(table)])
    assert table.read_text() == dispatch_cells.source(cells)
    for tidy in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *tidy, str(table)], check=True, cwd=ROOT)
    assert faster_path(measured_steps(cells, *kind, False), 4096, 14336, 16, *near) is None


def test_report_writes_pages_and_figures(tmp_path, capsys):
    path = tmp_path / "a-card.json"
    path.write_text(json.dumps(sound()))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\nafter\n")
    report.main([str(path), "--out", str(tmp_path / "pages"), "--readme", str(readme)])
    page = (tmp_path / "pages" / "a-card.md").read_text()
    names = [name for name, _ in figures(sound())]
    assert {"mlp-over-base-fwd-h4096-r64", "roofline-h4096-r64", "decode-tokens"} <= set(names)
    for name in names:
        assert (tmp_path / "pages" / f"a-card-{name}.svg").read_text().startswith("<svg")
        assert f"(a-card-{name}.svg)" in page
    written = readme.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert "| `decode` fwd | 2 / 0 / 0 |" in written


def test_readme_says_what_the_committed_files_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = embedded(text, report.MARKER)
    named = {path.stem: load(path) for path in FILES if f"docs/results/{path.stem}.md" in part}
    assert part == report.fragment(named)
    for name, content in named.items():
        drawn = [figure for figure, _ in figures(content)]
        page = (ROOT / report.PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert page == report.page(name, content, drawn)


def test_scale_document_embeds_the_tables():
    document = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for name, table in scale.tables().items():
        assert embedded(document, name) == table + "\n"


def test_scale_formulas():
    assert scale.expert_bytes() == 2 * 3 * 64 * 4096 * 32  # the 50 MB of a querier
    assert scale.expert_bytes(rank=128) == 2 * scale.expert_bytes()
    assert scale.decode_bytes(8) - scale.decode_bytes(0) == 8 * scale.expert_bytes()
    assert scale.training_bytes(4, 4, 8) == 2 * scale.training_bytes(2, 2, 4)
    taken = 2 * scale.PARAMETERS + scale.cache_bytes() + scale.gpu_slots() * scale.expert_bytes()
    assert 0 <= scale.GPU_BYTES - taken < scale.expert_bytes()


def test_embedding_needs_its_markers():
    with pytest.raises(UserError, match="expected the markers <!-- there: begin -->"):
        embed("text", "there", "more")
