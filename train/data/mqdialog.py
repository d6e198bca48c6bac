"""Write and read a folder in the MQDialog layout (see ``layout``).

The reader is strict: every error names file, record and key.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.data.layout import FIRST_PAIR_ID, PAIR_IDS, SPLITS, Example, MQDialog
from train.data.names import check_name, short_name
from train.data.transcript import HALF_A_CHARACTER, Turn, merge_turns
from train.errors import UserError
from train.files import load_json, write_atomic

logger = logging.getLogger(__name__)

RECORD_KEYS = {"id": (str, int), "conversations": list, "target_role": str, "input_role": str}
ID_KEYS = ("role_pair_id", "cluster_id")


def write_mqdialog(data: MQDialog, folder: Path, show: str) -> None:
    """Write ``data`` into the empty ``folder`` (``files.build_directory`` makes it all or nothing)."""
    shorts = [short_name(name) for name in data.queriers]
    for index, short in enumerate(shorts):
        if short in shorts[:index] or not short:  # readers go by the records, not by the files' names
            shorts[index] = f"{short}_{FIRST_PAIR_ID + index}"
    ids = {name: FIRST_PAIR_ID + index for index, name in enumerate(data.queriers)}
    write_atomic(folder / PAIR_IDS, _dump({data.responder: ids}))
    target = short_name(data.responder)
    for split, examples in zip(SPLITS, (data.train, data.dev), strict=True):
        for querier_id, short in enumerate(shorts):
            records = [_record(example) for example in examples if example.querier_id == querier_id]
            name = f"{show}_diags_{target}_{short}_{target}_response_L512_{split}.json"
            write_atomic(folder / f"{target}_{short}" / name, _dump(records))


def _record(example: Example) -> dict:
    return {
        "id": example.id,
        "conversations": [{"from": turn.speaker, "value": turn.text} for turn in example.turns],
        "target_role": example.responder,
        "target_role_short": short_name(example.responder),
        "input_role": example.querier,
        "input_role_short": short_name(example.querier),
        "role_pair_id": FIRST_PAIR_ID + example.querier_id,
        "cluster_id": example.cluster_id,
    }


def _dump(value: dict | Sequence) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def load_mqdialog(folder: Path) -> MQDialog:
    """The data of one responder; querier ids are 0..Q-1 in the order of ``role_pair_id``.

    If two queriers' windows share an id, all ids are prefixed with the querier's name. Adjacent turns of one
    speaker are merged; windows that then have no query are left out.

    Raises ``UserError``: no such folder (lists what is there), damaged JSON (file, line), a missing or wrong
    key (file, index, key), a name that reads as a pair's, a pair id unknown to ``role_pair_id.json``, two
    responders, an empty split, one id twice in a querier's half.
    """
    folder = Path(folder)
    if not (folder / PAIR_IDS).is_file():
        raise UserError(f"{folder}: no MQDialog data of a responder ({PAIR_IDS}); {_what_is_there(folder)}")
    known_ids = _pair_ids(folder / PAIR_IDS)
    records = {split: _asked([_check(*found) for found in _records(folder, split)]) for split in SPLITS}
    responders = {record["target_role"] for found in records.values() for record in found}
    if len(responders) > 1:
        raise UserError(
            f"{folder}: records of several responders ({', '.join(sorted(responders))}), expected one"
        )
    names = _names_by_id(folder, records, known_ids)
    examples = {
        split: [_example(record, list(names)) for record in found] for split, found in records.items()
    }
    examples = _told_apart(examples, folder)
    clusters = 1 + max(example.cluster_id for found in examples.values() for example in found)
    return MQDialog(responders.pop(), list(names.values()), clusters, examples["train"], examples["dev"])


def _what_is_there(folder: Path) -> str:
    parent = folder if folder.is_dir() else folder.parent
    if not parent.is_dir():
        return f"{parent} does not exist either"
    found = sorted(path.parent.parent for path in parent.glob(f"*/{PAIR_IDS}"))
    found = found or sorted(path for path in parent.iterdir() if path.is_dir())
    return f"{parent} holds: {', '.join(path.name for path in found) or 'no folders'}"


def _pair_ids(path: Path) -> set[int]:
    """The ids in ``{responder: {name: id}}`` (the reference), ``{name: id}`` or ``{id: name}``."""
    mapping = load_json(path)
    if isinstance(mapping, dict) and len(mapping) == 1 and isinstance(next(iter(mapping.values())), dict):
        mapping = next(iter(mapping.values()))
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{path}: expected an object that maps queriers to ids")
    try:
        return {int(value) if _is_id(value) else int(key) for key, value in mapping.items()}
    except (TypeError, ValueError):
        raise UserError(f"{path}: expected an object that maps queriers to whole-number ids") from None


def _is_id(value: object) -> bool:
    if isinstance(value, str):
        return value.isdecimal()
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _records(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    """(where, record) of every record of ``split``, files in the order of their names."""
    count = 0
    for path in sorted(folder.glob(f"*/*_response_L512_{split}.json")):
        records = load_json(path)
        if not isinstance(records, list):
            raise UserError(f"{path}: expected a list of records")
        for index, record in enumerate(records):
            count += 1
            yield f"{path}: record {index}", record
    if not count:
        raise UserError(f"{folder}: the {split} split is empty (*/*_response_L512_{split}.json)")


def _check(where: str, record: Any) -> dict:
    """``record`` with stripped turns, if it has every key, each of the right type."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object")
    for key, kind in RECORD_KEYS.items():
        if not isinstance(record.get(key), kind):
            raise UserError(f"{where}: key '{key}' is missing or of a wrong type")
    for key in ID_KEYS:
        if not _is_id(record.get(key)):
            raise UserError(f"{where}: key '{key}' is missing or not a whole number of at least 0")
    turns = record["conversations"]
    for index, turn in enumerate(turns):
        for key in ("from", "value"):
            if not isinstance(turn, dict) or not isinstance(turn.get(key), str):
                raise UserError(f"{where}: key '{key}' of turn {index} is missing or not a string")
            if half := HALF_A_CHARACTER.search(turn[key]):
                raise UserError(f"{where}: key '{key}' of turn {index} holds half a character ({half[0]!a})")
    for key in ("target_role", "input_role"):
        check_name(record[key], where)
    if not turns or turns[-1]["from"] != record["target_role"]:
        raise UserError(f"{where}: 'conversations' must end with a reply of {record['target_role']}")
    said = merge_turns([Turn(turn["from"], turn["value"]) for turn in turns])
    return record | {"where": where, "turns": said if turns[-1]["value"].strip() else ()}


def _asked(records: list[dict]) -> list[dict]:
    """The records of one split that have a query and a reply to it."""
    kept = [record for record in records if len(record["turns"]) > 1]
    if not kept:
        raise UserError(f"{records[0]['where']}: like all others, it has no query, or no reply to it")
    if len(kept) < len(records):
        logger.warning(
            "%d of %d windows have no query or no reply and are left out",
            len(records) - len(kept),
            len(records),
        )
    return kept


def _names_by_id(folder: Path, records: dict[str, list[dict]], known_ids: set[int]) -> dict[int, str]:
    """Querier names by ``role_pair_id``, ascending; only queriers with a record count."""
    names: dict[int, str] = {}
    for record in (record for found in records.values() for record in found):
        pair_id, name = int(record["role_pair_id"]), record["input_role"]
        if pair_id not in known_ids:
            raise UserError(f"{record['where']}: role_pair_id {pair_id} is not in {folder / PAIR_IDS}")
        known = names.setdefault(pair_id, name)
        if known != name:
            raise UserError(f"{record['where']}: role_pair_id {pair_id} belongs to '{known}', not '{name}'")
    return dict(sorted(names.items()))


def _example(record: dict, pair_ids: list[int]) -> Example:
    return Example(
        id=str(record["id"]),
        turns=record["turns"],
        responder=record["target_role"],
        querier=record["input_role"],
        querier_id=pair_ids.index(int(record["role_pair_id"])),
        cluster_id=int(record["cluster_id"]),
    )


def _told_apart(examples: Mapping[str, list[Example]], folder: Path) -> Mapping[str, list[Example]]:
    """``examples`` by split, with unique ids, by which evaluation pairs windows."""
    for split, found in examples.items():
        counts = Counter((example.querier, example.id) for example in found)
        for (querier, window), count in counts.items():
            if count > 1:
                raise UserError(
                    f"{folder}: {count} {split} windows of querier '{querier}' have the id '{window}'"
                )
    if all(len({example.id for example in found}) == len(found) for found in examples.values()):
        return examples
    return {
        split: [replace(example, id=f"{example.querier}/{example.id}") for example in found]
        for split, found in examples.items()
    }
