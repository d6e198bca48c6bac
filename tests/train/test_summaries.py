import math

import pytest

from train.metrics import (
    compare,
    compare_seeds,
    nll_summary,
    paired_nll,
    pool,
    rescore,
    score_reply,
    summarise,
    summarise_seeds,
    swap_summary,
    unscored,
    with_all_scores,
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


def test_nll_weights_tokens_not_examples():
    summary = nll_summary([1.0, 30.0], [1, 10], ["a", "b"])
    assert summary["nll"] == pytest.approx(31 / 11)
    assert summary["perplexity"] == pytest.approx(math.exp(31 / 11))
    assert summary["ci95"] == pytest.approx([1.0, 3.0])  # sums and counts are drawn together


def test_paired_nll_by_hand():
    paired = paired_nll([1.0, 8.0], [2.0, 10.0], [1, 4], ["a", "b"])
    assert paired["diff"] == pytest.approx(-3 / 5)
    assert paired["ci95"] == pytest.approx([-1.0, -0.5])


def test_an_example_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="token"):
        nll_summary([1.0, 0.0], [1, 0], ["a", "b"])


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


def test_a_single_dialogue_has_no_interval():
    assert summarise([record("1"), record("2", dialogue="1")])["ci95"]["nll"] is None


def generated(name, reply, reference="the cat sat", nll_sum=2.0, querier="Ann", tokens=None):
    base = {"id": name, "dialogue": name, "querier": querier, "nll_sum": nll_sum, "tokens": 2}
    return base | score_reply(reply, reference, tokens)


def test_empty_and_failed_replies_are_counted_and_score_zero():
    records = [generated("1", "the cat sat"), generated("2", " "), generated("3", None)]
    unasked = {"id": "4", "dialogue": "4", "querier": "Ann", "nll_sum": 2.0, "tokens": 2}
    summary = summarise([*records, unasked | unscored("the cat sat")])
    assert (summary["generated"], summary["empty"], summary["failed"]) == (3, 1, 1)
    assert (summary["rougeL"], summary["bleu1"]) == pytest.approx((1 / 3, 1 / 3))
    # of three replies of three words each only one is there: brevity penalty exp(1 - 9 / 3)
    assert summary["corpus_bleu1"] == pytest.approx(math.exp(-2))
    assert summary["distinct1"] == 1.0 and summary["per_querier"]["Ann"]["distinct1"] == 1.0
    assert len(summary["ci95"]["bleu4"]) == 2


def test_a_summary_splits_all_replies_into_one_kind_of_tokens():
    records = [
        generated("1", "你好 世界", "你好 世界呀", querier="Zhou", tokens="word"),
        generated("2", "hello my friend", "hello there my friend again " * 4, tokens="word"),
    ]
    summary = summarise(records)
    assert summary == summarise(records, tokens="word")
    zhou = summary["per_querier"]["Zhou"]
    assert zhou["corpus_bleu1"] == pytest.approx(zhou["bleu1"]) == 0.5
    unasked = {**record("3", rouge_l=None), "reference": "你好世界" * 40}
    by_character = summarise(records, tokens="character")
    assert summarise([*records, unasked])["distinct1"] == by_character["distinct1"] != summary["distinct1"]
    runs = [records[:1], records]  # the first alone would be split into characters
    assert summarise_seeds(runs)["corpus_bleu1"] == summarise_seeds(runs, tokens="word")["corpus_bleu1"]


def test_records_without_texts_have_no_corpus_scores():
    summary = summarise([record("1"), record("2", rouge_l=None)])
    assert summary["corpus_bleu4"] is None and summary["macro"]["distinct1"] is None
    assert summary["rougeL"] == 0.5 and summary["bleu1"] is None


def test_rescoring_changes_the_scores_of_generated_replies_alone():
    records = [generated("1", "喜欢我们", "我们喜欢", tokens="character"), generated("2", None, "好")]
    words = rescore(records, "jieba")
    assert (records[0]["rouge2"], words[0]["rouge2"]) == (pytest.approx(2 / 3), 0.0)
    assert words[0]["nll_sum"] == 2.0 and words[1]["failed"] and words[1]["rougeL"] == 0.0
    paper = rescore(records, compat="rouge-1.0.0")
    assert paper[0]["rouge1"] == pytest.approx(1.0) and paper[0]["rouge1"] < 1.0
    unasked = [{**record("3", rouge_l=None), "reference": "好"}]
    assert rescore(unasked) == unasked
    with pytest.raises(ValueError, match="reference"):
        rescore([record("1")])


def test_records_get_the_scores_that_they_lack_and_keep_those_that_they_have():
    complete = [
        generated("1", "the cat"),
        generated("2", None),
        {**record("3", rouge_l=None), **unscored("a")},
    ]
    lacking = [{key: value for key, value in one.items() if key != "bleu2"} for one in complete]
    lacking[0]["rouge1"] = 0.125  # as another version counted
    first, *others = with_all_scores(lacking)
    assert first == complete[0] | {"rouge1": 0.125}
    assert others == [complete[1], lacking[2]] and "bleu2" not in lacking[0]
    without_texts = [record("1"), record("2", rouge_l=None)]
    assert with_all_scores(without_texts) == without_texts


def seed_runs(shift=0.0):
    return [
        [record("1", "Ann", 2.0 + shift, rouge_l=0.2), record("2", "Bob", 6.0 + shift, rouge_l=0.4)],
        [record("2", "Bob", 8.0 + shift, rouge_l=0.0), record("1", "Ann", 4.0 + shift, rouge_l=0.6)],
    ]


def test_pooling_averages_a_window_over_seeds_by_id():
    first, second = pool(seed_runs())
    assert (first["id"], first["nll_sum"], first["rougeL"]) == ("1", 3.0, pytest.approx(0.4))
    assert (second["id"], second["nll_sum"], second["rougeL"]) == ("2", 7.0, pytest.approx(0.2))
    with pytest.raises(ValueError, match="a window more than once"):
        pool([[record("1"), record("1")]])
    with pytest.raises(ValueError, match="same tokens"):
        pool([[record("1")], [record("1", tokens=3)]])
    with pytest.raises(ValueError, match="at least one run"):
        pool([])


def test_a_window_is_averaged_over_the_runs_that_hold_it_out():
    runs = [[record("1", nll_sum=2.0), record("2", nll_sum=6.0)], [record("2", nll_sum=8.0), record("3")]]
    assert [(one["id"], one["nll_sum"]) for one in pool(runs)] == [
        ("1", 2.0),
        ("2", 7.0),
        ("3", record("3")["nll_sum"]),
    ]
    other = [[{**one, "nll_sum": one["nll_sum"] - 1} for one in run] for run in runs]
    assert compare_seeds(other, runs)["nll"]["diff"] == pytest.approx(-1 / record("1")["tokens"])
    with pytest.raises(ValueError, match="same examples"):
        compare_seeds(runs, runs[:1])


def test_a_summary_over_seeds_counts_each_window_once():
    summary = summarise_seeds(seed_runs())
    assert summary["examples"] == 2 and summary["nll"] == pytest.approx(10 / 4)
    assert summary["ci95"]["nll"] == summarise(pool(seed_runs()))["ci95"]["nll"]
    assert [one["nll"] for one in summary["per_seed"]] == [2.0, 3.0]
    assert [one["rougeL"] for one in summary["per_seed"]] == pytest.approx([0.3, 0.3])
    assert summary["corpus_bleu1"] is None


def test_scores_over_all_replies_are_averaged_over_seeds_and_failures_added_up():
    runs = [
        [generated("1", "the cat sat"), generated("2", ""), generated("3", None)],
        [generated("1", "the the the"), generated("2", ""), generated("3", None)],
    ]
    single = [summarise(run) for run in runs]
    summary = summarise_seeds(runs)
    for group in ((lambda s: s), (lambda s: s["macro"]), (lambda s: s["per_querier"]["Ann"])):
        parts = [group(one)["distinct1"] for one in single]
        assert parts == [1.0, pytest.approx(1 / 3)]
        assert group(summary)["distinct1"] == pytest.approx(2 / 3)
    assert (summary["empty"], summary["failed"], summary["generated"]) == (2, 2, 3)


def test_a_querier_may_be_missing_from_a_run_and_tokens_are_those_asked_for():
    here = [generated("1", "我们走吧", "我们不走", tokens="jieba"), generated("2", "好", "好", querier="Bo")]
    summary = summarise_seeds([here, here[:1]], tokens="jieba")
    assert summary["per_querier"]["Bo"]["distinct1"] == 1
    single = [summarise(run, tokens="jieba")["corpus_bleu2"] for run in (here, here[:1])]
    assert summary["corpus_bleu2"] == pytest.approx(sum(single) / 2)
    assert summarise_seeds([here, here[:1]], tokens="character")["corpus_bleu2"] != summary["corpus_bleu2"]


def test_methods_are_compared_over_their_seeds():
    result = compare_seeds(seed_runs(-1.0), seed_runs())
    assert result["nll"]["diff"] == pytest.approx(-0.5) and result["nll"]["per_seed"] == [-0.5, -0.5]
    assert result["nll"]["ci95"] == pytest.approx([-0.5, -0.5]) and 0 < result["nll"]["p"] <= 1
    one_seed = compare_seeds(seed_runs(-1.0), seed_runs()[:1])
    assert one_seed["nll"]["diff"] == 0.0  # windows of 2 and 6 nats on both sides
    assert "per_seed" not in one_seed["nll"]
