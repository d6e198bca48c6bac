"""Result files as pages and figures: ``python -m benchmarks.report [FILE...] [--readme README.md]``.

For every file ``docs/results/NAME.md`` and its figures; with ``--readme`` also the part of it between the two
markers. Every number comes from the files given, which are checked first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks import tables
from benchmarks.embedding import embed
from benchmarks.figures import figures
from benchmarks.schema import OPS, PASSES, load
from train.cli import run
from train.files import read_text, write_atomic

RESULTS = Path(__file__).parent / "results"
PAGES = Path("docs/results")
MARKER = "benchmarks"
_NONE = "No result file is committed yet. `make bench` writes one, `make bench-gpu` on a CUDA card another.\n"
_TOKEN_OPS = ("prefill", "decode", "train_step", "generate", "finetune_step")
_FINETUNE = """\
The ways took turns, step by step, on the same batches, and their losses agree at every step. Wall time,
medians [20th, 80th percentile].
"""
_EXPLANATION = """\
Every provider was checked against the float64 reference before it was timed. Rounds in turns, medians
[20th, 80th percentile]; `ours` is what `backend="auto"` picks, `ours_...` are its forced paths, its other
tower and its other storage of expert gradients (`ours_sparse`). The last column is the time of the fastest
provider that is not ours and computes experts too, over the faster of `ours` and `ours_sparse` (a setting
that users choose for their number of queriers): above 1, ours is faster.
`peft_mixed` computes another function with about as many parameters (rank-matched LoRA, inference only).
"""


def page(name: str, result: dict, figure_names: list[str]) -> str:
    """The Markdown page of one result file."""
    parts = [f"# {_title(result)}", _conditions(name, result)]
    if {row["op"] for row in result["rows"]} == {"finetune_step"}:  # ways to train, none of which is a rival
        parts += [_FINETUNE]
    else:
        parts += [_EXPLANATION, "## Where ours stands", tables.standings_table(result), _losses(result)]
    parts += [f"![{figure}]({name}-{figure}.svg)" for figure in figure_names]
    for op in OPS:
        for run_ in PASSES:
            parts += _operation(result, op, run_)
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _operation(result: dict, op: str, run_: str) -> Iterator[str]:
    table = tables.operation_table(result, op, run_)
    if not table:
        return
    yield f"## `{op}` {run_}"
    yield f"Ratios to `{OPS[op]}`."
    yield table
    if op in _TOKEN_OPS:
        yield "Tokens per second:"
        yield tables.value_table(result, op, run_, tables.tokens_per_second)
    yield "Peak memory above what was held before, MiB / launches (CPU: operators called):"
    yield tables.value_table(result, op, run_, tables.footprint)


def _title(result: dict) -> str:
    machine = result["machine"]
    return f"{machine.get('accelerator', machine['processor'])}, {machine['date']}"


def _conditions(name: str, result: dict) -> str:
    machine = "; ".join(f"{key} {value}" for key, value in result["machine"].items() if key != "calibration")
    packages = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    lines = [f"From `benchmarks/results/{name}.json`.", f"Machine: {machine}.", f"Versions: {packages}."]
    calibration = result["machine"].get("calibration", {})
    lines += [f"Calibration: {key} {value:.4g}." for key, value in calibration.items()]
    return "\n".join(lines)


def _losses(result: dict) -> str:
    """Every cell that ours loses, in full."""
    lost = [
        [f"`{s.op}` {s.run}", tables.place(row), best, f"{factor:.2f}"]
        for s in tables.standings(result)
        for factor, best, row in s.losses
    ]
    refused = [
        f"- not timed: `{r['op']}` {r['pass']} `{r['provider']}`, {tables.place(r)}: {r['reason']}"
        for r in result.get("refused", [])
    ]
    if not lost:
        return "\n".join(["Ours loses no cell.", *refused])
    table = tables.markdown(["ours loses", "cell", "to", "its time / ours"], lost)
    return "\n\n".join([table, "\n".join(refused)])


def fragment(results: Mapping[str, dict]) -> str:
    """README's part: for every file its conditions in a line, where ours stands and the first figure."""
    return "\n".join(_readme_part(name, result) for name, result in results.items()) or _NONE


def _readme_part(name: str, result: dict) -> str:
    link = f"[all tables, each loss, figures]({PAGES.as_posix()}/{name}.md)"
    threads = result["machine"].get("threads", result["machine"]["cores"])
    parts = [f"{_title(result)}, torch {result['versions']['torch']}, {threads} thread(s) ({link}):"]
    if tables.standings(result):
        parts.append(tables.standings_table(result))
    else:
        found = [tables.operation_table(result, op, run_) for op in OPS for run_ in PASSES]
        parts += [table for table in found if table]
    first = next(figures(result), None)
    if first:
        parts.append(f"![{first[0]}]({PAGES.as_posix()}/{name}-{first[0]}.svg)")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Write pages, figures and README's part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    parser.add_argument("--out", type=Path, default=PAGES, help=f"folder of the pages (default {PAGES})")
    parser.add_argument("--readme", type=Path, help="also write this file's part between the markers")
    args = parser.parse_args(argv)
    results = {path.stem: load(path) for path in args.files or sorted(RESULTS.glob("*.json"))}
    for name, result in results.items():
        drawn = dict(figures(result))
        for figure, svg in drawn.items():
            write_atomic(args.out / f"{name}-{figure}.svg", svg)
        write_atomic(args.out / f"{name}.md", page(name, result, list(drawn)))
        sys.stdout.write(f"{args.out / name}.md and {len(drawn)} figures\n")
    if args.readme:
        write_atomic(args.readme, embed(read_text(args.readme), MARKER, fragment(results)))


if __name__ == "__main__":
    run(main)
