"""Where a model lies: offloaded weights, layers on several devices, masks of other attention code."""

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import QUERIER_IDS, TOWERS, aware_model, left_padded_batch

from qar_kernels import Segments
from qar_models.towers import TowerBatch, general_rows


@pytest.mark.parametrize("tower", TOWERS)
def test_offloaded_weights(tower):
    model, batch = aware_model(tower=tower), left_padded_batch()
    with torch.no_grad():
        expected = model(**batch, querier_ids=QUERIER_IDS).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.model.norm.weight.is_meta and model.model.layers[0].experts.gate.is_meta
        torch.testing.assert_close(model(**batch, querier_ids=QUERIER_IDS).logits, expected)


def test_layers_on_another_device_share_one_copy_of_the_segments():
    towers = TowerBatch(Segments.from_sequences([1, 0], 3), 2, Segments.from_sequences([-1, 1], 3))
    assert towers.to("cpu") is towers
    moved = towers.to("meta")
    assert moved is towers.to(torch.device("meta"), non_blocking=True)
    assert moved.segments.device == moved.trained.device == torch.device("meta")
    assert moved.segments.max_id == 1
    assert moved.batch_size == 2


def test_a_mask_that_is_no_tensor_is_refused_where_the_towers_share_it():
    assert general_rows(None, 2) is None
    with pytest.raises(TypeError, match="attention_mask: got object, which tower='replace' cannot share"):
        general_rows(object(), 2)
