"""A transcript turned around: a few people ask, and everybody else is the one who answers.

One querier has a handful of dialogues with one responder, but many with everybody together, so that the
querier's expert sees more text.
"""

from collections.abc import Collection, Sequence

from train.data.dialogue import count_turns, require_speaker, two_speaker_runs
from train.data.transcript import Scene, Turn
from train.errors import UserError

ANYBODY = "Anybody"


def turn_around(scenes: Sequence[Scene], queriers: Collection[str]) -> list[Scene]:
    """Every dialogue of one of ``queriers`` with somebody else, as a scene in which the other is ``ANYBODY``.

    Dialogues between two of ``queriers`` are left out, since nobody in them would be ``ANYBODY``.

    Raises ``UserError`` without queriers, for one who never speaks, and if a speaker has the name already.
    """
    if not queriers:
        raise UserError(
            f"responder '{ANYBODY}' is everybody but the queriers: expected their names (--querier)"
        )
    spoken = count_turns(scenes)
    for name in queriers:
        require_speaker("querier", name, spoken)
    turned = []
    for scene in scenes:
        for run in two_speaker_runs(scene.turns):
            speakers = {turn.speaker for turn in run}
            if ANYBODY in speakers:
                raise UserError(f"responder '{ANYBODY}': '{scene.title}' has a speaker of that name")
            if len(speakers.intersection(queriers)) == 1:
                turned.append(Scene(scene.source, scene.title, _renamed(run, queriers)))
    if not turned:
        raise UserError(f"responder '{ANYBODY}': the queriers talk with nobody but each other")
    return turned


def _renamed(run: Sequence[Turn], queriers: Collection[str]) -> tuple[Turn, ...]:
    return tuple(Turn(turn.speaker if turn.speaker in queriers else ANYBODY, turn.text) for turn in run)
