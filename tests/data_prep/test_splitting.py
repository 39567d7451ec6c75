"""Validation by prompt: whole prompts, as many rows as are asked for, the same whatever the order of the rows.

The oracle is a plain reading of the rule, over every prompt and row.
"""

import numpy as np
import pytest

from data_prep.common.splitting import choose_validation, hash_prompts, order_by_prompt, round_to_total


def prompts_of(count, sizes, seed=0):
    """`count` rows of prompts that stand in 1 to `sizes` rows each."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**64, size=count, dtype=np.uint64)
    return rng.permutation(np.repeat(keys, rng.integers(1, sizes + 1, size=count))[:count])


@pytest.mark.parametrize("sizes", [1, 5, 40])
@pytest.mark.parametrize("count", [1, 17, 100, 400])
def test_prompts_stay_whole_and_the_count_is_met(sizes, count):
    prompts = prompts_of(1000, sizes)
    mask = choose_validation(prompts, count, seed=3)
    assert not set(prompts[mask]) & set(prompts[~mask])
    assert count <= mask.sum() < count + sizes  # the last prompt may bring more than was missing


def test_the_order_of_the_rows_does_not_matter():
    prompts = prompts_of(500, 4)
    order = np.random.default_rng(1).permutation(len(prompts))
    assert set(prompts[choose_validation(prompts, 60, 5)]) == set(
        prompts[order][choose_validation(prompts[order], 60, 5)]
    )
    assert set(prompts[choose_validation(prompts, 60, 5)]) != set(prompts[choose_validation(prompts, 60, 6)])


def test_each_group_gives_its_share():
    prompts = prompts_of(1000, 1)
    groups = np.repeat([0, 1, 2], [700, 200, 100])
    mask = choose_validation(prompts, 100, 9, groups)
    assert [int(mask[groups == group].sum()) for group in range(3)] == [70, 20, 10]


def test_rows_that_are_validation_already_count():
    """With every row of their prompts, towards the share of their group."""
    prompts = prompts_of(400, 2)
    chosen = np.zeros(400, bool)
    chosen[:30] = True
    mask = choose_validation(prompts, 60, 2, chosen=chosen)
    assert mask[:30].all() and 60 <= mask.sum() <= 62 and not set(prompts[mask]) & set(prompts[~mask])
    assert choose_validation(prompts, 5, 2, chosen=chosen).sum() == np.isin(prompts, prompts[:30]).sum()


def test_no_rows():
    assert not len(choose_validation(np.zeros(0, np.uint64), 3, 1))


def test_rows_of_a_prompt_follow_each_other():
    prompts = prompts_of(300, 6)
    ordered = prompts[order_by_prompt(np.arange(300), prompts, 4)]
    changes = np.count_nonzero(ordered[1:] != ordered[:-1])
    assert changes + 1 == len(set(prompts)) and ordered.tolist() != sorted(ordered.tolist())


def test_whole_numbers_that_sum_to_a_total():
    """Largest remainders, by hand."""
    assert round_to_total(10, np.array([0.25, 0.25, 0.5])).tolist() == [3, 2, 5]
    assert round_to_total(10, np.array([0.11, 0.24, 0.65])).tolist() == [1, 2, 7]
    assert round_to_total(7, np.array([1 / 3, 1 / 3, 1 / 3])).tolist() == [3, 2, 2]
    assert round_to_total(0, np.array([0.5, 0.5])).tolist() == [0, 0]


def test_the_hash_is_splitmix64():
    """The first numbers of its reference implementation for the seeds 0 and 1234567."""
    zero = np.zeros(1, np.uint64)
    assert int(hash_prompts(zero, 0)[0]) == 0xE220A8397B1DCDAF
    assert int(hash_prompts(zero + np.uint64(1234567), 0)[0]) == 6457827717110365317
