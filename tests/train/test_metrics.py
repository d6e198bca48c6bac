import math

import numpy as np
import pytest

from train.errors import UserError
from train.metrics import (
    bootstrap_ci,
    compare,
    nll_summary,
    paired_bootstrap,
    paired_nll,
    rouge,
    summarise,
    swap_summary,
)


def record(name, querier="Ann", nll_sum=2.0, tokens=2, rouge_l=0.5, dialogue=None, empty=False):
    scores = dict.fromkeys(("rouge1", "rouge2", "rougeL"), rouge_l)
    return {
        "id": name,
        "dialogue": dialogue or name,
        "querier": querier,
        "nll_sum": nll_sum,
        "tokens": tokens,
        "empty": empty,
        **scores,
    }


def test_rouge_english_by_hand():
    # prediction 3 words, reference 4; 3 common words, 2 common bigrams (2 and 3 in all)
    scores = rouge("the cat sat", "the cat sat down")
    assert scores["rouge1"] == pytest.approx(2 * (3 / 3) * (3 / 4) / (3 / 3 + 3 / 4))
    assert scores["rouge2"] == pytest.approx(2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))
    # words out of order: the longest common subsequence has 2 words
    assert rouge("sat the cat", "the cat sat")["rougeL"] == pytest.approx(2 / 3)


def test_rouge_english_stems_words():
    assert rouge("running dogs", "run dog")["rouge1"] == 1.0


def test_rouge_chinese_characters_and_words_differ():
    # words: 我们|喜欢|北京 and 我们|喜欢|上海; characters: four of six agree
    assert rouge("我们 喜欢 北京", "我们喜欢上海", "zh-word")["rouge1"] == pytest.approx(2 / 3)
    assert rouge("我们 喜欢 北京", "我们喜欢上海", "zh-char")["rouge1"] == pytest.approx(4 / 6)
    assert rouge("喜欢我们", "我们喜欢", "zh-word")["rouge2"] == 0.0
    assert rouge("喜欢我们", "我们喜欢", "zh-char")["rouge2"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("language", ["en", "zh-char", "zh-word"])
@pytest.mark.parametrize("prediction", ["", "  \n"])
def test_rouge_of_an_empty_prediction_is_zero(language, prediction):
    assert set(rouge(prediction, "好 good", language).values()) == {0.0}


def test_rouge_unknown_language_says_what_to_pass():
    with pytest.raises(UserError, match="zh-char"):
        rouge("a", "b", "fr")


def test_bootstrap_covers_the_true_mean_of_grouped_values():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 5).tolist()
    hits = 0
    for seed in range(200):
        values = np.repeat(rng.normal(size=60), 5) + 0.3 * rng.normal(size=300)
        low, high = bootstrap_ci(values, groups, samples=300, seed=seed)
        hits += low < 0 < high
    assert 0.88 < hits / 200 < 0.99


def test_groups_widen_the_interval_of_repeated_values():
    values = np.random.default_rng(0).normal(size=50)
    single = np.diff(bootstrap_ci(values))[0]
    copies = np.diff(bootstrap_ci(np.repeat(values, 16)))[0]
    grouped = np.diff(bootstrap_ci(np.repeat(values, 16), np.repeat(np.arange(50), 16).tolist()))[0]
    assert copies == pytest.approx(single / 4, rel=0.15)
    assert grouped == pytest.approx(single)


def test_level_orders_intervals_and_seed_fixes_them():
    values = np.random.default_rng(0).normal(size=40)
    wide, narrow = bootstrap_ci(values, level=0.99), bootstrap_ci(values, level=0.5)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    assert bootstrap_ci(values, seed=3) == bootstrap_ci(values, seed=3) != bootstrap_ci(values, seed=4)


def test_one_group_has_no_interval():
    assert all(math.isnan(end) for end in bootstrap_ci([1.0, 2.0], ["d", "d"]))
    assert summarise([record("1"), record("2", dialogue="1")])["ci95"]["nll"] is None


def test_wrong_number_of_groups_is_an_error():
    with pytest.raises(ValueError, match="groups"):
        bootstrap_ci([1.0, 2.0], ["d"])


def test_paired_interval_is_narrower_than_the_unpaired_ones():
    rng = np.random.default_rng(0)
    b = rng.normal(size=100)
    a = b + 0.1 + 0.01 * rng.normal(size=100)
    paired = paired_bootstrap(a, b)
    assert paired["diff"] == pytest.approx(0.1, abs=0.01)
    assert paired["ci95"][0] > 0
    assert bootstrap_ci(a)[0] < bootstrap_ci(b)[1]  # unpaired, the difference is lost in the spread


def test_nll_weights_tokens_not_examples():
    summary = nll_summary([1.0, 30.0], [1, 10])
    assert summary["nll"] == pytest.approx(31 / 11)
    assert summary["perplexity"] == pytest.approx(math.exp(31 / 11))
    assert summary["ci95"] == pytest.approx([1.0, 3.0])  # sums and counts are drawn together


def test_paired_nll_by_hand():
    paired = paired_nll([1.0, 8.0], [2.0, 10.0], [1, 4])
    assert paired["diff"] == pytest.approx(-3 / 5)
    assert paired["ci95"] == pytest.approx([-1.0, -0.5])


def test_an_example_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="token"):
        nll_summary([1.0, 0.0], [1, 0])


def test_summarise_by_hand():
    summary = summarise(
        [
            record("1", "Ann", 2.0, 2, 0.8),
            record("2", "Ann", 4.0, 2, 0.0, empty=True),
            record("3", "Bob", 9.0, 3, 0.5),
            record("4", "Bob", 1.0, 1, None),
        ]
    )
    assert summary["nll"] == pytest.approx(16 / 8)
    assert summary["rougeL"] == pytest.approx(1.3 / 3)  # the empty reply counts, the missing one does not
    assert (summary["empty"], summary["examples"], summary["generated"]) == (1, 4, 3)
    ann, bob = summary["per_querier"]["Ann"], summary["per_querier"]["Bob"]
    assert (ann["nll"], ann["rougeL"], ann["examples"], ann["tokens"]) == (1.5, 0.4, 2, 4)
    assert (bob["nll"], bob["rougeL"], bob["examples"], bob["tokens"]) == (2.5, 0.5, 2, 4)
    assert summary["macro"]["nll"] == pytest.approx(2.0)
    assert summary["macro"]["rougeL"] == pytest.approx(0.45)
    assert summary["ci95"]["nll"][0] < summary["nll"] < summary["ci95"]["nll"][1]


def test_summarise_without_generation_or_records():
    summary = summarise([record("1", rouge_l=None), record("2", rouge_l=None)])
    assert summary["rougeL"] is None and summary["ci95"]["rougeL"] is None and summary["generated"] == 0
    with pytest.raises(ValueError, match="records"):
        summarise([])


def test_compare_matches_by_id():
    a = [record("1", nll_sum=1.0, rouge_l=0.6), record("2", nll_sum=2.0, rouge_l=None)]
    b = [record("2", nll_sum=3.0, rouge_l=0.1), record("1", nll_sum=1.5, rouge_l=0.5)]
    result = compare(a, b)
    assert result["nll"]["diff"] == pytest.approx(-1.5 / 4)
    assert result["rougeL"]["diff"] == pytest.approx(0.1)  # over the one example that both generated


@pytest.mark.parametrize(
    "other",
    [
        [record("1")],
        [record("1"), record("3")],
        [record("1"), record("1")],
        [record("1"), record("2", tokens=5)],
    ],
)
def test_compare_refuses_other_examples(other):
    with pytest.raises(ValueError, match="same"):
        compare([record("1"), record("2")], other)


def test_swap_difference_is_swapped_minus_true():
    true = [record("1", nll_sum=2.0, rouge_l=0.6), record("2", nll_sum=2.0, rouge_l=0.9)]
    swapped = [record("1", nll_sum=4.0, rouge_l=0.2), record("2", nll_sum=3.0, rouge_l=None)]
    swap = swap_summary(true, swapped)
    assert (swap["nll_true"], swap["nll_swapped"], swap["nll_diff"]) == (1.0, 1.75, 0.75)
    assert swap["rougeL_true"] == 0.6 and swap["rougeL_swapped"] == 0.2
    assert swap["rougeL_diff"] == pytest.approx(-0.4)
