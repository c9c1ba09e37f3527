"""What the loop does in the phases of a round, with the stream, the workshop and the server that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.canary import Trial
from cluster.errors import LearningError
from cluster.learning.filters import FilterSettings, filtered
from cluster.learning.journal import Round
from cluster.learning.records import Record, with_feedback
from cluster.learning.reservoir import Reservoir
from cluster.learning.split import fingerprint, holdout_of
from cluster.learning.stream import Stream
from workloads.learn_experts import Samples
from workloads.learn_judging import Judgement, judge_learnt
from workloads.learn_lesson import choose
from workloads.learn_run import held_out, too_few
from workloads.learn_serving import Serving, Trialled
from workloads.learn_workshop import Workshop


@dataclass
class MeshWork:
    """See `workloads.learn_loop.Work`."""

    workshop: Workshop
    stream: Stream
    server: Serving | None = None
    _held: tuple[int, dict[str, list[Record]]] = field(default=(-1, {}))
    """Up to which shard, and what is held out there."""

    @property
    def serves(self) -> bool:
        return self.server is not None

    def serving(self) -> str:
        return self.workshop.serving()

    def samples(self, domain: str, after: int, upto: int, seen: Reservoir) -> Sequence[Record]:
        return self._filtered(domain, after, upto, seen)[0]

    def lacks(self, domain: str, old: Sequence[str], upto: int) -> str | None:
        if not old:
            return "nothing is known to hold it against: name domains that the model knows in learning.known"
        return too_few(self.held_upto(upto), (domain, *old), self.workshop.gate.fewest_texts)

    def gather(self, now: Round, old: Mapping[str, Sequence[Record]], new: Sequence[Record]) -> int:
        files = self.workshop.files(now.name)
        if files.begun:
            return len(files.job().chosen)
        if not new:
            dropped = self._filtered(now.domain, now.after, now.upto, Reservoir(1))[1]
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
            raise LearningError(f"no sample is left of the filters ({why or 'all are known'})")
        self.workshop.check_room()
        samples = Samples(now.domain, new, old)
        lesson = choose(self.workshop, samples, now.parent, now.seed)
        return len(self.workshop.begin(now.name, lesson, now.parent, now.seed).chosen)

    def train(self, now: Round) -> int:
        return len(self.workshop.train(now.name)["told"])

    def judge(self, now: Round, old: Sequence[str]) -> Judgement:
        share, parts = self.workshop.settings.holdout, self.workshop.settings.holdout_parts
        fewest = self.workshop.gate.fewest_texts
        held = {name: self.held_upto(now.upto).get(name, []) for name in (now.domain, *old)}
        if now.domain in old:
            # More of a domain that was learnt before must not spoil what is known of it: judged with the new, what
            # is worse for the old could pass for better.
            before = held_out(self.stream, share, now.after).get(now.domain, [])
            fresh = [record for record in held[now.domain] if record not in before]
            if min(len(before), len(fresh)) >= fewest:
                held |= {now.domain: fresh, f"{now.domain} before": before}
        texts = {name: in_turn(records, share, parts, now.part, fewest) for name, records in held.items()}
        files = self.workshop.files(now.name)
        saved = files.kept()
        assert saved is not None, "the training has ended"
        return judge_learnt(
            self.workshop, files.job(), saved, now.domain, texts, seed=now.seed, created=round(now.began, 3)
        )

    def stage(self, now: Round) -> None:
        assert self.server is not None
        self.server.stage(now.manifest)

    def try_out(self, now: Round) -> bool:
        assert self.server is not None
        settings = self.workshop.settings
        return self.server.try_out(
            Trial(now.manifest, settings.canary, settings.canary_every, give_up_s=settings.canary_give_up)
        )

    def trialled(self, now: Round) -> tuple[Trialled, str]:
        assert self.server is not None
        what, why = self.server.trialled(now.manifest)
        moves = self.workshop.store.aliases.history(self.workshop.alias, 20)
        mine = [move for move in moves if move.manifest == now.manifest and move.at >= now.began]
        # It may have been followed by another one since.
        return ("promoted", mine[-1].reason) if mine else (what, why)

    def discard(self, now: Round) -> None:
        self.workshop.files(now.name).discard()

    def _filtered(
        self, domain: str, after: int, upto: int, seen: Reservoir
    ) -> tuple[tuple[Record, ...], Mapping[str, int]]:
        records = with_feedback(
            record for number, shard in self.stream.after(after) if number <= upto for record in shard
        )
        share = self.workshop.settings.holdout
        mine = [
            record
            for record in records
            if record.domain == domain and (not share or holdout_of(record.text, share, 1) is None)
        ]
        marks = {fingerprint(record.text) for kept in seen.kept.values() for record in kept}
        found = filtered(mine, FilterSettings(), marks)
        return found.kept, found.dropped

    def held_upto(self, upto: int) -> dict[str, list[Record]]:
        """Domain → what is held out of the shards up to one."""
        if self._held[0] != upto:
            self._held = upto, held_out(self.stream, self.workshop.settings.holdout, upto)
        return self._held[1]


def in_turn(records: Sequence[Record], share: float, parts: int, part: int, fewest: int) -> list[Record]:
    """Texts of one part of the holdout, and of the next ones while there are too few."""
    found: list[Record] = []
    for turn in range(parts):
        if len(found) >= fewest:
            break
        found += [r for r in records if holdout_of(r.text, share, parts) == (part + turn) % parts]
    return found
