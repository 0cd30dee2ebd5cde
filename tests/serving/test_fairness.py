"""Turns by hand, and what holds of any of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.serving.fairness import Turns


def test_who_has_used_least_is_next_and_clients_come_before_their_jobs() -> None:
    turns: Turns[str] = Turns()
    for job in ("a1", "a2", "b1"):
        turns.add(job, job[0])
    assert turns.first(["a1", "a2", "b1"]) == "a1"
    turns.charge("a1", 3.0)
    assert turns.first(["a1", "a2", "b1"]) == "b1"
    turns.charge("b1", 4.0)
    assert turns.first(["a1", "a2", "b1"]) == "a2"  # of client a, whose other job has had its share
    turns.charge("a2", 2.0)
    assert turns.first(["a1", "a2", "b1"]) == "b1"
    assert turns.first([]) is None


def test_who_comes_later_does_not_bring_time_along() -> None:
    turns: Turns[str] = Turns()
    turns.add("a1", "a")
    turns.charge("a1", 100.0)
    turns.add("b1", "b")
    turns.charge("b1", 1.0)
    assert turns.first(["a1", "b1"]) == "a1"  # b began at a's 100
    turns.charge("a1", 2.0)
    turns.remove("b1")
    turns.add("b2", "b")  # comes back, at a's 102
    turns.add("a2", "a")  # at a1's 102
    assert turns.first(["a2", "b2"]) == "b2"
    turns.remove("b2")
    turns.remove("b2")
    assert turns.count("b") == 0
    assert turns.count("a") == 2


def test_a_batch_is_shared_out_by_hand() -> None:
    turns: Turns[str] = Turns()
    left = {"large": 5000, "one": 1, "three": 3, "other": 40}
    for job, client in (("large", "a"), ("one", "a"), ("three", "a"), ("other", "b")):
        turns.add(job, client)
    # In turns of 4, with what clients a and b have then: large 4 (a 4), other 4 (b 4), one 1 (a 5), other 4 (b 8),
    # three 3 (a 8), large 4 (a 12), other 4 (b 12), and large and other share the 8 that are left.
    batch = turns.fill(list(left), left.__getitem__, 32, 4, 1.0)
    assert batch == [("large", 12), ("other", 16), ("one", 1), ("three", 3)]
    assert turns.fill(list(left), left.__getitem__, 2, 4, 1.0) == [("large", 2)]
    assert turns.fill([], left.__getitem__, 32, 4, 1.0) == []


@settings(max_examples=40, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), max_size=12),
    size=st.integers(1, 40),
    turn=st.integers(1, 16),
)
def test_a_batch_is_full_where_there_is_work_and_no_client_gets_more_than_a_turn_beyond_another(
    jobs: list[tuple[str, int]], size: int, turn: int
) -> None:
    turns: Turns[int] = Turns()
    for number, (client, _) in enumerate(jobs):
        turns.add(number, client)
    batch = dict(turns.fill(range(len(jobs)), lambda job: jobs[job][1], size, turn, 0.5))
    assert sum(batch.values()) == min(size, sum(work for _, work in jobs))
    assert all(0 < units <= jobs[job][1] for job, units in batch.items())
    got = {client: sum(u for job, u in batch.items() if jobs[job][0] == client) for client, _ in jobs}
    work = {client: sum(own for other, own in jobs if other == client) for client, _ in jobs}
    for client in got:
        if got[client] < work[client]:  # it would have taken more
            assert all(got[other] <= got[client] + turn for other in got)
