"""Tests of the simulation behind docs/performance.md.

They compare its parts with hand calculations and check results that are independent of the costs.
"""

import json

import pytest

from benchmarks import swarm_sim
from benchmarks.swarm_model import (
    MAX_READABLE_BYTES,
    VALUE_BYTES,
    VISIBLE_SECONDS,
    Clock,
    Costs,
    Host,
    OneKey,
    Ours,
    Queue,
    World,
    foretell,
    simulate,
)

COSTS = Costs(
    fetch_bytes=15_000,
    fetch_seconds=0.004,
    connection_bytes=7_000,
    connection_seconds=0.004,
    idle_bytes_per_minute=60_000,
    key_seconds_per_byte=6e-8,
)


def make_host(*changes: float) -> Host:
    return Host(0, (0, 0), Queue(1), Queue(1), Queue(1), list(changes))


def test_queue_works_on_one_thing_after_the_other_at_each_place():
    line = Queue(speed=10)
    assert [line.done(0, 20), line.done(1, 10), line.done(100, 10)] == [2, 3, 101]
    cores = Queue(speed=1, places=2)
    assert [cores.done(0, 5), cores.done(0, 1), cores.done(0, 1)] == [5, 1, 2]


def test_clock_keeps_the_order_of_time_and_then_of_asking():
    clock, happened = Clock(), []
    clock.at(2, lambda: happened.append("c"))
    clock.at(1, lambda: (happened.append("a"), clock.at(0, lambda: happened.append("b"))))
    clock.run()
    assert happened == ["a", "b", "c"]
    assert clock.now == 2


def test_host_that_left_is_still_seen_for_a_while():
    host = make_host(-10, 100, 1000)
    assert [host.is_up(t) for t in (0, 99, 101, 999, 1001)] == [True, True, False, False, True]
    assert host.is_seen(100 + VISIBLE_SECONDS - 1)
    assert not host.is_seen(100 + VISIBLE_SECONDS + 1)
    assert host.stays(0, 99)
    assert not host.stays(0, 101)
    assert not host.stays(99, 1001)


def test_message_takes_the_cores_and_links_of_both_ends():
    world = World(2, 0, Queue(1, places=2))
    near, far = (Host(i, (i, i), Queue(100), Queue(50), Queue(1), [-1]) for i in range(2))
    world.is_local = False
    arrived = []
    world.send(near, far, 200, 1.0, lambda: arrived.append(world.clock.now))
    world.clock.run()
    assert arrived == [pytest.approx(0.5 + 200 / 50 + 0.125 + 200 / 100 + 0.5)]
    assert world.bytes == 200


def test_nodes_on_one_machine_cost_what_was_measured():
    seconds, cpu_seconds, num_bytes = foretell(Ours, 8, COSTS)
    assert cpu_seconds == pytest.approx(2 * COSTS.fetch_seconds)
    assert num_bytes == 2 * COSTS.fetch_bytes
    assert seconds == pytest.approx(8 * 2 * COSTS.fetch_seconds / 2, rel=0.1)


def test_our_cost_is_flat_and_that_of_one_key_is_not():
    ours = [simulate(Ours, n, COSTS) for n in (16, 128)]
    assert ours[1].bytes_a_node == pytest.approx(ours[0].bytes_a_node, rel=0.1)
    assert ours[1].alone == ours[0].alone == 0
    few, many = (foretell(OneKey, n, COSTS) for n in (8, 32))
    assert many[2] > 3 * few[2]
    assert many[0] > 9 * few[0]


def test_key_that_nobody_can_read_leaves_most_nodes_alone():
    too_many = int(1.5 * MAX_READABLE_BYTES / VALUE_BYTES)
    assert simulate(OneKey, too_many, COSTS).alone > 0.5


def test_simulation_tells_model_from_measurement(tmp_path, capsys):
    rows = [
        {"claim": f"{n} nodes: {what}", "ours": ours, "reference": reference}
        for n in (8, 16)
        for what, ours, reference in (
            (swarm_sim.SECONDS, 0.1 * n / 8, 0.5),
            (swarm_sim.BYTES, 60_000, 2e6),
            (swarm_sim.CPU, 0.016, 0.1),
            (swarm_sim.NEW_BYTES, 80_000, 2e6),
            (swarm_sim.NEW_CPU, 0.03, 0.1),
            (swarm_sim.IDLE_BYTES, 60_000, 2e6),
        )
    ]
    costs, out, plot = tmp_path / "costs.json", tmp_path / "out.json", tmp_path / "plot.png"
    costs.write_text(json.dumps(rows))
    swarm_sim.main([str(costs), "--nodes", "8", "16", "--json", str(out), "--plot", str(plot)])
    claims = {row["claim"]: row for row in json.loads(out.read_text())}
    assert claims["model against measured, 16 nodes, ours: processor time a node"][
        "ratio"
    ] == pytest.approx(1, rel=0.15)
    assert claims["simulated, 16 nodes: alone"]["ours"] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")

    costs.write_text(json.dumps(rows[6:]))
    with pytest.raises(SystemExit, match="no figure for 8 nodes"):
        swarm_sim.main([str(costs)])
