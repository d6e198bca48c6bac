import logging
import math
import unicodedata

import pytest

from train.errors import UserError
from train.metrics import SCORE_KEYS, chrf, corpus_bleu, distinct, rouge, sentence_bleu, tokens_for, wording
from train.metrics.rouge import _scorer
from train.metrics.text import tokenise


def test_rouge_english_by_hand():
    # prediction 3 words, reference 4; 3 common words, 2 common bigrams (2 and 3 in all)
    scores = rouge("the cat sat", "the cat sat down")
    assert scores["rouge1"] == pytest.approx(2 * (3 / 3) * (3 / 4) / (3 / 3 + 3 / 4))
    assert scores["rouge2"] == pytest.approx(2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))
    # words out of order: the longest common subsequence has 2 words
    assert rouge("sat the cat", "the cat sat")["rougeL"] == pytest.approx(2 / 3)


def test_rouge_english_stems_words():
    assert rouge("running dogs", "run dog")["rouge1"] == 1.0


def test_nothing_is_logged_by_the_scorer(caplog):
    _scorer.cache_clear()
    with caplog.at_level(logging.INFO):
        rouge("a", "b", "word")
    assert not caplog.records


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
    assert tokenise("वह लड़की की", "unicode") == ["वह", "लड़की", "की"]  # vowels are marks on letters
    assert tokenise("Cafe\u0301", "unicode") == ["caf\u00e9"]
    assert tokens_for(["สวัสดีครับ"]) == "character"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Нет, мой король", "unicode"),
        ("Où étais-tu caché, Amélie?", "word"),
        ("ガンダムがいいです", "character"),
    ],
)
def test_marks_may_be_written_apart_from_their_letters(text, tokens):
    apart = unicodedata.normalize("NFD", text)
    assert apart != text
    assert rouge(apart, text, tokens)["rougeL"] == pytest.approx(1)
    assert sentence_bleu(apart, text, tokens)["bleu1"] == pytest.approx(1)
    assert distinct([f"{apart} {text}"], tokens)["distinct1"] <= 0.5


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


def test_chrf_by_hand():
    assert chrf("the cat", "the cat") == chrf("thecat", "the cat") == 1.0
    # all of its characters and pairs are there; 2 of 3 characters and 1 of 2 pairs are found; no longer ones
    recall = (2 / 3 + 1 / 2) / 2
    assert chrf("ab", "abc") == pytest.approx(5 * recall / (4 + recall))
    assert chrf("AB", "abc") == chrf("", "abc") == chrf(" \n", "abc") == 0.0
    assert chrf(unicodedata.normalize("NFD", "caché"), "caché") == 1.0
    assert 0 < chrf("喜欢我们", "我们喜欢") < 1


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


def test_scores_are_written_in_nats_and_points():
    assert [wording.score(key, 0.12345) for key in ("nll", "rougeL", "perplexity")] == [
        "0.123",
        "12.3",
        "0.12",
    ]
    assert [wording.score("nll", value) for value in (None, float("nan"))] == [wording.MISSING] * 2
    assert wording.difference("nll", -0.01, [-0.02, 0.001]) == "-0.010 [-0.020, +0.001]"
    assert wording.difference("rougeL", 0.012, None) == "+1.2"
    assert wording.difference("rougeL", None, None, "not measured") == "not measured"


def test_every_score_that_is_shown_has_a_name():
    shown = {*wording.TABLE, *wording.SUMMARY, *wording.COMPARED}
    assert shown | set(SCORE_KEYS) <= set(wording.LABELS)
