import math

import numpy as np
import pytest

from train.metrics import bootstrap_ci, paired_bootstrap
from train.metrics.bootstrap import sign_flip_p


def alone(values):
    """Every value a group of its own."""
    return range(len(values))


def test_bootstrap_covers_the_true_mean_of_grouped_values():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 5).tolist()
    hits = 0
    for _ in range(200):
        values = np.repeat(rng.normal(size=60), 5) + 0.3 * rng.normal(size=300)
        low, high = bootstrap_ci(values, groups)
        hits += low < 0 < high
    assert 0.88 < hits / 200 < 0.99


def test_groups_widen_the_interval_of_repeated_values():
    values = np.random.default_rng(0).normal(size=50)
    single = np.diff(bootstrap_ci(values, alone(values)))[0]
    copies = np.diff(bootstrap_ci(np.repeat(values, 16), range(16 * 50)))[0]
    grouped = np.diff(bootstrap_ci(np.repeat(values, 16), np.repeat(np.arange(50), 16).tolist()))[0]
    assert copies == pytest.approx(single / 4, rel=0.15)
    assert grouped == pytest.approx(single)


def test_the_interval_is_of_95_percent_and_the_same_every_time():
    values = np.random.default_rng(0).normal(size=400)
    half = 1.96 * values.std() / 20
    found = bootstrap_ci(values, alone(values))
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert found == bootstrap_ci(values, alone(values))


def test_one_group_has_no_interval():
    assert all(math.isnan(end) for end in bootstrap_ci([1.0, 2.0], ["d", "d"]))


def test_wrong_number_of_groups_is_an_error():
    with pytest.raises(ValueError, match="groups"):
        bootstrap_ci([1.0, 2.0], ["d"])


def test_paired_interval_is_narrower_than_the_unpaired_ones():
    rng = np.random.default_rng(0)
    b = rng.normal(size=100)
    a = b + 0.1 + 0.01 * rng.normal(size=100)
    paired = paired_bootstrap(a, b, alone(a))
    assert paired["diff"] == pytest.approx(0.1, abs=0.01)
    assert paired["ci95"][0] > 0
    assert (
        bootstrap_ci(a, alone(a))[0] < bootstrap_ci(b, alone(b))[1]
    )  # unpaired, the difference is lost in the spread


def test_sign_flips_of_few_groups_by_hand():
    # 2 of 2^4 sign patterns are as extreme as all the same, 4 of 2^4 with one small opposite
    assert sign_flip_p([1.0, 1.0, 1.0, 1.0], "abcd") == pytest.approx(2 / 16, abs=0.015)
    assert sign_flip_p([5.0, 4.0, 3.0, -1.0], "abcd") == pytest.approx(4 / 16, abs=0.015)
    assert sign_flip_p([1.0, -1.0], "ab") == 1.0 and sign_flip_p([0.0, 0.0], "ab") == 1.0
    # no pattern is nearer to 0 than the observed 0.05, though rounding moves some of them
    assert sign_flip_p([0.1, 0.1, 0.1, -0.3, 0.05], "abcde") == 1.0
    assert sign_flip_p([1.0, 1.0], ["d", "d"]) is None


def test_sign_flips_are_of_whole_groups():
    values = np.random.default_rng(0).normal(0.6, 1, size=12)
    repeated = sign_flip_p(np.repeat(values, 10), np.repeat(np.arange(12), 10).tolist())
    assert repeated == sign_flip_p(values, alone(values)) > sign_flip_p(np.repeat(values, 10), range(120))


def test_sign_flips_reject_no_more_than_they_should():
    rng = np.random.default_rng(2)
    rejected = sum(sign_flip_p(rng.normal(size=20), range(20)) < 0.05 for _ in range(100))
    assert rejected <= 12
    assert sign_flip_p(rng.normal(1, 1, size=40), range(40)) < 0.001
