"""What is in a transcript and in prepared data, as tables."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from train.data.dialogue import Thresholds
from train.data.layout import Example, MQDialog
from train.data.speakers import MIN_QUERIERS, Speaker

COLUMNS = ("dialogues", "windows", "characters", "in replies")


def summary_table(data: MQDialog) -> Table:
    """One row per querier and one for all: train / dev, characters over the windows of both."""
    title = f"{data.responder}: {len(data.queriers)} queriers, {data.num_clusters} clusters (train / dev)"
    table = _table(title, "querier", *COLUMNS)
    for querier_id, querier in enumerate(data.queriers):
        halves = [[e for e in half if e.querier_id == querier_id] for half in (data.train, data.dev)]
        table.add_row(escape(querier), *_figures(*halves))
    table.add_section()
    table.add_row("all", *_figures(data.train, data.dev))
    return table


def overview_table(parts: Sequence[MQDialog]) -> Table:
    """One row per responder, as in :func:`summary_table`."""
    table = _table(f"{len(parts)} responders (train / dev)", "responder", "queriers", "clusters", *COLUMNS)
    for data in parts:
        counts = str(len(data.queriers)), str(data.num_clusters)
        table.add_row(escape(data.responder), *counts, *_figures(data.train, data.dev))
    return table


def speakers_table(speakers: Sequence[Speaker], thresholds: Thresholds) -> Table:
    """One row per speaker who can be a responder; the others are counted."""
    qualified = [speaker for speaker in speakers if speaker.qualifies]
    table = _table(f"{len(qualified)} responders", "responder", "turns", "queriers", "dialogues", "answers")
    table.caption = (
        f"queriers: at least {thresholds.min_turns} turns, and {thresholds.min_dialogues} dialogues with the "
        f"responder; left out: {len(speakers) - len(qualified)} speakers who answer somebody, but have fewer "
        f"than {MIN_QUERIERS} queriers"
    )
    for speaker in qualified:
        counts = speaker.turns, len(speaker.queriers), speaker.dialogues, len(speaker.pairs)
        table.add_row(escape(speaker.name), *map(str, counts))
    return table


def pairs_table(speaker: Speaker, thresholds: Thresholds) -> Table:
    """One row for everybody whom ``speaker`` answers."""
    title = (
        f"{speaker.name}: {speaker.turns} turns, {len(speaker.queriers)} queriers with at least "
        f"{thresholds.min_turns} turns and {thresholds.min_dialogues} dialogues"
    )
    table = _table(title, "who asks", "turns", "dialogues", "querier")
    for pair in speaker.pairs:
        answer = "yes" if pair.has_enough else "no"
        table.add_row(escape(pair.querier), str(pair.turns), str(pair.dialogues), answer)
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=escape(title))
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def num_dialogues(examples: Sequence[Example]) -> int:
    """Number of different dialogues that ``examples`` are windows of."""
    return len({(example.querier_id, example.dialogue) for example in examples})


def _figures(train: Sequence[Example], dev: Sequence[Example]) -> list[str]:
    both = (*train, *dev)
    characters = sum(len(turn.text) for example in both for turn in example.turns)
    in_replies = sum(len(example.reply) for example in both)
    return [
        f"{num_dialogues(train)} / {num_dialogues(dev)}",
        f"{len(train)} / {len(dev)}",
        f"{characters:,}",
        f"{in_replies:,}",
    ]
