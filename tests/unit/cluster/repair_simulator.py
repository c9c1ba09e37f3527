"""Random histories of hosts, nodes and a controller that fail, and what must hold in each.

A seed is a history: hosts load, crash, freeze and can't load; nodes die and return; what the controller sees of
them is late, doubled and in any order; the controller dies between any two of its acts and goes on from what it
saved. Then the faults end, and the mesh must be whole again in bounded time.

    python -m tests.unit.cluster.repair_simulator SEED     # one history, told line by line
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable
from dataclasses import replace
from random import Random

from pydantic import TypeAdapter

from cluster import repair
from cluster.messages import HostAddress, HostSpec, NodeInfo
from cluster.repair_state import (
    RUNNING,
    Action,
    Backoff,
    End,
    HostDead,
    HostFailed,
    HostReady,
    Launch,
    NodesSeen,
    Observation,
    Phase,
    Publish,
    Repair,
    Tick,
    Wanted,
    planned,
    rebased,
)
from tests.unit.cluster.repair_meshes import Process, random_mesh

Step = Callable[[Wanted, Repair, Observation, float], tuple[Repair, tuple[Action, ...]]]

FAULTS_S = 25.0
"""How long things go wrong, from when every host was ready for the first time."""
CALM_S = 30.0
"""How long they don't: messages of before are late by 8 s at most, pauses last 8 s, loading 3 s."""
BACKOFF = Backoff(first_s=1.0, longest_s=8.0, quiet_s=10.0)
_POLL_S = 1.0
_TICK = Tick()
_REPAIR = TypeAdapter(Repair)


class Broken(AssertionError):
    """A history in which something does not hold."""


class History:
    """One run of a seed. Raises Broken where it comes to something that must not be."""

    def __init__(
        self, seed: int, step: Step = repair.step, tell: Callable[[str], None] | None = None
    ) -> None:
        self._random = Random(seed)
        self._step = step
        self._tell = tell
        self._now = 0.0
        self._count = 0
        self._quiet_polls = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._faults_end = float("inf")
        self._nodes: dict[str, NodeInfo] = {}
        self._gone: list[NodeInfo] = []
        self._processes: dict[tuple[str, int], Process] = {}
        self._newest: dict[str, Process] = {}
        self._by_pid: dict[int, Process] = {}
        self._cursed: dict[str, tuple[str, float]] = {}
        # The controller: how often it was started, its clock's lead, what it holds, what it saved and when.
        self._start = 0
        self._up = True
        self._lead = 1000.0
        self._given_up: set[tuple[str, int]] = set()
        self._epoch = 0
        self._table: dict[str, HostAddress | None] = {}
        self._build()

    def run(self) -> None:
        """Live through it, and see that everything came back."""
        self._deploy()
        self._at(_POLL_S, self._poll)
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            if self._now > self._faults_end + CALM_S or self._quiet_polls == 3:
                break
            event()
            if self._now > 100:
                raise Broken("the hosts were never ready at first")
        self._check_whole()

    # The world.

    def _build(self) -> None:
        made = random_mesh(self._random)
        self.alike, self.weights, self.specs, self._nodes = made.alike, made.weights, made.specs, made.nodes
        self._wanted = Wanted(self.specs, backoff=BACKOFF)
        self._state = planned(self.specs, 0)
        self._saved, self._saved_at = self._state, self._clock()
        self._table = self._state.table

    def _clock(self) -> float:
        return self._now + self._lead

    def _at(self, delay: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self._now + delay, self._count, event))

    def _say(self, text: str) -> None:
        if self._tell:
            self._tell(f"{self._now:7.2f} {text}")

    @property
    def _calm(self) -> bool:
        return self._now >= self._faults_end

    def _launch(self, spec: HostSpec, generation: int) -> None:
        other = self._newest.get(spec.host_id)
        if other is not None and other.state != "dead":
            raise Broken(f"{spec.host_id} launched as {generation} while {other.generation} lives")
        pid = len(self._by_pid) + 1
        address = HostAddress(spec.host_id, spec.node_id, spec.unix, "", pid)
        process = Process(spec.host_id, generation, spec.node_id, address)
        self._processes[spec.host_id, generation] = process
        self._newest[spec.host_id] = self._by_pid[pid] = process
        if spec.node_id not in self._nodes:
            # As Ray does with an actor that is bound to a node that is gone.
            process.state = "dead"
            return
        self._at(self._random.uniform(0.2, 3.0), lambda: self._loaded(process))

    def _loaded(self, process: Process) -> None:
        if process.state != "loading":
            return
        curse, until = self._cursed.get(process.host_id, ("", 0.0))
        if curse and self._now < min(until, self._faults_end):
            if curse == "ready, then dead":
                self._ready(process)
                self._at(self._random.uniform(0.1, 1.5), lambda: self._kill(process))
            elif curse == "can't load":
                process.state = "failed"
                self._say(f"{process.host_id}/{process.generation} can't load")
            else:
                self._kill(process)
        else:
            self._ready(process)

    def _ready(self, process: Process) -> None:
        process.state, process.was_ready = "ready", True
        self._say(f"{process.host_id}/{process.generation} is ready on {process.node_id}")

    def _kill(self, process: Process) -> None:
        if process.state != "dead":
            process.state = "dead"
            self._say(f"{process.host_id}/{process.generation} dies")

    # Faults.

    def _fault(self) -> None:
        random = self._random
        if self._calm:
            return
        self._at(random.expovariate(1 / 3), self._fault)
        living = [process for process in self._newest.values() if process.state != "dead"]
        kind = random.choices(
            ("kill", "node", "return", "curse", "freeze", "controller"), (5, 2, 2, 3, 2, 2)
        )[0]
        if kind == "kill" and living:
            self._kill(random.choice(living))
        elif kind == "node" and len(self._nodes) > 1:
            node = self._nodes.pop(random.choice(list(self._nodes)))
            self._gone.append(node)
            self._say(f"node {node.node_id} dies")
            for process in living:
                if process.node_id == node.node_id:
                    self._kill(process)
        elif kind == "return" and self._gone:
            self._node_returns()
        elif kind == "curse":
            host_id = random.choice(list(self.specs))
            curse = random.choice(("ready, then dead", "can't load", "dies while it loads"))
            self._cursed[host_id] = (curse, self._now + random.uniform(2, 15))
            self._say(f"{host_id} from now on: {curse}")
        elif kind == "freeze" and living:
            random.choice(living).frozen_until = self._now + random.uniform(1, 8)
        elif kind == "controller" and self._up:
            self._crash("of itself")

    def _node_returns(self) -> None:
        node = self._gone.pop(self._random.randrange(len(self._gone)))
        # With Ray it has another id, which is easier.
        if self._random.random() < 0.5:
            node = replace(node, node_id=node.node_id + "'")
        self._nodes[node.node_id] = node
        self._say(f"node {node.node_id} is there")

    def _faults_stop(self) -> None:
        self._say("the faults end")
        while self._gone and self._random.random() < 0.8:
            self._node_returns()

    # What the controller does.

    def _deploy(self) -> None:
        for host_id in self.specs:
            self._state, launch = repair.launch(self._wanted, self._state, host_id, self._clock())
            self._save()
            self._launch(launch.spec, launch.generation)

    def _save(self) -> None:
        self._saved, self._saved_at = self._state, self._clock()

    def _poll(self) -> None:
        """Ask nodes and hosts; their answers arrive some time."""
        phases = {host.phase for host in self._state.hosts.values()}
        # Nothing is under way, and nobody waits for a time to come.
        still = self._calm and self._up and not self._events and phases <= {Phase.READY, Phase.NO_ROOM}
        self._quiet_polls = self._quiet_polls + 1 if still else 0
        self._at(_POLL_S, self._poll)
        if not self._up:
            return
        nodes, last = tuple(self._nodes.values()), self._state.nodes
        # What is known already is seen again now and then only, to be quick.
        if last is None or last.living != nodes or self._random.random() < 0.1:
            self._send(NodesSeen(self._clock(), nodes))
        for host_id, host in self._state.hosts.items():
            if host.phase in RUNNING:
                process = self._processes.get((host_id, host.generation))
                known = host.phase is Phase.READY and process is not None and process.state == "ready"
                if known and self._random.random() >= 0.1:
                    continue
                seen = self._look(host_id, host.generation)
                if seen is not None:
                    self._send(seen)
        self._feed(_TICK)

    def _look(self, host_id: str, generation: int) -> Observation | None:
        process = self._processes.get((host_id, generation))
        if process is None or process.state == "dead":
            return HostDead(host_id, generation, "died")
        if process.frozen_until > self._now or process.state == "loading":
            return None
        if process.state == "failed":
            return HostFailed(host_id, generation, "can't load")
        return HostReady(host_id, generation, process.address, self.weights[host_id])

    def _send(self, seen: Observation) -> None:
        random = self._random
        start = self._start
        for _ in range(2 if random.random() < 0.15 else 1):
            late = not self._calm and random.random() < 0.2
            delay = random.uniform(0, 8.0) if late else random.uniform(0, 0.3)
            self._at(delay, lambda: self._arrive(seen, start))

    def _arrive(self, seen: Observation, start: int) -> None:
        # Nodes are seen by the controller's own clock, and such a message dies with it; a host's may outlive it.
        if self._up and (start == self._start or not isinstance(seen, NodesSeen)):
            self._feed(seen)

    def _feed(self, seen: Observation) -> None:
        before = self._state
        after, actions = self._step(self._wanted, before, seen, self._clock())
        if after is before and not actions:
            return
        if actions and self._dies("before it saved"):
            return
        self._state = after
        self._note(before, after, actions)
        self._save()
        if after.repairing and not before.repairing:
            self._faults_end = self._now + FAULTS_S
            self._at(self._random.expovariate(1), self._fault)
            self._at(FAULTS_S, self._faults_stop)
        for action in actions:
            if self._dies("before it did what it had saved"):
                return
            self._act(action)

    def _act(self, action: Action) -> None:
        if isinstance(action, Launch):
            self._say(f"launch {action.spec.host_id}/{action.generation} on {action.spec.node_id}")
            self._launch(action.spec, action.generation)
        elif isinstance(action, End):
            process = self._processes[action.host_id, action.generation]
            self._at(self._random.uniform(0, 0.5), lambda: self._kill(process))

    def _dies(self, when: str) -> bool:
        if self._calm or not self._state.repairing or self._random.random() > 0.03:
            return False
        self._crash(when)
        return True

    def _crash(self, when: str) -> None:
        self._say(f"the controller dies, {when}")
        self._up = False
        self._start += 1
        self._at(self._random.uniform(0.1, 4), self._recover)

    def _recover(self) -> None:
        self._say("the controller is back")
        self._up = True
        # Another machine, whose clock shows something else.
        self._lead = self._random.uniform(-500, 500)
        saved = _REPAIR.validate_json(_REPAIR.dump_json(replace(self._saved, nodes=None)))
        self._state = rebased(saved, self._clock() - self._saved_at)
        for host_id, host in self._state.hosts.items():
            process = self._processes.get((host_id, host.generation))
            if host.phase in RUNNING and (process is None or process.state == "dead"):
                self._feed(HostDead(host_id, host.generation, "not found"))
                if not self._up:
                    return

    # What must hold.

    def _note(self, before: Repair, after: Repair, actions: tuple[Action, ...]) -> None:
        """Check a step that is saved, and so is done."""
        for host_id, old in before.hosts.items():
            new = after.hosts[host_id]
            if old.phase in RUNNING and (new.phase not in RUNNING or new.generation != old.generation):
                self._given_up.add((host_id, old.generation))
            if new.generation not in (old.generation, old.generation + 1):
                raise Broken(f"{host_id} goes from launch {old.generation} to {new.generation}")
            if new.phase is Phase.BACKING_OFF and new.retry_at - self._clock() > BACKOFF.longest_s + 1e-6:
                raise Broken(f"{host_id} waits for too long")
        for action in actions:
            if isinstance(action, Publish):
                self._check_table(action)
        if after.repairing and after.table != self._table:
            raise Broken("who is ready changed without a new epoch")

    def _check_table(self, publish: Publish) -> None:
        shown = {host_id: address and address.pid for host_id, address in publish.hosts.items()}
        self._say(f"epoch {publish.epoch}: {shown}")
        if publish.epoch <= self._epoch:
            raise Broken(f"epoch {publish.epoch} after {self._epoch}")
        for host_id, address in publish.hosts.items():
            if address is None:
                continue
            process = self._by_pid[address.pid]
            if process.host_id != host_id or not process.was_ready:
                raise Broken(f"epoch {publish.epoch} names {host_id}, which has not loaded")
            if process is not self._newest[host_id] or (host_id, process.generation) in self._given_up:
                raise Broken(
                    f"epoch {publish.epoch} names {host_id} as launch {process.generation}, which is over"
                )
        self._epoch, self._table = publish.epoch, dict(publish.hosts)

    def _check_whole(self) -> None:
        """After the calm: every host is back, or there is no room for it."""
        lying = dict.fromkeys(self._nodes, 0)
        for host_id, process in self._newest.items():
            if process.state != "dead":
                lying[process.node_id] += 125 * self.weights[host_id] // 100
        free = {node_id: node.memory_bytes - lying[node_id] for node_id, node in self._nodes.items()}
        missing = []
        for host_id, host in self._state.hosts.items():
            process, need = self._newest[host_id], 125 * self.weights[host_id] // 100
            if process.state == "ready":
                if self._table[host_id] != process.address:
                    raise Broken(f"{host_id} is ready and not in the table")
                continue
            missing.append(host_id)
            if host.phase is not Phase.NO_ROOM:
                raise Broken(f"{host_id} is {host.phase} when all is calm")
            if "node" not in host.reason:
                raise Broken(f"{host_id} waits without a reason: {host.reason!r}")
            if any(room >= need for room in free.values()):
                raise Broken(f"{host_id} waits for room of {need}, free are {free}")
        for node_id, room in free.items():
            # A node that returned smaller does not exist here, so nothing may be laid over its edge.
            if room < 0:
                raise Broken(f"node {node_id} holds {-room} more than it can")
        if any(self._table[host_id] for host_id in missing):
            raise Broken(f"the table names {missing}, which don't run")
        places = sum(node.memory_bytes // 100 for node in self._nodes.values())
        if self.alike and missing and places >= len(self.specs):
            raise Broken(f"{missing} don't run, though {places} hosts have room")


def live(seed: int, step: Step = repair.step) -> None:
    """One history; what is broken names the seed."""
    try:
        History(seed, step).run()
    except AssertionError as error:
        raise Broken(f"{error}; replay: python -m tests.unit.cluster.repair_simulator {seed}") from error


if __name__ == "__main__":
    History(int(sys.argv[1]), tell=print).run()
    print("whole again")
