"""The repair's state machine against anything that may be seen, in any order, true or not."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster import repair
from cluster.messages import HostAddress, HostSpec, NodeInfo
from cluster.repair_state import (
    RUNNING,
    Backoff,
    HostDead,
    HostFailed,
    HostReady,
    Launch,
    NodesSeen,
    Observation,
    Phase,
    Publish,
    Tick,
    Wanted,
    planned,
)

HOSTS = ("a", "b", "c")
NODES = tuple(NodeInfo(f"n{i}", f"10.0.0.{i}", f"n{i}", 4, 0, 300) for i in range(3))
SPECS = {
    host_id: HostSpec(
        host_id, f"n{i}", "/m", "m", "m", "float32", "cpu", "auto", 1, {0: (i,)}, host_id, "", 0
    )
    for i, host_id in enumerate(HOSTS)
}
WANTED = Wanted(SPECS, backoff=Backoff(first_s=1, longest_s=8, quiet_s=20))


class RepairMachine(RuleBasedStateMachine):
    """Observations of every launch so far, also of those that are over, and of the one to come."""

    def __init__(self) -> None:
        super().__init__()
        self.state = planned(SPECS, 5)
        self.now = 0.0
        self.epoch = 5
        self.ready: set[tuple[str, int]] = set()
        self.over: set[tuple[str, int]] = set()
        self.table: dict[str, HostAddress | None] = dict.fromkeys(HOSTS)

    @initialize()
    def deploy(self) -> None:
        for host_id in HOSTS:
            self.state, launch = repair.launch(WANTED, self.state, host_id, self.now)
            assert (launch.spec, launch.generation) == (SPECS[host_id], 1)

    def see(self, seen: Observation) -> None:
        before = self.state
        self.state, actions = repair.step(WANTED, before, seen, self.now)
        for action in actions:
            if isinstance(action, Publish):
                assert action.epoch == self.epoch + 1 == self.state.epoch
                self.epoch, self.table = action.epoch, dict(action.hosts)
            elif isinstance(action, Launch):
                self.check_launch(action, before.hosts[action.spec.host_id].retry_at)
        # The same again is no news: a message may come twice.
        if not isinstance(seen, Tick):
            assert repair.step(WANTED, self.state, seen, self.now) == (self.state, ())

    def check_launch(self, action: Launch, retry_at: float) -> None:
        host = self.state.hosts[action.spec.host_id]
        assert host.phase is Phase.STARTING and host.generation == action.generation
        assert (action.spec.host_id, action.generation - 1) in self.over
        assert host.crashes < 2 or retry_at <= self.now
        assert self.state.nodes is not None
        assert action.spec.node_id in {node.node_id for node in self.state.nodes.living}

    @rule(host_id=st.sampled_from(HOSTS), back=st.sampled_from([0, 0, 0, 1, 2, -1]), pid=st.integers(1, 9))
    def is_ready(self, host_id: str, back: int, pid: int) -> None:
        host = self.state.hosts[host_id]
        generation = host.generation - back
        if back == 0 and host.phase is Phase.STARTING:
            self.ready.add((host_id, generation))
        self.see(
            HostReady(
                host_id,
                generation,
                HostAddress(host_id, host.node_id, host_id, "", 100 * generation + pid),
                80,
            )
        )

    @rule(
        host_id=st.sampled_from(HOSTS),
        back=st.sampled_from([0, 0, 1, -1]),
        kind=st.sampled_from(["dead", "failed"]),
    )
    def is_lost(self, host_id: str, back: int, kind: str) -> None:
        generation = self.state.hosts[host_id].generation - back
        if kind == "dead" and back == 0:
            self.over.add((host_id, generation))
        self.see((HostDead if kind == "dead" else HostFailed)(host_id, generation, kind))

    @rule(living=st.sets(st.sampled_from(range(3))), age=st.sampled_from([0.0, 0.0, 3.0]))
    def nodes(self, living: set[int], age: float) -> None:
        self.now += 0.01
        before = self.state.hosts
        there = {NODES[i].node_id for i in living}
        self.over |= {(h, s.generation) for h, s in before.items() if s.node_id not in there}
        self.see(NodesSeen(self.now - age, tuple(NODES[i] for i in sorted(living))))

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    def time_goes_on(self, seconds: float) -> None:
        self.now += seconds
        self.see(Tick())

    @invariant()
    def the_table_names_who_said_it_is_ready_and_nobody_else(self) -> None:
        for host_id, host in self.state.hosts.items():
            assert (host.address is not None) == (host.phase is Phase.READY)
            assert self.table[host_id] == (host.address if self.state.repairing else None)
            if self.table[host_id] is not None:
                assert (host_id, host.generation) in self.ready

    @invariant()
    def every_host_that_does_not_run_says_why(self) -> None:
        for host in self.state.hosts.values():
            assert host.phase in RUNNING or host.reason
            if host.phase is Phase.BACKING_OFF:
                assert 0 <= host.retry_at - self.now <= 8 or host.retry_at < self.now
                assert host.crashes >= 2


RepairMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=25, deadline=None)
TestRepairMachine = RepairMachine.TestCase
