"""Boundaries of packed sequences."""

from nanoglimpse.kernels.varlen import Segments


def test_neighbours_of_equal_length_are_one_run():
    assert [tuple(run) for run in Segments((4, 4, 2, 4)).runs] == [(0, 2, 4), (8, 1, 2), (10, 1, 4)]
    assert Segments((4, 4, 2)).cu_seqlens.tolist() == [0, 4, 8, 10]
