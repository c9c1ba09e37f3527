"""A mesh in memory whose Ray nodes are the pods of a cluster, behind the real admin API: the operator's other side."""

from __future__ import annotations

from dataclasses import replace

from starlette.testclient import TestClient

from actors.admin_api import admin_app
from cluster.admin_client import HttpMeshAdmin
from cluster.config import HostGroup
from cluster.config_placement import PlacementConfig
from cluster.controller import Deployment
from cluster.external_nodes import ExternalNodeProvider
from cluster.group_wishes import GroupWishes
from cluster.messages import AdminSettings, MoeLayer, NodeInfo
from cluster.rebalancer import Rebalancer
from tests.unit.cluster.test_controller import EXPERTS, MemoryWorld

MIB = 2**20
LAYERS = tuple(MoeLayer(layer, 6, MIB // 4) for layer in EXPERTS)


def ray_node(name: str, group: str, ip: str) -> NodeInfo:
    return NodeInfo(f"ray-{name}", ip, name, 4, 0, 64 * MIB, {"expertmesh.io/group": group})


class OperatedMesh(MemoryWorld):
    """Group a with two hosts and group b with one, each on a node of its own."""

    def __init__(self, nodes: str = "operator") -> None:
        super().__init__()
        self.mode = nodes
        self.nodes = tuple(
            ray_node(name, name[0], f"10.1.0.{n}") for n, name in enumerate(("a1", "a2", "b1"), 1)
        )
        self.running = self.controller()
        self.running.deploy(self.deployment())
        self.running.publish(10)
        self.running.look()
        self.rebalancer = Rebalancer(self.running, clock=lambda: self.now)
        self.external = ExternalNodeProvider(lambda: self.now)
        self.wishes = GroupWishes(self.running, self.rebalancer, self.external, clock=lambda: self.now)
        app = admin_app(self.running, AdminSettings("127.0.0.1", 1, "/absent"), self.wishes)
        self.client = TestClient(app, "http://127.0.0.1", raise_server_exceptions=False)
        self.admin = HttpMeshAdmin("http://127.0.0.1", "", self.client)

    def deployment(self, name: str = "model") -> Deployment:
        plain = super().deployment(name)
        places = dict(zip(("a-0", "a-1", "b-0"), self.nodes, strict=True))
        groups = tuple(
            HostGroup(name=g, count=n, selector={"expertmesh.io/group": g}) for g, n in (("a", 2), ("b", 1))
        )
        return replace(
            plain,
            hosts=tuple(
                replace(spec, group=spec.host_id[0], node_id=places[spec.host_id].node_id)
                for spec in plain.hosts
            ),
            run="run",
            layers=LAYERS,
            copies={layer.index: (1,) * 6 for layer in LAYERS},
            groups=groups,
            placement=PlacementConfig(),
            nodes=self.mode,
            limits=replace(
                plain.limits,
                selectors={s.host_id: {"expertmesh.io/group": s.host_id[0]} for s in plain.hosts},
            ),
        )

    def go_on(self, seconds: float = 4.0) -> None:
        """As the controller's own threads do."""
        end = self.now + seconds
        while self.now < end:
            self.let_pass(0.5)
            self.running.look()
            self.rebalancer.take_in()
            self.wishes.pursue()
            self.rebalancer.look()

    def where(self) -> dict[str, str]:
        """Host → node's name."""
        nodes = {node.node_id: node.hostname for node in self.nodes}
        return {state.host_id: nodes.get(state.node_id, "gone") for state in self.running.states()}
