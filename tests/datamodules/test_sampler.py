"""The sampler: a permutation, less padding, fair shares for all ranks, and a state that knows the epoch."""

import random
from itertools import pairwise

import pytest

from datamodules.sampler import LengthBucketSampler

LENGTHS = random.Random(0).choices(range(5, 200), k=333)


def padding(order: list[int], batch_size: int) -> int:
    batches = [[LENGTHS[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


def test_permutation_that_differs_between_epochs_and_seeds() -> None:
    orders = [LengthBucketSampler(LENGTHS, 8, seed=seed).order(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(len(LENGTHS))) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    sampler = LengthBucketSampler(LENGTHS, 8)
    assert list(sampler) == orders[0] == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == orders[1]


def test_bucketing_saves_most_padding() -> None:
    plain = padding(LengthBucketSampler(LENGTHS, 8, pool_batches=1).order(0), 8)
    bucketed = padding(LengthBucketSampler(LENGTHS, 8).order(0), 8)
    assert bucketed < 0.3 * plain


def test_batches_do_not_come_in_order_of_length() -> None:
    order = LengthBucketSampler(LENGTHS, 8, pool_batches=1000).order(0)
    firsts = [LENGTHS[order[start]] for start in range(0, 320, 8)]
    assert sum(b > a for a, b in pairwise(firsts)) in range(10, 30)


def test_short_last_batch_is_not_always_the_longest_samples() -> None:
    sampler = LengthBucketSampler(LENGTHS, 8, pool_batches=1000)  # 333 = 41 * 8 + 5
    lasts = [LENGTHS[i] for epoch in range(20) for i in sampler.order(epoch)[-5:]]
    assert 80 < sum(lasts) / len(lasts) < 125  # 102 is the mean of all


def test_ranks_share_every_bucket() -> None:
    ranks = [LengthBucketSampler(LENGTHS, 8, num_replicas=2, rank=rank).order(3) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == len(LengthBucketSampler(LENGTHS, 8, num_replicas=2)) == 167
    together = ranks[0] + ranks[1]
    assert set(together) == set(range(333))
    assert len(together) == 334
    for start in range(0, 160, 8):
        mean_0, mean_1 = (sum(LENGTHS[i] for i in rank[start : start + 8]) / 8 for rank in ranks)
        assert abs(mean_0 - mean_1) < 5
    assert sum(padding(rank, 8) for rank in ranks) < 0.3 * padding(
        LengthBucketSampler(LENGTHS, 8, pool_batches=1).order(3), 8
    )


def test_fewer_samples_than_ranks() -> None:
    ranks = [LengthBucketSampler([3, 4], 8, num_replicas=5, rank=rank).order(0) for rank in range(5)]
    assert [len(rank) for rank in ranks] == [1] * 5
    assert {i for rank in ranks for i in rank} == {0, 1}


def test_state_restores_epoch_and_position() -> None:
    sampler = LengthBucketSampler(LENGTHS, 8)
    sampler.set_epoch(2)
    iterator = iter(sampler)
    for _ in range(10):
        next(iterator)
    state = iterator.state_dict()

    resumed = iter(LengthBucketSampler(LENGTHS, 8))  # a new sampler, which thinks it is epoch 0
    resumed.load_state_dict(state)
    assert list(resumed) == list(iterator) == sampler.order(2)[10:]


def test_epoch_set_after_iter_counts() -> None:
    sampler = LengthBucketSampler(LENGTHS, 8)
    iterator = iter(sampler)
    sampler.set_epoch(1)
    assert list(iterator) == sampler.order(1)


def test_state_of_other_data_is_warned_about() -> None:
    state = iter(LengthBucketSampler(LENGTHS, 8)).state_dict()
    with pytest.warns(UserWarning, match="'batch_size': 8.*'batch_size': 16.*repeats some samples"):
        iter(LengthBucketSampler(LENGTHS, 16)).load_state_dict(state)
