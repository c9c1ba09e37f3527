"""Ways to learn one domain after the other, each with the same rows of the same text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F

from actors.expert_slices import ChosenExperts
from actors.expert_training import Training, TrainSettings, Weights
from actors.router_review import Balance, add_clones, clone_rows, router_weights
from actors.text_routing import choices, expert_modules
from actors.whole_weights import WholeWeights
from cluster.learning.choose import choose
from cluster.learning.replay import Replay
from workloads.bench.learn_baselines import Anchored, LowRank
from workloads.bench.learn_flops import Flops, ModelSize
from workloads.bench.learn_text import Domain

Rows = Iterator[tuple[list[str], list[list[int]]]]
"""Of each step, the rows' domains and their token numbers."""
# Windows that are judged together.
_JUDGED: Final = 16


@dataclass(frozen=True, slots=True)
class Method:
    """What is trained, and what holds it back."""

    name: str
    trains: Literal["nothing", "all", "chosen", "random", "low rank"]
    replay: float = 0.0
    """Share of rows that are of what was learnt before, or of the general text."""
    pull: bool = False
    """Towards the version before."""
    anchored: bool = False
    clones: bool = False
    review: bool = False
    joint: bool = False
    """All domains at once."""


def methods(replay: float) -> tuple[Method, ...]:
    """All that are compared; `ours` last, and without each of its parts."""
    ours = Method("ours", "chosen", replay, pull=True, clones=True, review=True)
    return (
        Method("frozen", "nothing"),
        Method("naive", "all"),
        Method("joint", "all", joint=True),
        Method("replay", "all", replay),
        Method("ewc", "all", anchored=True),
        Method("lora", "low rank"),
        Method("esft", "chosen"),
        ours,
        replace(ours, name="ours without replay", replay=0.0),
        replace(ours, name="ours without pull", pull=False),
        replace(ours, name="ours without choice", trains="random"),
        replace(ours, name="ours without clones", clones=False),
        replace(ours, name="ours without review", review=False),
    )


@dataclass(frozen=True, slots=True)
class LearnSettings:
    """The same for all methods, but for the rates, which suit what is trained."""

    steps: int
    """For each domain."""
    rows: int
    length: int
    replay: float = 0.25
    rate_all: float = 1e-4
    rate_chosen: float = 1e-3
    rate_low_rank: float = 1e-3
    rate_routers: float = 1e-3
    beta: float = 0.05
    """The pull towards the version before, on new rows."""
    hold: float = 1.0
    """The same on replayed rows."""
    need: float = 0.75
    """Share of replayed rows that are of the domains that became worse; of ours, since it takes the version before."""
    reach: float = 0.6
    most: float = 0.149
    """Of all weights that one update may train."""
    heavy: float = 0.5
    margin: float = 6.0
    count_tokens: int = 8192
    row_tokens: int = 16384
    """Of each side, that rows of clones are found from."""
    review_share: float = 0.05
    """Steps of the review, of those of a domain; they are part of the same budget."""
    balance: float = 0.01
    ewc: float = 100.0
    fisher_rows: int = 64


@dataclass(frozen=True, slots=True)
class Learnt:
    """What one method made of the stream."""

    matrix: list[list[float]]
    """Bits per byte, see `workloads.bench.learn_scores`."""
    general: list[float]
    trained_share: float
    """Of all weights, of the update that trained most."""
    trained_weights: int
    """Of all updates together."""
    experts: list[int]
    """Chosen in each update."""
    clones: list[int]
    flops: float
    losses: list[float]
    """Of each step, nats per token."""


def learn_stream(
    model: Any,
    domains: Sequence[Domain],
    general: Domain,
    method: Method,
    settings: LearnSettings,
    seed: int,
    told: Callable[[float], None] = lambda done: None,
) -> Learnt:
    """Learn the domains in their order; `model` is changed."""
    run = _Run(model, domains, general, method, settings, seed)
    run.judge()
    for number in range(len(domains)):
        run.learn(number)
        run.judge()
        told((number + 1) / len(domains))
    return run.learnt


class _Run:
    def __init__(
        self,
        model: Any,
        domains: Sequence[Domain],
        general: Domain,
        method: Method,
        settings: LearnSettings,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self._model, self._domains, self._general = model, domains, general
        self._method, self._settings = method, settings
        self._dice = random.Random(seed)
        self._flops = Flops(model_size(model))
        self.learnt = Learnt([], [], 0.0, 0, [], [], 0.0, [])
        self._replayed = round(settings.rows * method.replay)
        """Rows of a step."""
        self._kept: Any = None
        """Weights and training that go on from domain to domain."""

    def judge(self) -> None:
        """A row of the matrix."""
        if self._method.trains == "nothing" and self.learnt.matrix:
            row, general = self.learnt.matrix[0], self.learnt.general[0]
        else:
            row = [bits_per_byte(self._model, domain) for domain in self._domains]
            general = bits_per_byte(self._model, self._general)
        self.learnt.matrix.append(row)
        self.learnt.general.append(general)
        self.learnt = replace(self.learnt, flops=self._flops.total)

    def learn(self, number: int) -> None:
        """One domain."""
        method, settings = self._method, self._settings
        if method.trains == "nothing":
            return
        review = round(settings.steps * settings.review_share) if method.review else 0
        steps = settings.steps - review
        rows = self._rows(number)
        if method.trains in ("chosen", "random"):
            weights, trained = self._chosen(number)
            rate = settings.rate_chosen
        else:
            weights, trained, rate = self._whole()
        beta, hold = (settings.beta, settings.hold) if method.pull else (0.0, 0.0)
        if method.joint:
            # One schedule over all domains.
            self._kept = self._kept or Training(
                self._model,
                weights,
                TrainSettings(steps * len(self._domains), rate, _warm(steps * len(self._domains)), 0.0, 0.0),
            )
            self._train(self._kept, rows, steps, trained)
        else:
            schedule = TrainSettings(steps, rate, _warm(steps), beta, hold)
            self._train(Training(self._model, weights, schedule), rows, steps, trained)
        if isinstance(weights, Anchored):
            fisher = [next(rows)[1][0] for _ in range(settings.fisher_rows)]
            self._flops.step(weights.remember(self._model, fisher), trained)
            self._anchored = weights
        if review:
            self._review(rows, review, beta, hold)

    def _whole(self) -> tuple[Weights, float, float]:
        """All weights, or adapters of all; what a token meets of them, and the rate."""
        settings, method = self._settings, self._method
        if method.trains == "low rank":
            low = LowRank(self._model)
            # The share of what a token meets is near that of all.
            self._note(low.share, sum(m.numel() for m in low.masters.values()))
            return low, self._flops.size.met * low.share, settings.rate_low_rank
        parameters = dict(self._model.named_parameters())
        weights: WholeWeights
        if method.anchored:
            weights = self._anchored or Anchored(self._model, parameters, settings.ewc)
        elif method.joint and self._kept is not None:
            return self._kept.weights, float(self._flops.size.met), settings.rate_all
        else:
            weights = WholeWeights(self._model, parameters, remember=False)
        self._note(1.0, sum(p.numel() for p in parameters.values()))
        return weights, float(self._flops.size.met), settings.rate_all

    _anchored: Anchored | None = None
    _replay: Replay

    def _chosen(self, number: int) -> tuple[Weights, float]:
        """The experts of a domain, cloned where that is wanted; weights of them that a token meets."""
        settings, method, model = self._settings, self._method, self._model
        new = self._texts([self._domains[number]], settings.count_tokens)
        old = self._texts(self._known(number), settings.count_tokens)
        counts = choices(model, new)
        found = choose(
            counts,
            choices(model, old),
            reach=settings.reach,
            heavy=settings.heavy,
            most=int(settings.most * sum(p.numel() for p in model.parameters()) / _expert_size(model)),
        )
        self._flops.forward(2 * settings.count_tokens)
        picked = [(one.layer, one.expert) for one in found]
        if method.trains == "random":
            picked = self._others(picked)
        cloned = {}
        if method.clones:
            heavy = {(one.layer, one.expert) for one in found if one.clone}
            new = self._texts([self._domains[number]], settings.row_tokens)
            old = self._texts(self._known(number), settings.row_tokens)
            rows = clone_rows(model, heavy & set(picked), new, old, settings.margin)
            cloned = add_clones(model, rows)
            self._flops.forward(2 * settings.row_tokens)
        experts = [(layer, cloned.get((layer, expert), expert)) for layer, expert in picked]
        weights = ChosenExperts(model, experts)
        self._note(weights.share, sum(m.numel() for m in weights.masters.values()))
        self.learnt.experts.append(len(experts))
        self.learnt.clones.append(len(cloned))
        share = sum(counts[layer][expert] / sum(counts[layer]) for layer, expert in picked)
        size = sum(m.numel() for m in weights.masters.values()) / len(experts)
        return weights, share * model.config.num_experts_per_tok * size

    def _others(self, picked: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """As many of each layer, by lot."""
        found = []
        for layer, experts in expert_modules(self._model).items():
            count = sum(one == layer for one, _ in picked)
            found += [(layer, expert) for expert in self._dice.sample(range(int(experts.num_experts)), count)]
        return found

    def _review(self, rows: Rows, steps: int, beta: float, hold: float) -> None:
        settings = self._settings
        weights, balance = router_weights(self._model), Balance(self._model, settings.balance)
        self._note(0.0, sum(m.numel() for m in weights.masters.values()))
        schedule = TrainSettings(steps, settings.rate_routers, _warm(steps), beta, hold)
        with balance.watched():
            learner = Training(self._model, weights, schedule, aside=balance)
            self._train(learner, rows, steps, sum(m.numel() for m in weights.masters.values()))

    def _train(self, learner: Training, rows: Rows, steps: int, trained: float) -> None:
        self._model.train()
        for _ in range(steps):
            of, texts = next(rows)
            batch = torch.tensor(texts)
            seen = learner.train(batch, replayed=self._replayed)
            self.learnt.losses.append(seen.cross_entropy)
            if self._replayed and seen.risen:
                self._replay.saw(zip(of[-self._replayed :], seen.risen[-self._replayed :], strict=True))
            self._flops.step(batch.numel(), trained)
            if learner.pulls:
                self._flops.forward(batch.numel())
        self._model.eval()

    def _rows(self, number: int) -> Rows:
        """Rows of a step: of this domain, and a share of what is known; of all where they are learnt at once."""
        settings, dice = self._settings, self._dice
        known = self._known(number)
        self._replay = Replay([domain.name for domain in known], settings.need)
        while True:
            of = [self._domains[number]] * (settings.rows - self._replayed)
            of += dice.choices(known, self._replay.weights, k=self._replayed)
            if self._method.joint:
                of = dice.choices(self._domains, k=settings.rows)
            yield [domain.name for domain in of], [self._row(domain) for domain in of]

    def _row(self, domain: Domain) -> list[int]:
        start = self._dice.randrange(len(domain.learnt) - self._settings.length)
        return domain.learnt[start : start + self._settings.length].tolist()

    def _texts(self, domains: Sequence[Domain], tokens: int) -> list[list[int]]:
        count = tokens // self._settings.length
        return [self._row(self._dice.choice(domains)) for _ in range(count)]

    def _known(self, number: int) -> list[Domain]:
        return [self._general, *self._domains[:number]]

    def _note(self, share: float, weights: int) -> None:
        self.learnt = replace(
            self.learnt,
            trained_share=max(self.learnt.trained_share, share),
            trained_weights=self.learnt.trained_weights + weights,
        )


def bits_per_byte(model: Any, domain: Domain) -> float:
    """Of held-out text."""
    device, nats = next(model.parameters()).device, 0.0
    with torch.inference_mode():
        for start in range(0, len(domain.judged_WT), _JUDGED):
            ids = torch.from_numpy(domain.judged_WT[start : start + _JUDGED]).long().to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return float(nats / torch.log(torch.tensor(2.0)).item() / domain.judged_bytes)


def model_size(model: Any) -> ModelSize:
    """From a transformers model's parameters: all matrices but the embedding, of experts the chosen ones."""
    of_experts, met = set(), 0.0
    for experts in expert_modules(model).values():
        for parameter in experts.parameters():
            of_experts.add(id(parameter))
            met += parameter.numel() * model.config.num_experts_per_tok / len(parameter)
    embedding = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if id(parameter) not in of_experts and parameter.ndim > 1 and parameter is not embedding:
            met += parameter.numel()
    if model.get_output_embeddings().weight is embedding:
        met += embedding.numel()
    return ModelSize(int(met))


def _expert_size(model: Any) -> int:
    experts = next(iter(expert_modules(model).values()))
    return sum(p.numel() for p in experts.parameters()) // int(experts.num_experts)


def _warm(steps: int) -> int:
    return max(1, steps // 10)
