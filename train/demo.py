"""The whole way, once: prepare data, fine-tune, evaluate, generate, report.

    python -m train.demo --config train/configs/demo.yaml --planted train/configs/planted.yaml

Every stage leaves its result in the run folder; what is there for the same settings is used again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from train.base_model import load_base
from train.cli import run
from train.comparison import GENERATED, MAX_NEW_TOKENS, METHODS, Comparison
from train.config import TrainConfig, load_config
from train.data.layout import MQDialog
from train.data.mqdialog import load_mqdialog
from train.data.planted import HABITS, habit_of
from train.data.prepare import PrepareConfig, prepare
from train.files import load_json, write_atomic
from train.finetune import LOG, finetune
from train.metrics import compare, summarise, swap_summary
from train.report import write_report

PLANTED_SAMPLES = 1
console = Console()


class Stages:
    """Announces stages and times them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run a stage."""
        console.rule(f"[bold]{name}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def reuse(path: Path, settings: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """What ``path`` holds if it was computed with the same settings, else what ``compute`` returns."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if path.is_file():
        stored = load_json(path)
        if stored["key"] == key:
            console.print(f"{path} is there already")
            return stored["value"]
    value = compute()
    write_atomic(path, json.dumps({"key": key, "value": value}, ensure_ascii=False))
    return value


def demo(config: TrainConfig, planted: TrainConfig, responder: str) -> Path:
    """Run all stages; returns the report's page."""
    folder = Path(config.output_dir).parent
    stage = Stages()
    with stage("prepare data"):
        config = config.replace(data=str(prepare(PrepareConfig("plays", responder))))
        planted = planted.replace(data=str(prepare(PrepareConfig("planted"))))
        data, planted_data = load_mqdialog(Path(config.data)), load_mqdialog(Path(planted.data))
        _show(data)
    with stage("prepare model"):
        load_base(config.model)
    for method in ("ft", "qar"):
        with stage(f"fine-tune {method}"):
            finetune(_for_method(config, method), resume=True)
    comparison = Comparison(config, data, lambda method: _for_method(config, method))
    settings = {"config": config.to_dict(), "count": GENERATED, "tokens": MAX_NEW_TOKENS}
    results = {}
    for method in METHODS:
        with stage(f"evaluate {method}"):
            path = folder / f"evaluation_{method}.json"
            results[method] = reuse(path, settings, lambda method=method: comparison.evaluate(method))
    with stage("planted habits"):
        habits = reuse(
            folder / "evaluation_planted.json",
            {"config": planted.to_dict()},
            lambda: _recovered_habits(planted, planted_data),
        )
    with stage("report"):
        report = _report(config, data, results, habits, _working_seconds(folder, config, stage.seconds))
        page = _write(folder, report, config, results["qar"], habits["samples"])
    _summarise(report, page)
    return page


def _for_method(config: TrainConfig, method: str) -> TrainConfig:
    """The same budget with another method, beside the configured run."""
    return config.replace(method=method, output_dir=str(Path(config.output_dir).with_name(method)))


def _recovered_habits(config: TrainConfig, data: MQDialog) -> dict[str, Any]:
    """How often a held-out reply shows the habit of the one who asks; the prompt does not name them."""
    comparison = Comparison(config, data, lambda method: _for_method(config, method))
    hits: dict[str, list[bool]] = {}
    for method in ("ft", "qar"):
        finetune(_for_method(config, method), resume=True)
        model = comparison.load(method).model
        replies, asked_by = comparison.replies(model)
        hits[method] = [habit_of(reply) == asker for reply, asker in zip(replies, asked_by, strict=True)]
    samples = comparison.samples(model, range(PLANTED_SAMPLES))
    per_querier = {
        habit.querier: {
            method: _mean([hit for hit, asker in zip(found, asked_by, strict=True) if asker == index])
            for method, found in hits.items()
        }
        for index, habit in enumerate(HABITS)
    }
    return {
        "qar_accuracy": _mean(hits["qar"]),
        "ft_accuracy": _mean(hits["ft"]),
        "chance": 1 / len(HABITS),
        "examples": len(asked_by),
        "per_querier": per_querier,
        "samples": samples,
    }


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def _report(
    config: TrainConfig,
    data: MQDialog,
    results: dict[str, Any],
    habits: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    records = {method: result["records"] for method, result in results.items()}
    swapped = results["qar"]["swapped"]  # None where only one person asks
    return {
        "dataset": {
            "show": "plays",
            "responder": data.responder,
            "queriers": len(data.queriers),
            "train_windows": len(data.train),
            "dev_windows": len(data.dev),
            "generated": GENERATED,
            "reply_tokens": sum(record["tokens"] for record in records["qar"]),
        },
        "model": config.to_dict(),
        "methods": {method: summarise(found) for method, found in records.items()},
        "paired": {
            "qar_vs_ft": compare(records["qar"], records["ft"]),
            "ft_vs_zero_shot": compare(records["ft"], records["zero_shot"]),
        },
        "querier_swap": swap_summary(records["qar"], swapped) if swapped else None,
        "planted": {key: value for key, value in habits.items() if key != "samples"},
        "seconds": seconds,
    }


def _working_seconds(folder: Path, config: TrainConfig, seconds: dict[str, float]) -> dict[str, float]:
    """A stage that was reused counts with the time it took when it ran, under the same settings."""
    path = folder / "report.json"
    before = load_json(path) if path.is_file() else {}
    if before.get("model") != json.loads(json.dumps(config.to_dict())):
        return seconds
    return {name: max(spent, before["seconds"].get(name, 0.0)) for name, spent in seconds.items()}


def _write(
    folder: Path,
    report: dict[str, Any],
    config: TrainConfig,
    qar: dict[str, Any],
    planted: list[dict[str, Any]],
) -> Path:
    curves = {}
    for method in ("ft", "qar"):
        log = load_json(Path(_for_method(config, method).output_dir) / LOG)
        curves[method] = [row for row in log if "loss" in row]
    parts = {"curves": curves, "similarity": qar["similarity"], "samples": planted + qar["samples"]}
    for name, part in parts.items():
        write_atomic(folder / f"{name}.json", json.dumps(part, ensure_ascii=False, indent=1))
    return write_report(report, folder, **parts)


def _show(data: MQDialog) -> None:
    console.print(
        f"{data.responder}: {len(data.queriers)} queriers, {len(data.train)} training windows, "
        f"{len(data.dev)} held out"
    )


def _summarise(report: dict[str, Any], page: Path) -> None:
    table = Table("method", "NLL per token", "ROUGE-1", "ROUGE-2", "ROUGE-L")
    for method, scores in report["methods"].items():
        low, high = scores["ci95"]["nll"]
        rouges = [f"{100 * scores[key]:.1f}" for key in ("rouge1", "rouge2", "rougeL")]
        table.add_row(method, f"{scores['nll']:.3f} [{low:.3f}, {high:.3f}]", *rouges)
    console.print(table)
    paired, swap, habits = report["paired"]["qar_vs_ft"]["nll"], report["querier_swap"], report["planted"]
    console.print(f"QAR - FT, NLL per token: {paired['diff']:+.3f} {_interval(paired['ci95'])}")
    if swap:
        console.print(f"asked as somebody else:  {swap['nll_diff']:+.3f} {_interval(swap['nll_ci95'])}")
    console.print(
        f"planted habits: QAR {habits['qar_accuracy']:.0%}, FT {habits['ft_accuracy']:.0%}, "
        f"chance {habits['chance']:.0%}"
    )
    total = sum(report["seconds"].values())
    console.print(f"{page} ({total:.0f} s)")


def _interval(bounds: list[float]) -> str:
    return f"[{bounds[0]:+.3f}, {bounds[1]:+.3f}]"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("train/configs/demo.yaml"))
    parser.add_argument("--planted", type=Path, default=Path("train/configs/planted.yaml"))
    parser.add_argument("--responder", default="Falstaff", help="who answers, in all plays")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace keys of --config")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.disable_progress_bar()  # of loading weights; the stages have bars of their own
    config = load_config(arguments.config, arguments.overrides)
    demo(config, load_config(arguments.planted), arguments.responder)


if __name__ == "__main__":
    run(main)
