"""The page of one training run: its curves and its settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from train.plotting import PALETTE
from train.report import charts, write_html
from train.report.page import document
from train.report.sections import Section, facts

Rows = Sequence[Mapping[str, Any]]
# caption -> the logged values that the figure shows, and their names in the legend
FIGURES = {
    "Loss": {"lm_loss": "language model", "contrastive_loss": "contrastive"},
    "Validation, NLL per token of the last reply": {"valid_nll": "after each epoch"},
    "Learning rate": {"learning_rate": "LoRA", "expert_learning_rate": "experts and heads"},
    "Gradient norm before clipping": {"grad_norm": "all parameters"},
    "Tokens per second": {"tokens_per_second": "all ranks, without padding"},
}
STROKES = (PALETTE["ft"], PALETTE["qar"])


def write_run_page(rows: Rows, settings: Mapping[str, Any], folder: Path) -> Path:
    """Write ``report.html`` into ``folder``.

    Args:
        rows: what transformers logged, one row a step (``step``, ``loss``, ``lm_loss``, ...).
        settings: those of the run, as :meth:`train.config.TrainConfig.to_dict` gives them.
        folder: the output_dir of the run.
    """
    steps = [row for row in rows if "loss" in row]
    last = steps[-1]["lm_loss"] if steps else float("nan")
    found = [f"{len(steps)} steps, last loss {last:.3f}"]
    drawn = [(caption, _chart(rows, names)) for caption, names in FIGURES.items() if _has(rows, names)]
    curves = Section("Curves", "The running mean over a faint line of the logged values.", figures=drawn)
    given = {name: value for name, value in settings.items() if value is not None}
    shown = [curves, Section("Settings", facts=list(facts(given)))]
    return write_html(document("Training run", str(folder), found, shown), folder)


def _has(rows: Rows, names: Mapping[str, str]) -> bool:
    return any(name in row for row in rows for name in names)


def _chart(rows: Rows, names: Mapping[str, str]) -> Markup:
    series = {}
    for (name, label), stroke in zip(names.items(), STROKES, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            steps, values = zip(*points, strict=True)
            series[label] = (steps, values, stroke)
    return charts.lines(series, "step", "")
