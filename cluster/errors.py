"""Errors that end in one clear message: what is wrong, with which thing, and the way out."""


class ExpertmeshError(Exception):
    """A mistake or a lack that the user can act on; the command line prints it without a traceback.

    ``message`` names the thing, ``hint`` the way out.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class ConfigError(ExpertmeshError):
    """The configuration is unreadable, has an unknown key, or a wrong value."""


class CheckpointError(ExpertmeshError):
    """The model's files are missing, torn, or of a kind that is not supported."""


class PlacementError(ExpertmeshError):
    """The experts do not fit the hosts: too little memory, or no node that matches."""


class VersionError(ExpertmeshError):
    """A version, or something that it is made of, is missing, damaged, or was changed by somebody else meanwhile."""


class UnknownVersionError(VersionError):
    """There is no version of that name."""


class VersionConflictError(VersionError):
    """What is asked for does not go together with the version that serves, or with what is being done now."""


class StoreError(VersionError):
    """The store of versions is out of reach, or has no room."""


class LearningError(ExpertmeshError):
    """What is to be learnt from is missing, damaged, or makes no sense."""


class ProtocolError(ExpertmeshError):
    """A peer on the data plane speaks another version, model or dtype, or sent a malformed frame."""


class HostError(ExpertmeshError):
    """An expert host could not load or could not compute."""
