"""The MQDialog layout: the records in memory and their names on disk.

``<root>/<show>/diags_two_role_<responder>_clustered/`` holds ``configs/role_pair_id.json`` and one folder per
pair with ``*_response_L512_{train,dev}.json``, each a list of records ``{id, conversations: [{from, value}],
target_role, target_role_short, input_role, input_role_short, role_pair_id, cluster_id}``. The *target* is the
responder, the *input* the querier.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from train.data.names import short_name
from train.data.transcript import Turn

SPLITS = ("train", "dev")
PAIR_IDS = Path("configs/role_pair_id.json")
FIRST_PAIR_ID = 2
"""The reference's label is ``role_pair_id - 2``; our reader takes any ids and counts them from 0."""


@dataclass(frozen=True)
class Example:
    """One window: ``turns`` end with the reply of ``responder`` to ``querier``.

    ``context`` is text for the model alone, put before the turns (see ``train.baselines``); it is never
    learnt, and the files do not hold it.
    """

    id: str
    turns: tuple[Turn, ...]
    responder: str
    querier: str
    querier_id: int
    cluster_id: int
    context: str = ""

    @property
    def dialogue(self) -> str:
        """The dialogue that the window was cut from; ids are ``<dialogue>_part<number>``."""
        return self.id.rpartition("_part")[0] or self.id

    @property
    def asker(self) -> str:
        """Who speaks to the responder; if several responders share a data set, ``querier`` is the pair."""
        return next(turn.speaker for turn in reversed(self.turns) if turn.speaker != self.responder)

    @property
    def exchanges(self) -> set[tuple[Turn, Turn]]:
        """Pairs of adjacent turns: a single line ("Ay.") recurs elsewhere, a pair hardly ever does."""
        return set(pairwise(self.turns))

    @property
    def query(self) -> str:
        """The last turn before the reply."""
        return self.turns[-2].text

    @property
    def reply(self) -> str:
        """The last turn, which is the responder's."""
        return self.turns[-1].text


@dataclass(frozen=True)
class MQDialog:
    """One responder and all who talk with them; ``queriers[querier_id]`` is a name."""

    responder: str
    queriers: list[str]
    num_clusters: int
    train: list[Example]
    dev: list[Example]


def responder_folder(root: Path, show: str, responder: str) -> Path:
    """Where the data of one responder of one show lies under ``root``."""
    return root / show / f"diags_two_role_{short_name(responder).lower()}_clustered"
