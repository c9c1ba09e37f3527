"""Which samples are held out: by a hash of their text, so that the same text is always on the same side."""

from __future__ import annotations

from hashlib import sha256


def normalised(text: str) -> str:
    """A text without what makes no difference: case and white space."""
    return " ".join(text.casefold().split())


def fingerprint(text: str) -> str:
    """The same for texts that are the same but for case and white space."""
    return sha256(normalised(text).encode("utf-8", "surrogatepass")).hexdigest()


def holdout_of(text: str, share: float, parts: int) -> int | None:
    """Which of the `parts` of the holdout a text is in, 0 to parts - 1; None if it may be learnt from.

    A `share` of all texts is held out, for good: parts take turns in judging, so that no gate is learnt by heart, and
    none is ever trained on.
    """
    lot = int(fingerprint(text)[:16], 16) / 2**64
    return int(lot / share * parts) if lot < share else None
