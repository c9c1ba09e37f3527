"""The admin API's part on host groups and nodes, for whoever brings nodes.

GET  /groups                     what there is, and what there should be room for
POST /groups/{group}/scale       more hosts as nodes join, fewer after they were emptied
POST /nodes/{node}/drain         a node's hosts go elsewhere; DELETE ends it
"""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI

from actors.admin_requests import Drain, Scale
from cluster.group_wishes import GroupWishes
from cluster.groups_report import Drained, GroupsReport, Scaled

# What is meant where a request has no body.
_DRAIN: Final = Drain()


def add_groups(app: FastAPI, wishes: GroupWishes) -> None:
    """Add the paths to the application; requests may come at the same time."""

    @app.get("/groups")
    def groups() -> GroupsReport:
        """Host groups, and every node with its hosts."""
        return wishes.report()

    @app.post("/groups/{group}/scale", status_code=202)
    def scale(group: str, wanted: Scale) -> Scaled:
        """Change a group's number of hosts. They come and go when this has answered: see `/groups`."""
        return wishes.scale(group, wanted.hosts)

    @app.post("/nodes/{node}/drain", status_code=202)
    def drain(node: str, wanted: Drain = _DRAIN) -> Drained:
        """Have a node's hosts go elsewhere, and others take their place. They do when this has answered."""
        return wishes.drain(node, wanted.reason)

    @app.delete("/nodes/{node}/drain")
    def undrain(node: str) -> GroupsReport:
        """Let hosts be placed on a node again."""
        wishes.undrain(node)
        return wishes.report()
