"""The contiguous cache: its verbs, and that rows of one sequence never reach another."""

import pytest
import torch

from nanoglimpse.config import parse_config
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.kvcache.device import DeviceKVCache
from nanoglimpse.kvcache.pool import KVPool
from tests.helpers.tiny import config_dict

TEXT = parse_config(config_dict(), "tiny").text_config


def cache_of(capacity, layers=3):
    positions = torch.arange(len(capacity)) + 100
    return KVCache(TEXT, range(layers), capacity, positions, torch.empty(0), TORCH)


def fill(cache, counts):
    """Random rows in every layer; what was written, as [layers, rows, H, D] pairs."""
    reserved = cache.reserve(counts)
    k, v = torch.randn(2, len(cache.k), sum(counts), 2, 8)
    for layer in range(len(cache.k)):
        # No heads of q, and angles of 0, so that keys are written as they are.
        kv, rope = torch.cat((k[layer], v[layer]), 1), Rope.of(torch.zeros(sum(counts), 4))
        reserved.layer(layer).append(kv, rope, TORCH)
    return k, v


def test_one_allocation_each_for_all_layers_and_sequences():
    cache = cache_of([5, 3, 4])
    assert cache.k.shape == cache.v.shape == (3, 12, 2, 8)
    assert cache.starts == [0, 5, 8]
    assert cache.length.tolist() == [0, 0, 0]


def test_appended_rows_come_back_by_layer_and_sequence():
    cache = cache_of([5, 3, 4])
    first = fill(cache, [2, 0, 3])
    second = fill(cache, [1, 2, 1])
    assert cache.length.tolist() == [3, 2, 4]
    for layer in range(3):
        for number, own in enumerate(zip(first, second, strict=True)):
            view = [cache.layer(layer, b)[number] for b in range(3)]
            (a, _, c), (d, e, f) = own[0][layer].split([2, 0, 3]), own[1][layer].split([1, 2, 1])
            assert torch.equal(view[0], torch.cat((a, d)))
            assert torch.equal(view[1], e)
            assert torch.equal(view[2], torch.cat((c, f)))


def test_views_share_the_memory():
    cache = cache_of([4])
    fill(cache, [4])
    k, _ = cache.layer(1)
    k[2] = 7
    assert bool((cache.k_heads[1][0, :, 2] == 7).all())


def test_a_full_sequence_refuses_more():
    cache = cache_of([5, 2])
    cache.reserve([4, 2])
    with pytest.raises(ValueError, match="sequence 1 of the cache holds 2 of 2 rows; 1 more"):
        cache.reserve([1, 1])
    assert cache.length.tolist() == [4, 2], "a refused call takes nothing"


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("room", [0, 3])
def test_keep_gathers_out_of_place(sequences, room):
    counts = [6, 4, 5][:sequences]
    cache = cache_of([count + room for count in counts])
    fill(cache, counts)
    before = cache.k.clone(), cache.v.clone()
    stays = [torch.tensor(rows) for rows in ([0, 2, 5], [1], [0, 1, 2, 4])][:sequences]
    first = [0, 6, 10]  # rows are counted without the room behind the sequences
    rows = torch.cat([r + start for r, start in zip(stays, first, strict=False)])
    kept = cache.keep(rows, [len(r) for r in stays], layers=range(5), headroom=2)
    assert kept.k.shape[0] == 5
    assert kept.capacity == [len(r) + 2 for r in stays]
    assert kept.length.tolist() == [len(r) for r in stays]
    assert torch.equal(kept.next_position, cache.next_position)
    for layer in range(3):
        for b, own in enumerate(stays):
            for new, old in zip(kept.layer(layer, b), cache.layer(layer, b), strict=True):
                assert torch.equal(new, old[own])
    assert torch.equal(cache.k[:, cache.used()], before[0][:, cache.used()])
    assert torch.equal(cache.v[:, cache.used()], before[1][:, cache.used()])
    assert kept.k.data_ptr() != cache.k.data_ptr()


def test_truncate_forgets_and_moves_the_position_as_told():
    cache = cache_of([5, 5])
    fill(cache, [4, 5])
    cache.truncate([2, 5], torch.tensor([31, 47]))
    assert cache.length.tolist() == [2, 5]
    assert cache.next_position.tolist() == [31, 47]
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate([3, 5], torch.tensor([31, 47]))


def test_bytes_count_the_rows_in_use():
    cache = cache_of([5, 5])
    fill(cache, [4, 1])
    assert cache.nbytes == 2 * 3 * 5 * 2 * 8 * 4


def test_sequences_out_of_use_write_beside_a_full_pool():
    """On every step of a captured batch: to the row after all spans, and always to that one."""
    cache = cache_of([5])
    fill(cache, [3])
    pool = KVPool(5, cache)
    pool.admit(cache, 0, 2)
    device = DeviceKVCache(pool, 3)
    device.load(pool)
    for row in (3, 4):
        assert device.reserve([1]).rows.tolist() == [row, 6, 6]
    assert pool.k.shape[1] == 7
    assert device.lengths.tolist() == [5, 1, 1]
    pool.release([], torch.tensor([], dtype=torch.int64))
    device.load(pool)
    assert device.reserve([1]).rows.tolist() == [6, 6, 6]
