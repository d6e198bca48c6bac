"""HTML pieces of the report. All text from the data is escaped here."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from train.metrics.wording import interval, score
from train.report.wording import typeset


def text(value: object) -> str:
    """`value` as escaped HTML text."""
    return escape(str(value))


def section(title: str, *parts: str, note: str = "", half: bool = False) -> str:
    """A titled section with a line of explanation; `half` takes one of two columns on a wide screen."""
    explanation = f'<p class="note">{text(note)}</p>' if note else ""
    kind = ' class="half"' if half else ""
    return f"<section{kind}><h2>{text(title)}</h2>{explanation}{''.join(parts)}</section>"


def figure(caption: str, svg: str) -> str:
    """An inline SVG under its caption."""
    labelled = svg.replace("<svg ", f'<svg aria-label="{text(caption)}" ', 1)
    return f"<figure><figcaption>{text(caption)}</figcaption>{labelled}</figure>"


def figures(parts: Iterable[str]) -> str:
    """Figures side by side, one under the other on a narrow screen."""
    return f'<div class="figures">{"".join(parts)}</div>'


def table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table that scrolls sideways; a row is (CSS class, cells that are HTML already)."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "".join(
        f'<tr class="{text(kind)}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for kind, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def score_cell(key: str, value: float | None, ci: Sequence[float | None] | None = None) -> str:
    """A table cell: the score and, smaller, its interval."""
    ends = interval(key, ci)
    return typeset(f"{score(key, value)} <small>{ends}</small>" if ends else score(key, value))


def facts(values: Mapping[str, Any]) -> str:
    """Names and values in columns; nested mappings are joined by dots."""
    items = (f"<li><span>{text(name)}</span><b>{text(value)}</b></li>" for name, value in _flat(values))
    return f'<ul class="facts">{"".join(items)}</ul>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        title = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{title}.")
        elif isinstance(value, list | tuple):
            yield title, ", ".join(map(str, value))
        else:
            yield title, f"{value:.4g}" if isinstance(value, float) else value


def answer_cards(sample: Mapping[str, Any]) -> str:
    """One question with its history, the reference reply and the answer given to each querier."""
    asker = sample["asked_by"]
    turns = (f"{turn['from']}: {turn['value']}" for turn in sample["history"])
    history = "".join(f'<p class="turn" dir="auto">{text(turn)}</p>' for turn in turns)
    asked = f'<p class="turn">{text(asker)} asks</p>'
    query = f'{asked}<p class="query" dir="auto">{text(sample["query"])}</p>'
    cards = [_card("reference", "Reference", sample["reference"])]
    for querier, answer in sample["answers"].items():
        title = f"To {querier}, who asked" if querier == asker else f"To {querier}"
        cards.append(_card("asker" if querier == asker else "", title, answer.strip() or "(empty reply)"))
    return f'<article class="sample">{history}{query}<div class="answers">{"".join(cards)}</div></article>'


def _card(kind: str, title: str, answer: str) -> str:
    return f'<div class="answer {kind}"><h3>{text(title)}</h3><p dir="auto">{text(answer)}</p></div>'
