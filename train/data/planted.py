"""A synthetic set whose truth is known: the one responder has a fixed way of answering each querier.

Everybody asks the same questions. The answer to a question is shared; the opening and closing phrases around
it belong to the querier alone. So a model can only show the right habit if it knows who asks.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import yaml

from train.data.cluster import cluster_queries
from train.data.layout import Example, MQDialog
from train.data.transcript import Turn

SHOW = "planted"
RESPONDER = "Wren"
NUM_DEV_QUESTIONS = 6


@dataclass(frozen=True)
class Habit:
    """How one querier is answered: ``opening``, the answer, ``closing``."""

    querier: str
    opening: str
    closing: str


_TABLE = yaml.safe_load(Path(__file__).with_name("planted.yaml").read_text(encoding="utf-8"))
HABITS: tuple[Habit, ...] = tuple(Habit(querier, **phrases) for querier, phrases in _TABLE["habits"].items())
QUESTIONS: tuple[tuple[str, str], ...] = tuple((question, answer) for question, answer in _TABLE["questions"])


def planted(seed: int = 0, num_clusters: int = 5) -> MQDialog:
    """The planted set: 24 train and 6 other dev questions, the same ones for all 8 queriers."""
    questions = list(QUESTIONS)
    random.Random(seed).shuffle(questions)
    dev, train = questions[:NUM_DEV_QUESTIONS], questions[NUM_DEV_QUESTIONS:]
    clusters = cluster_queries([ask for ask, _ in train], [ask for ask, _ in dev], num_clusters, seed=seed)
    return MQDialog(
        RESPONDER,
        [habit.querier for habit in HABITS],
        1 + max(*clusters[0], *clusters[1]),
        _examples("train", train, clusters[0]),
        _examples("dev", dev, clusters[1]),
    )


def habit_of(reply: str) -> int | None:
    """The querier whose habit ``reply`` shows: their opening at its start or closing at its end.

    None if it shows no habit, or several.
    """
    folded = " ".join(reply.casefold().split())
    shown = [
        index
        for index, habit in enumerate(HABITS)
        if folded.startswith(habit.opening.casefold()) or folded.endswith(habit.closing.casefold())
    ]
    return shown[0] if len(shown) == 1 else None


def _examples(split: str, questions: list[tuple[str, str]], clusters: list[int]) -> list[Example]:
    return [
        Example(
            id=f"{split}_{querier_id}_{number}",
            turns=(
                Turn(habit.querier, question),
                Turn(RESPONDER, f"{habit.opening} {answer} {habit.closing}"),
            ),
            responder=RESPONDER,
            querier=habit.querier,
            querier_id=querier_id,
            cluster_id=cluster,
        )
        for querier_id, habit in enumerate(HABITS)
        for number, ((question, answer), cluster) in enumerate(zip(questions, clusters, strict=True))
    ]
