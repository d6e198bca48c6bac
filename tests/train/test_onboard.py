import dataclasses

import pytest
import torch

from train.comparison import Comparison
from train.data.mqdialog import write_mqdialog
from train.errors import UserError
from train.finetune import finetune
from train.onboard import onboard
from train.trained import load_trained

NEWCOMER = "Newcomer"


def _with_newcomer(tiny_data):
    """The second querier's dialogues, under a new name."""
    renamed = {
        split: [
            dataclasses.replace(
                example,
                querier=NEWCOMER,
                querier_id=0,
                turns=tuple(dataclasses.replace(t, speaker=NEWCOMER) if t.speaker == example.querier else t
                            for t in example.turns),
            )
            for example in getattr(tiny_data, split)
            if example.querier_id == 1
        ]
        for split in ("train", "dev")
    }  # fmt: skip
    return dataclasses.replace(tiny_data, queriers=[NEWCOMER], **renamed)


def test_newcomer_learns_and_nobody_else_changes(config, tiny_data, tmp_path):
    source = finetune(config)
    data = _with_newcomer(tiny_data)
    write_mqdialog(data, tmp_path / "new", "planted")
    extended = load_trained(onboard(source, tmp_path / "new", NEWCOMER, tmp_path / "extended", epochs=8))
    before = load_trained(source)
    assert extended.queriers == (*before.queriers, NEWCOMER)

    ids = torch.arange(12).repeat(3, 1)
    known = torch.tensor([0, 1, 2])
    assert torch.equal(
        extended.model(ids, querier_ids=known).logits, before.model(ids, querier_ids=known).logits
    )

    untaught = load_trained(source)
    untaught.model.add_queriers(NEWCOMER, init="mean")
    comparison = Comparison(config.replace(trainable_layers=None), data, lambda _method: config)
    asked_by = [3] * len(data.dev)
    taught, mean = (
        sum(nll for nll, _ in comparison.held_out.nll(model, asked_by))
        for model in (extended.model, untaught.model)
    )
    assert taught < mean


def test_refusals_name_what_is_wrong(config, tiny_data, tmp_path):
    source = finetune(config)
    known = tiny_data.queriers[0]
    with pytest.raises(UserError, match=f"querier '{known}' is known"):
        onboard(source, tmp_path / "data", known, tmp_path / "out")
    with pytest.raises(UserError, match="no training window of querier 'Ghost'"):
        onboard(source, tmp_path / "data", "Ghost", tmp_path / "out")
    assert not (tmp_path / "out").exists()
