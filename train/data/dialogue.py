"""Scenes to dialogues of two people, dialogues to train and dev windows.

A *dialogue* is a maximal run of turns by exactly two speakers; the last run of a scene counts too. A *window*
ends with one reply of the responder and goes back as far as fewer than ``MAX_CHARACTERS`` characters allow,
counted as the reference does (name, newline, text). The split is by dialogue: no reply is in both halves. A
dialogue that repeats another one word for word, as in a transcript that has a scene twice, does not count.
"""

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import permutations

from train.data.transcript import Scene, Turn
from train.errors import UserError

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 512
DEV_SHARE = 0.2


@dataclass(frozen=True)
class Thresholds:
    """Who has enough data to be a querier. The defaults are the paper's, for long television shows."""

    min_turns: int = 70
    """Turns a querier speaks in the whole transcript."""
    min_dialogues: int = 20
    """Different dialogues with the responder that give at least one window."""

    def allow(self, turns: int, dialogues: int) -> bool:
        """Whether somebody with so many of both is a querier."""
        return turns >= self.min_turns and dialogues >= self.min_dialogues


PLAY_THRESHOLDS = Thresholds(min_turns=10, min_dialogues=3)
"""Plays are short: three dialogues are the least that gives a split with most of the data in train."""


@dataclass(frozen=True)
class Window:
    """Turns of one dialogue that end with a reply of the responder."""

    id: str
    turns: tuple[Turn, ...]

    @property
    def query(self) -> str:
        """The last turn before the reply."""
        return self.turns[-2].text


@dataclass(frozen=True)
class Split:
    """Train and dev windows of one querier; ``dialogues`` counts those of both halves."""

    querier: str
    dialogues: int
    train: tuple[Window, ...]
    dev: tuple[Window, ...]


def two_speaker_runs(turns: Sequence[Turn]) -> list[tuple[Turn, ...]]:
    """Maximal runs of turns by exactly two speakers; adjacent runs share the turn at their border."""
    runs, start = [], 0
    while start < len(turns):
        end, speakers = start, set()
        while end < len(turns) and len(speakers | {turns[end].speaker}) <= 2:
            speakers.add(turns[end].speaker)
            end += 1
        if len(speakers) == 2:
            runs.append(tuple(turns[start:end]))
        if end == len(turns):
            break
        start = _first_of_last_speaker(turns, end)
    return runs


def _first_of_last_speaker(turns: Sequence[Turn], end: int) -> int:
    start = end - 1
    while turns[start - 1].speaker == turns[end - 1].speaker:
        start -= 1
    return start


def windows(
    dialogue: Sequence[Turn], responder: str, max_characters: int = MAX_CHARACTERS
) -> list[tuple[Turn, ...]]:
    """One window per reply of ``responder`` that has a turn before it: as many turns as fit, oldest dropped.

    A reply that does not fit together with the turn before it gives no window; nothing is cut.
    """
    found = []
    for end in range(1, len(dialogue)):
        if dialogue[end].speaker != responder:
            continue
        start, room = end + 1, max_characters
        while start > 0 and _characters(dialogue[start - 1]) < room:
            start -= 1
            room -= _characters(dialogue[start])
        if start < end:
            found.append(tuple(dialogue[start : end + 1]))
    return found


def without_leading_reply(window: tuple[Turn, ...], responder: str) -> tuple[Turn, ...]:
    """``window`` without a first turn of the responder: in training nothing comes before the querier."""
    return window[1:] if window[0].speaker == responder else window


def split_queriers(
    scenes: Sequence[Scene],
    responder: str,
    thresholds: Thresholds,
    *,
    queriers: Sequence[str] = (),
    seed: int = 0,
    spoken: Mapping[str, int] | None = None,
) -> list[Split]:
    """Train and dev windows of every querier of ``responder`` with enough data, most dialogues first.

    ``queriers`` asks for these people and no others; one of them with too little data is a ``UserError``,
    as are an unknown responder or querier, and a responder whom nobody asks often enough. ``spoken`` counts
    people's turns in the whole transcript, if ``scenes`` are not all of it.
    """
    spoken = Counter({**count_turns(scenes), **(spoken or {})})
    require_speaker("responder", responder, spoken)
    for name in queriers:
        require_speaker("querier", name, spoken)
    dialogues = dialogues_by_pair(scenes)[responder]
    counts = Counter({name: len(different(found)) for name, found in dialogues.items()})
    for name in queriers:
        _require_enough(name, responder, spoken[name], counts[name], thresholds)
    kept = [
        name
        for name in most_dialogues_first(dialogues)
        if thresholds.allow(spoken[name], counts[name]) and (not queriers or name in queriers)
    ]
    if not kept:
        raise UserError(
            f"responder '{responder}': nobody has at least {thresholds.min_turns} turns and "
            f"{thresholds.min_dialogues} dialogues with them; lower the minimums"
        )
    repeated = sum(len(dialogues[name]) - counts[name] for name in kept)
    if repeated:
        logger.warning("%s: left out %d dialogues that repeat another one word for word", responder, repeated)
    return [_split(name, responder, dialogues[name], seed) for name in kept]


def count_turns(scenes: Iterable[Scene]) -> Counter[str]:
    """Turns of every speaker."""
    return Counter(turn.speaker for scene in scenes for turn in scene.turns)


def dialogues_by_pair(scenes: Iterable[Scene]) -> dict[str, dict[str, list[Window]]]:
    """Responder to querier to their dialogues with at least one window, for everybody who answers anybody.

    A dialogue is a whole run, with an id that names scene and position; any other name has no dialogues.
    """
    found: dict[str, dict[str, list[Window]]] = defaultdict(lambda: defaultdict(list))
    for number, scene in enumerate(scenes):
        for index, run in enumerate(two_speaker_runs(scene.turns)):
            for responder, querier in permutations({turn.speaker for turn in run}):
                if windows(run, responder):
                    found[responder][querier].append(Window(f"scene_{number}_dialogue_{index}", run))
    return found


def most_dialogues_first(dialogues: Mapping[str, Sequence[Window]]) -> list[str]:
    """The names in ``dialogues`` by number of different dialogues, then by name."""
    return sorted(dialogues, key=lambda name: (-len(different(dialogues[name])), name))


def different(dialogues: Iterable[Window]) -> list[Window]:
    """``dialogues`` without those that repeat an earlier one word for word."""
    first: dict[tuple[Turn, ...], Window] = {}
    for dialogue in dialogues:
        first.setdefault(dialogue.turns, dialogue)
    return list(first.values())


def _split(querier: str, responder: str, dialogues: Sequence[Window], seed: int) -> Split:
    shuffled = list(dialogues)
    random.Random(f"{seed}/{responder}/{querier}").shuffle(shuffled)
    # after the shuffle, so that the other dialogues keep the split that results have been published with
    kept = different(shuffled)
    num_dev = max(1, round(DEV_SHARE * len(kept))) if len(kept) > 1 else 0
    dev = [part for dialogue in kept[:num_dev] for part in _parts(dialogue, responder)]
    train = [
        Window(part.id, without_leading_reply(part.turns, responder))
        for dialogue in kept[num_dev:]
        for part in _parts(dialogue, responder)
    ]
    return Split(querier, len(kept), tuple(train), tuple(dev))


def _parts(dialogue: Window, responder: str) -> list[Window]:
    return [
        Window(f"{dialogue.id}_part{number}", turns)
        for number, turns in enumerate(windows(dialogue.turns, responder))
    ]


def _characters(turn: Turn) -> int:
    return len(f"{turn.speaker}\n{turn.text}")


def require_speaker(role: str, name: str, spoken: Counter[str]) -> None:
    """Raise ``UserError`` with the closest names unless ``name`` has turns."""
    if name in spoken:
        return
    folded = {known.casefold(): known for known in spoken}
    close = [folded[match] for match in get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    hint = close or [known for known, _ in spoken.most_common(5)]
    raise UserError(f"{role} '{name}' speaks nowhere in the transcript; closest names: {', '.join(hint)}")


def _require_enough(name: str, responder: str, turns: int, dialogues: int, minimum: Thresholds) -> None:
    if turns < minimum.min_turns:
        raise UserError(f"querier '{name}' speaks {turns} turns, below the minimum of {minimum.min_turns}")
    if dialogues < minimum.min_dialogues:
        raise UserError(
            f"querier '{name}' has {dialogues} dialogues with {responder}, "
            f"below the minimum of {minimum.min_dialogues}"
        )
