import math

import numpy as np
import pytest

from train.bootstrap import sign_flip_p
from train.errors import UserError
from train.metrics import (
    bootstrap_ci,
    compare,
    compare_seeds,
    corpus_bleu,
    distinct,
    nll_summary,
    paired_bootstrap,
    paired_nll,
    pool,
    rescore,
    rouge,
    score_reply,
    sentence_bleu,
    summarise,
    summarise_seeds,
    swap_summary,
    tokens_for,
    unscored,
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
    assert rouge("我们 喜欢 北京", "我们喜欢上海", "jieba")["rouge1"] == pytest.approx(2 / 3)
    assert rouge("我们 喜欢 北京", "我们喜欢上海", "character")["rouge1"] == pytest.approx(4 / 6)
    assert rouge("喜欢我们", "我们喜欢", "jieba")["rouge2"] == 0.0
    assert rouge("喜欢我们", "我们喜欢", "character")["rouge2"] == pytest.approx(2 / 3)


def test_tokens_are_chosen_by_the_letters_of_the_reference():
    assert tokens_for(["OK, 我们走吧。"]) == "character"
    assert tokens_for(["He said 你好 to them."]) == tokens_for([]) == tokens_for(["1, 2."]) == "word"
    assert tokens_for(["ここにいる"]) == "character"
    assert tokens_for(["Привет, мир"]) == tokens_for(["안녕하세요 여러분"]) == "unicode"
    assert rouge("喜欢我们", "我们喜欢") == rouge("喜欢我们", "我们喜欢", "character")


def test_words_of_other_scripts():
    assert rouge("привет, друзья", "Привет, мир")["rouge1"] == pytest.approx(1 / 2)
    assert rouge("привет, друзья", "привет, мир", compat="rouge-1.0.0")["rouge1"] == pytest.approx(
        1 / 2, abs=1e-6
    )
    assert sentence_bleu("Привет, друзья", "Привет, мир", "unicode")["bleu1"] == pytest.approx(2 / 3)
    assert distinct(["мир Мир дом"], "unicode")["distinct1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("compat", [None, "rouge-1.0.0"])
@pytest.mark.parametrize("tokens", ["word", "unicode", "character", "jieba"])
@pytest.mark.parametrize("prediction", ["", "  \n", "..."])
def test_an_empty_prediction_scores_zero(tokens, prediction, compat):
    assert set(rouge(prediction, "好 good", tokens, compat).values()) == {0.0}
    assert set(sentence_bleu(prediction, "好 good", tokens).values()) == {0.0}


def test_unknown_tokens_and_compat_say_what_to_pass():
    with pytest.raises(UserError, match="character"):
        rouge("a", "b", "letter")
    with pytest.raises(UserError, match=r"rouge-1\.0\.0"):
        rouge("a", "b", compat="rouge-2")
    with pytest.raises(UserError, match="jieba"):
        sentence_bleu("a", "b", "letter")


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge1", "rouge2", "rouge_l"),
    [  # what the package rouge 1.0.0 gives
        (
            "the cat sat on the mat. the cat ran.",
            "the cat ran on. a mat sat.",
            0.7499999950781251,
            0.2857142808163266,
            0.7692307642603551,
        ),
        (
            "to be or not to be",
            "be not or to be. To be",
            0.7692307642603551,
            0.18181817685950424,
            0.6666666617283951,
        ),
        ("a. . b", "a. b. . c", 0.8571428522448981, 0.0, 0.8571428522448981),
        # of the longest common subsequences a c and c c the package takes the one with fewer different words
        ("c a a c", "a b c c c", 0.6666666617283951, 0.0, 0.39999999520000007),
        ("x y z x y", "y x z y x", 0.999999995, 0.0, 0.6666666616666668),
        (
            "你 好 吗 。 你 好",
            "你 好 。 我 很 好",
            0.6666666616666668,
            0.19999999500000015,
            0.6666666617283951,
        ),
    ],
)
def test_the_papers_package(prediction, reference, rouge1, rouge2, rouge_l):
    found = rouge(prediction, reference, "word", "rouge-1.0.0")
    assert found == pytest.approx({"rouge1": rouge1, "rouge2": rouge2, "rougeL": rouge_l}, rel=1e-12)


def test_the_papers_package_on_chinese_reads_characters():
    spaced = rouge("你 好 吗 。 你 好", "你 好 。 我 很 好", "word", "rouge-1.0.0")
    assert rouge("你好吗。你好", "你好。我很好", compat="rouge-1.0.0") == spaced


def test_bleu_by_hand():
    scores = sentence_bleu("the cat sat", "the cat sat down", "word")
    brevity = math.exp(1 - 4 / 3)  # all n-grams match, a word is missing
    assert scores["bleu1"] == pytest.approx(brevity) and scores["bleu2"] == pytest.approx(brevity)
    assert scores["bleu4"] == pytest.approx(brevity)  # over the three orders that the reply has
    # one word of four; no bigram of three, which counts as half of one, and no trigram as a quarter
    odd = sentence_bleu("a x y z", "b c d a", "word")
    assert odd["bleu1"] == pytest.approx(1 / 4)
    assert odd["bleu2"] == pytest.approx(math.sqrt(1 / 4 * 1 / 2 / 3))
    assert odd["bleu3"] == pytest.approx((1 / 4 * 1 / 2 / 3 * 1 / 4 / 2) ** (1 / 3))


def test_bleu_of_chinese_is_by_character_or_word():
    assert sentence_bleu("喜欢我们", "我们喜欢", "character")["bleu2"] == pytest.approx(math.sqrt(2 / 3))
    assert sentence_bleu("喜欢我们", "我们喜欢", "jieba")["bleu2"] == pytest.approx(math.sqrt(1 / 2))


def test_corpus_bleu_adds_counts_up_before_dividing():
    together = corpus_bleu(["a b", "x"], ["a b", "y"], "word")
    assert together["corpus_bleu1"] == pytest.approx(2 / 3)
    assert corpus_bleu(["", ""], ["a", "b"], "word")["corpus_bleu1"] == 0.0


def test_distinct_counts_over_all_replies():
    found = distinct(["a b a", "A c!", ""], "word")
    assert found == {"distinct1": pytest.approx(3 / 5), "distinct2": pytest.approx(3 / 3)}
    assert distinct([""], "word") == {"distinct1": 0.0, "distinct2": 0.0}
    assert distinct(["我们我们"], "jieba")["distinct1"] == 0.5


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


def test_sign_flips_of_few_groups_by_hand():
    # 2 of 2^4 sign patterns are as extreme as all the same, 4 of 2^4 with one small opposite
    assert sign_flip_p([1.0, 1.0, 1.0, 1.0]) == pytest.approx(2 / 16, abs=0.015)
    assert sign_flip_p([5.0, 4.0, 3.0, -1.0]) == pytest.approx(4 / 16, abs=0.015)
    assert sign_flip_p([1.0, -1.0]) == 1.0 and sign_flip_p([0.0, 0.0]) == 1.0
    assert sign_flip_p([1.0, 1.0], ["d", "d"]) is None


def test_sign_flips_are_of_whole_groups():
    values = np.random.default_rng(0).normal(0.6, 1, size=12)
    repeated = sign_flip_p(np.repeat(values, 10), np.repeat(np.arange(12), 10).tolist())
    assert repeated == sign_flip_p(values) > sign_flip_p(np.repeat(values, 10))


def test_sign_flips_reject_no_more_than_they_should():
    rng = np.random.default_rng(2)
    rejected = sum(sign_flip_p(rng.normal(size=20)) < 0.05 for _ in range(100))
    assert rejected <= 12
    assert sign_flip_p(rng.normal(1, 1, size=40)) < 0.001


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


def test_methods_are_compared_over_their_seeds():
    result = compare_seeds(seed_runs(-1.0), seed_runs())
    assert result["nll"]["diff"] == pytest.approx(-0.5) and result["nll"]["per_seed"] == [-0.5, -0.5]
    assert result["nll"]["ci95"] == pytest.approx([-0.5, -0.5]) and 0 < result["nll"]["p"] <= 1
    one_seed = compare_seeds(seed_runs(-1.0), seed_runs()[:1])
    assert one_seed["nll"]["diff"] == 0.0  # windows of 2 and 6 nats on both sides
    assert "per_seed" not in one_seed["nll"]
