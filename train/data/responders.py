"""Dialogues of several responders as one data set, in which every (querier, responder) pair has its own id.

One model then answers for all responders: the prompt names who answers, the pair's id chooses the expert.
If two responders talk with each other, their dialogues are in both folders, each split in its own way; what
is held out for one is not trained on for the other.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from train.data.layout import PAIR_IDS, Example, MQDialog
from train.data.mqdialog import load_mqdialog
from train.data.names import pair_name
from train.errors import UserError


def load_dialogues(folder: Path) -> MQDialog:
    """The data in ``folder``: of one responder, or of all responders whose folders lie in it.

    Raises ``UserError`` as :func:`train.data.mqdialog.load_mqdialog` does.
    """
    found = sorted(path.parent.parent for path in Path(folder).glob(f"*/{PAIR_IDS}"))
    if (Path(folder) / PAIR_IDS).is_file() or not found:
        return load_mqdialog(folder)
    return merge([load_mqdialog(path) for path in found])


def merge(parts: Sequence[MQDialog]) -> MQDialog:
    """One data set of ``parts``: queriers are pairs, ids and clusters are numbered consecutively.

    Training windows that share an exchange with a held-out window are left out.

    Raises ``UserError`` if two parts have the same responder.
    """
    responders = [part.responder for part in parts]
    twice = {name for name in responders if responders.count(name) > 1}
    if twice:
        raise UserError(f"two folders hold replies of the same responder: {', '.join(sorted(twice))}")
    queriers: list[str] = []
    halves: tuple[list[Example], list[Example]] = ([], [])
    clusters = 0
    for part in parts:
        names = [pair_name(querier, part.responder) for querier in part.queriers]
        for half, examples in zip(halves, (part.train, part.dev), strict=True):
            half += [_numbered(example, names, len(queriers), clusters) for example in examples]
        queriers += names
        clusters += part.num_clusters
    train, dev = halves
    return MQDialog(", ".join(responders), queriers, clusters, _without_held_out(train, dev), dev)


def _without_held_out(train: Sequence[Example], dev: Sequence[Example]) -> list[Example]:
    held_out = {exchange for example in dev for exchange in example.exchanges}
    return [example for example in train if held_out.isdisjoint(example.exchanges)]


def _numbered(example: Example, names: Sequence[str], first_id: int, first_cluster: int) -> Example:
    name = names[example.querier_id]
    return replace(
        example,
        id=f"{name}/{example.id}",
        querier=name,
        querier_id=first_id + example.querier_id,
        cluster_id=first_cluster + example.cluster_id,
    )
