"""``generate`` with mixed queriers in one left-padded batch."""

import copy

import pytest
import torch
from tiny_models import (
    EXPERTS,
    FAMILIES,
    QUERIER_IDS,
    TOWERS,
    aware_model,
    left_padded_batch,
    plain_model,
    training_batch,
)
from transformers import DynamicCache

from qar_models import QARConfig, apply_qar, querier_ids
from qar_models.config import CACHE

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def generate(model, batch, querier_ids=QUERIER_IDS, **settings):
    return model.generate(**batch, querier_ids=querier_ids, **{**GREEDY, **settings})


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_equals_that_row_alone(family, tower, experts):
    model, batch = aware_model(family, tower, experts), left_padded_batch()
    together = generate(model, batch)
    for row in range(3):
        # without its padding, too: a padded row must not see that it is padded
        start = 3 if row == 0 else 0
        alone = {name: tensor[row : row + 1, start:] for name, tensor in batch.items()}
        assert torch.equal(
            generate(model, alone, QUERIER_IDS[row : row + 1])[0, 10 - start :], together[row, 10:]
        )


def test_the_answer_depends_on_who_asks():
    model, batch = aware_model(), left_padded_batch()
    assert not torch.equal(generate(model, batch), generate(model, batch, torch.tensor([1, 2, 4])))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("first_expert_layer", [0, 1])
def test_cached_equals_uncached(tower, first_expert_layer, settings):
    model = aware_model(tower=tower, first_expert_layer=first_expert_layer)
    batch = left_padded_batch()
    uncached = {name: value for name, value in settings.items() if name != "cache_implementation"}
    assert torch.equal(
        generate(model, batch, **settings), generate(model, batch, **uncached, use_cache=False)
    )


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("window", [4, 12])
def test_a_cache_that_holds_the_last_window_only(window, tower, settings):
    """The prompts have 10 tokens: the window is full before, or fills while they are answered."""
    model = aware_model("mistral", tower, base=plain_model("mistral", sliding_window=window))
    batch = left_padded_batch()
    uncached = {name: value for name, value in settings.items() if name != "cache_implementation"}
    expected = generate(model, batch, **uncached, use_cache=False)
    assert torch.equal(generate(model, batch, **settings), expected)
    unbounded = aware_model("mistral", tower, base=plain_model("mistral", sliding_window=None))
    assert not torch.equal(generate(unbounded, batch, **settings), expected)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_plain_model_drafts(tower):
    """Speculative decoding; without experts the draft ignores who asks, and the answer does not change."""
    model = aware_model(tower=tower)
    plain = plain_model()
    nothing = QARConfig(num_queriers=5, first_expert_layer=plain.config.num_hidden_layers)
    draft = apply_qar(plain, nothing)
    prompt = {name: tensor[1:2] for name, tensor in left_padded_batch().items()}
    expected = generate(model, prompt, QUERIER_IDS[1:2])
    assert torch.equal(generate(model, prompt, QUERIER_IDS[1:2], assistant_model=draft), expected)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (plain_model, "assistant_model: got a LlamaForCausalLM, which takes no querier_ids, expected"),
        (
            lambda: aware_model(num_queriers=2),
            "assistant_model: querier_ids: got 3, expected ids from -1 to 1",
        ),
    ],
)
def test_an_unsuitable_draft_is_named(draft, message):
    prompt = left_padded_batch(batch_size=1, padding=0)
    with pytest.raises(ValueError, match=message):
        generate(aware_model(), prompt, QUERIER_IDS[:1], assistant_model=draft())


@pytest.mark.parametrize("tower", TOWERS)
def test_a_shared_expert_looks_at_the_shape_of_ids_only(tower):
    model, batch = aware_model(tower=tower, experts="shared"), left_padded_batch()
    expected = model(**batch).logits
    assert torch.equal(model(**batch, querier_ids=torch.tensor([99, -7, 4])).logits, expected)
    for wrong in (torch.tensor([0, 1]), torch.tensor(0)):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"querier_ids: got shape .*, expected \(3,\)"):
                call(**batch, querier_ids=wrong)
    with pytest.raises(TypeError, match="expected integers"):
        model(**batch, querier_ids=torch.zeros(3))


@pytest.mark.parametrize("tower", TOWERS)
def test_a_prefix_is_read_once_per_querier(tower):
    model, tokens = aware_model(tower=tower), left_padded_batch(batch_size=1, padding=0)["input_ids"]
    caches = []
    for querier in range(3):
        ids, cache = torch.tensor([querier]), DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :6], querier_ids=ids, past_key_values=cache)
        caches.append(cache)
        for _ in range(2):
            got = model.generate(
                tokens,
                querier_ids=ids,
                past_key_values=copy.deepcopy(cache),
                max_new_tokens=6,
                do_sample=False,
            )
            expected = model.generate(tokens, querier_ids=ids, max_new_tokens=6, do_sample=False)
            assert torch.equal(got, expected)
    first, other = (cache.layers for cache in caches[:2])
    assert torch.equal(first[0].keys, other[0].keys)  # of the first layer of experts: computed before its MLP
    assert not torch.equal(first[1].keys, other[1].keys)


@pytest.mark.parametrize("tower", TOWERS)
def test_beams_equal_that_row_alone(tower):
    model, batch = aware_model(tower=tower), left_padded_batch()
    together = generate(model, batch, num_beams=3, num_return_sequences=2)
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        got = generate(model, alone, QUERIER_IDS[row : row + 1], num_beams=3, num_return_sequences=2)
        assert torch.equal(got, together[2 * row : 2 * row + 2])


@pytest.mark.parametrize("tower", TOWERS)
def test_sampling_is_seeded(tower):
    model, batch = aware_model(tower=tower), left_padded_batch()

    def sample(seed):
        torch.manual_seed(seed)
        return generate(model, batch, do_sample=True)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize("tower", TOWERS)
def test_cache_operations_see_one_row_per_sequence(tower):
    model, batch = aware_model(tower=tower), left_padded_batch(padding=0)
    cache = DynamicCache(config=model.config)
    model(**batch, querier_ids=QUERIER_IDS, past_key_values=cache)
    assert all(layer.keys.shape[0] == 3 for layer in cache.layers)
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    order = torch.tensor([2, 0, 1])
    ids = batch["input_ids"][order]
    got = model(
        ids[:, 7:],
        attention_mask=batch["attention_mask"],
        querier_ids=QUERIER_IDS[order],
        past_key_values=cache,
    )
    expected = model(ids, querier_ids=QUERIER_IDS[order]).logits[:, 7:]
    torch.testing.assert_close(got.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("tower", TOWERS)
def test_the_cache_by_its_old_and_its_new_name(tower, name):
    """transformers renamed it in 5.24; a model that does not know the name answers from the last token."""
    model, batch = aware_model(tower=tower), left_padded_batch(padding=0)
    ids = batch["input_ids"]
    for stack, read in ((model, lambda out: out.logits), (model.model, lambda out: out.last_hidden_state)):
        cache = DynamicCache(config=model.config)
        first = stack(ids[:, :7], querier_ids=QUERIER_IDS, use_cache=True, **{name: cache})
        assert first[CACHE] is cache and cache.get_seq_length() == 7
        rest = read(stack(ids[:, 7:], querier_ids=QUERIER_IDS, **{name: cache}))
        expected = read(stack(ids, querier_ids=QUERIER_IDS))[:, 7:]
        torch.testing.assert_close(rest, expected, rtol=1e-4, atol=1e-4)
        without = stack(ids[:, 7:], querier_ids=QUERIER_IDS, use_cache=False, **{name: cache})
        assert getattr(without, CACHE) is None


def test_a_cache_by_a_name_that_nobody_reads_is_refused():
    model, batch = aware_model(), left_padded_batch()
    with pytest.raises(TypeError, match="keys_and_values: got a cache"):
        model(**batch, querier_ids=QUERIER_IDS, keys_and_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("tower", TOWERS)
def test_logits_to_keep(tower):
    model, batch = aware_model(tower=tower), left_padded_batch()
    full = model(**batch, querier_ids=QUERIER_IDS).logits
    for kept in (1, 3, torch.tensor([0, 7])):
        expected = full[:, -kept:] if isinstance(kept, int) else full[:, kept]
        torch.testing.assert_close(
            model(**batch, querier_ids=QUERIER_IDS, logits_to_keep=kept).logits, expected
        )


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
def test_querier_ids_may_be_a_list(settings):
    model, batch = aware_model(), left_padded_batch()
    as_list = generate(model, batch, QUERIER_IDS.tolist(), **settings)
    assert torch.equal(as_list, generate(model, batch, **settings))


def test_a_generation_groups_its_rows_once(monkeypatch):
    model, made = aware_model(), []
    make = querier_ids.make_towers
    monkeypatch.setattr(querier_ids, "make_towers", lambda *args: made.append(args[3]) or make(*args))
    prompts = left_padded_batch()
    ids = torch.tensor([3, 0, -1])
    first = model.generate(**prompts, querier_ids=ids, max_new_tokens=6, do_sample=False)
    assert made == [prompts["input_ids"].shape[1], 1]
    ids[0] = 1  # in place
    second = model.generate(**prompts, querier_ids=ids, max_new_tokens=6, do_sample=False)
    assert len(made) == 4 and not torch.equal(first[0], second[0]) and torch.equal(first[1:], second[1:])


def test_training_after_inference_mode_on_the_same_queriers():
    model, batch = aware_model().train(), training_batch()
    with torch.inference_mode():
        model(**batch)
    model(**batch).loss.backward()


@pytest.mark.parametrize("experts", EXPERTS)
def test_continuous_batching_is_refused(experts):
    with pytest.raises(NotImplementedError, match="generate_batch: continuous batching knows no queriers"):
        aware_model(experts=experts).generate_batch(inputs=[[3, 4, 5], [6, 7]])
