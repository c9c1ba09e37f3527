"""The configuration's part on versions: where they are kept, which one serves, and what a change does to requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from cluster.cache_folder import cache_folder
from cluster.config_values import SECTION, Count, Duration, GroupName, Name


class VersionsConfig(BaseModel):
    """The store of versions, and how one follows another.

    ``keep_warm``: seconds for which the version before stays loaded; ``running``: whether requests that run at a change
    end with the version that they began with; ``holdout``: file of texts by which a version on trial is compared;
    ``history``: moves of each alias that can be made back; ``spare_experts``: experts by which a version may enlarge a
    layer, without which it may not retire any either.
    """

    model_config = SECTION

    store: str = ""
    options: dict[str, Any] = {}
    alias: GroupName = "production"
    keep_warm: Duration = 600.0
    running: Literal["finish", "continue"] = "finish"
    public_key: Name | None = None
    holdout: Name | None = None
    history: Count = 10
    spare_experts: Annotated[int, Field(ge=0, le=256)] = 0

    def url(self, model: str) -> str:
        """The store of the model with this checkpoint digest, for processes with other working folders as well."""
        if not self.store:
            return str(cache_folder() / "versions" / model[:16])
        return self.store if "://" in self.store else str(Path(self.store).expanduser().absolute())
