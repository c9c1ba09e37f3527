"""What Kubernetes' API refuses, or can't be asked, whichever client asks."""

from __future__ import annotations

from cluster.errors import ExpertmeshError


class KubeError(ExpertmeshError):
    """The API server refused, or did not answer."""


class GoneError(KubeError):
    """410: what a watch or a page was to go on from is forgotten; list again."""


class ConflictError(KubeError):
    """409, or a patch whose `test` failed: somebody else changed the object, or made it, meanwhile."""


class ForbiddenError(KubeError):
    """401 or 403: these credentials may not do that."""


class AbsentError(KubeError):
    """404: there is no such object, or no such kind."""


class UnavailableError(KubeError):
    """No answer, or 429 and 5xx: try again later."""
