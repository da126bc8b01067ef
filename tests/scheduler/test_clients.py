"""The policy "fair": clients take turns by the service that they have had. And ageing."""

from __future__ import annotations

from collections import Counter
from typing import Any

from octavo.scheduler.policy import AGEING_S

MakeWorld = Any


def test_a_flood_does_not_hold_up_another_client(make_world: MakeWorld) -> None:
    world = make_world(policy="fair", max_num_seqs=4)
    for number in range(40):
        world.add([number] * 12, client="flood", max_tokens=8)
    for _ in range(10):
        world.step()
    world.add([50] * 12, client="calm", name="calm", max_tokens=8)
    num_steps = 0
    while not world.output("calm"):
        world.step()
        num_steps += 1
    assert num_steps <= 9, "the next row that is free is its own"
    world.drain()


def test_two_busy_clients_get_equal_service(make_world: MakeWorld) -> None:
    """One asks for long prompts and short answers, the other for the opposite, but more often."""
    world = make_world(policy="fair", max_num_seqs=6, num_blocks=400, max_num_waiting=999)
    names = {}
    for number in range(30):
        names[world.add([number] * 60, client="reader", max_tokens=2)] = "reader"
        for _ in range(4):
            names[world.add([number] * 3, client="writer", max_tokens=25)] = "writer"
    had: Counter[str] = Counter()
    prompts = {name: 60 if client == "reader" else 3 for name, client in names.items()}
    started = set()
    while world.scheduler.has_work():
        for update in world.step():
            name, client = update.request_id, names[update.request_id]
            had[client] += 2 * len(update.token_ids) + (prompts[name] if name not in started else 0)
            started.add(name)
        waiting = {client for name, client in names.items() if name not in started}
        if waiting != {"reader", "writer"}:
            break
        # What six rows hold: the bound of the paper's theorem 4.3 without its factor of two.
        assert abs(had["reader"] - had["writer"]) <= 6 * 64
    assert min(had.values()) > 1000
    world.drain()


def test_rest_is_no_credit(make_world: MakeWorld) -> None:
    world = make_world(policy="fair", max_num_seqs=2)
    for number in range(30):
        world.add([number] * 10, client="busy", max_tokens=4)
    for _ in range(20):
        world.step()
    for number in range(30, 60):
        world.add([number] * 10, client="rested", max_tokens=4)
    before = len(world.updates)
    for _ in range(24):
        world.step()
    recent = [u.request_id for u in world.updates[before:] if u.finish_reason]
    own = sum(int(name.partition("-")[2]) > 30 for name in recent)
    assert abs(own - len(recent) / 2) <= 2, "they take turns from now on"
    world.drain()


def test_clients_that_left_are_forgotten(make_world: MakeWorld) -> None:
    world = make_world(policy="fair")
    for number in range(200):
        world.add([number] * 3, client=str(number), max_tokens=1)
        world.drain()
    counters = world.scheduler._counters
    assert len(counters._counters) <= 1


def test_waiting_is_worth_priority(make_world: MakeWorld) -> None:
    world = make_world(policy="priority", max_num_seqs=1)
    world.add([1] * 4, priority=0, name="first", max_tokens=3)
    world.step()
    world.add([2] * 4, priority=2, name="old", max_tokens=1)
    world.num_steps += int(3 * AGEING_S)
    world.add([3] * 4, priority=0, name="new", max_tokens=1)
    world.drain()
    ended = [update.request_id for update in world.updates if update.finish_reason]
    assert ended == ["first", "old", "new"]
