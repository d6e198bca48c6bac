"""What is in prepared data, as a table."""

from collections.abc import Sequence

from rich.table import Table

from train.data.layout import Example, MQDialog

COLUMNS = ("dialogues", "windows", "characters", "in replies")


def summary_table(data: MQDialog) -> Table:
    """One row per querier and one for all: train / dev, characters over the windows of both."""
    title = f"{data.responder}: {len(data.queriers)} queriers, {data.num_clusters} clusters (train / dev)"
    table = Table(title=title)
    table.add_column("querier")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for querier_id, querier in enumerate(data.queriers):
        halves = [[e for e in half if e.querier_id == querier_id] for half in (data.train, data.dev)]
        table.add_row(querier, *_figures(*halves))
    table.add_section()
    table.add_row("all", *_figures(data.train, data.dev))
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
