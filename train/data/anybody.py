"""A transcript turned around: a few named people ask, and whoever they talk with answers as one responder.

Somebody has a handful of dialogues with any one responder, but many with all people together, so that their
expert sees more text. The responder that stands for all the others is called ``ANYBODY``.
"""

from collections.abc import Collection, Sequence

from train.data.dialogue import count_turns, require_speaker, two_speaker_runs
from train.data.transcript import Scene, Turn
from train.errors import UserError

ANYBODY = "Anybody"


def turn_around(scenes: Sequence[Scene], queriers: Collection[str]) -> list[Scene]:
    """The dialogues of each of ``queriers`` with others, who are renamed ``ANYBODY``; each is a scene.

    Left out are dialogues without any of ``queriers``, where nobody would ask, and those between two of them,
    where nobody would answer.

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
