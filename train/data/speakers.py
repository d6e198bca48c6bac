"""Who speaks how much, and with whom: what one needs to know to choose responders."""

from collections.abc import Sequence
from dataclasses import dataclass

from train.data.dialogue import (
    Thresholds,
    Window,
    count_turns,
    dialogues_by_pair,
    different,
    most_dialogues_first,
    require_speaker,
)
from train.data.transcript import Scene
from train.errors import UserError

MIN_QUERIERS = 2
"""With one querier there is nobody to tell apart."""


@dataclass(frozen=True)
class Pair:
    """A querier of one responder: ``turns`` in the whole transcript, ``dialogues`` with the responder."""

    querier: str
    turns: int
    dialogues: int
    has_enough: bool


@dataclass(frozen=True)
class Speaker:
    """Somebody who answers others: ``turns`` in the whole transcript, and everybody they answer."""

    name: str
    turns: int
    pairs: tuple[Pair, ...]

    @property
    def queriers(self) -> list[Pair]:
        """Those with enough turns and dialogues."""
        return [pair for pair in self.pairs if pair.has_enough]

    @property
    def dialogues(self) -> int:
        """Dialogues with ``queriers``."""
        return sum(pair.dialogues for pair in self.queriers)

    @property
    def qualifies(self) -> bool:
        """Whether this speaker can be a responder, with at least one dialogue to hold out."""
        return len(self.queriers) >= MIN_QUERIERS and any(pair.dialogues > 1 for pair in self.queriers)


def survey(scenes: Sequence[Scene], thresholds: Thresholds) -> list[Speaker]:
    """Everybody who answers anybody, those with most dialogues with queriers first."""
    turns = count_turns(scenes)
    speakers = [
        Speaker(
            name,
            turns[name],
            tuple(
                _pair(querier, turns[querier], found[querier], thresholds)
                for querier in most_dialogues_first(found)
            ),
        )
        for name, found in dialogues_by_pair(scenes).items()
    ]
    return sorted(speakers, key=lambda speaker: (-speaker.dialogues, -speaker.turns, speaker.name))


def _pair(querier: str, turns: int, dialogues: Sequence[Window], thresholds: Thresholds) -> Pair:
    count = len(different(dialogues))
    return Pair(querier, turns, count, thresholds.allow(turns, count))


def find_speakers(scenes: Sequence[Scene], names: Sequence[str], thresholds: Thresholds) -> list[Speaker]:
    """The speakers called ``names``; ``UserError`` for one who does not speak or answers nobody."""
    spoken = count_turns(scenes)
    by_name = {speaker.name: speaker for speaker in survey(scenes, thresholds)}
    for name in names:
        require_speaker("responder", name, spoken)
        if name not in by_name:
            raise UserError(f"responder '{name}' answers nobody in the transcript")
    return [by_name[name] for name in names]


def qualified(scenes: Sequence[Scene], thresholds: Thresholds) -> list[str]:
    """Names of all who can be a responder; ``UserError`` if there is none."""
    names = [speaker.name for speaker in survey(scenes, thresholds) if speaker.qualifies]
    if not names:
        raise UserError(
            f"nobody has {MIN_QUERIERS} queriers with at least {thresholds.min_turns} turns and "
            f"{thresholds.min_dialogues} dialogues each; lower the minimums"
        )
    return names
