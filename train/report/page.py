"""The whole page, as one self-contained HTML text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from train.report import sections
from train.report.findings import findings, headline
from train.report.sections import Section

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)


def render(
    results: Mapping[str, Any],
    planted: Mapping[str, Any],
    seconds: Mapping[str, float],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    similarity: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
) -> str:
    """The demo's report as HTML; a section that has nothing to show is left out.

    Args:
        results: of the methods "zero_shot", "ft" and "qar" (:func:`train.experiment.results.collect`).
        planted: how often replies show the planted habits: ``ft_accuracy``, ``qar_accuracy``, ``chance`` and
            ``per_querier`` ("ft" and "qar" of each).
        seconds: how long each stage took.
        curves: method -> its log rows (``step``, ``lm_loss``).
        similarity: ``names`` and ``matrix``, the cosines between the effects of their experts.
        samples: of each, ``query``, ``history``, ``reference``, ``asked_by``, ``answers`` (querier -> reply).
    """
    methods, swap = results["methods"], results["swap"].get("qar")
    shown = [
        sections.methods(methods),
        sections.answers(samples),
        sections.per_querier(methods),
        sections.querier_swap(swap),
        sections.planted(planted),
        sections.expert_similarity(similarity),
        sections.training_curves(curves),
        sections.settings(results["conditions"], seconds),
    ]
    title = "Querier-aware responder: comparison report"
    return document(title, headline(results), findings(results, planted), shown)


def document(title: str, heading: str, lines: Sequence[str], shown: Sequence[Section | None]) -> str:
    """A page of ``page.html.j2``, which escapes all text."""
    template = _ENVIRONMENT.get_template("page.html.j2")
    return template.render(title=title, heading=heading, lines=lines, sections=shown)
