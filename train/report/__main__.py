"""`python -m train.report RUN_DIR`: render report.html again from the JSON files of a run."""

import argparse
import sys
from pathlib import Path
from typing import Any

from train.cli import run
from train.errors import UserError
from train.files import load_json
from train.report import render, write_html


def _read(path: Path, kind: type, default: Any = None) -> Any:
    """The JSON in `path`; `default`, if there is one, for a file that is absent."""
    if default is not None and not path.exists():
        return default
    value = load_json(path)
    if not isinstance(value, kind):
        raise UserError(f"{path}: damaged, expected a JSON {'object' if kind is dict else 'list'}")
    return value


def rerender(run_dir: Path) -> Path:
    """Render `run_dir`/report.html from report.json and, if present, curves, similarity and samples.

    Raises UserError if report.json is missing or any of the files is damaged.
    """
    report = _read(run_dir / "report.json", dict)
    curves = _read(run_dir / "curves.json", dict, {})
    similarity = _read(run_dir / "similarity.json", dict, {})
    samples = _read(run_dir / "samples.json", list, [])
    try:
        page = render(report, curves, similarity, samples)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run_dir}: a JSON file lacks what the report needs ({error!r})") from error
    return write_html(page, run_dir)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder with report.json")
    path = rerender(parser.parse_args(arguments).run_dir)
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    run(main)
