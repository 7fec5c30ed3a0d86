"""One attack, dose and seed of a loop: a poisoned set, its undefended model, and an arm per filter and defense.

What an arm came to is kept in its folder as `row-<digest>.json`, so a loop that is started again opens no model of an
arm that is done. A row stays when the code changes, as the trainings do; it says of which code it is. It does not when
what it was made of changes: detectors' parameters, or the bytes of any input.

At dose 0 nothing is poisoned, so all attacks of a seed share one set of trainings; only what each trigger does to them
is asked apart.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from filters._wants import Wants
from pipeline import arms, ledger, spec
from pipeline.config import POOL, Config, Filter, Scores
from pipeline.embed import embed
from pipeline.filter import filter_shards
from pipeline.inputs import EARLIER, EMBEDDED
from pipeline.plan import Dose
from pipeline.poison import poison
from pipeline.policies._select import column
from pipeline.progress import run_stage
from pipeline.quality import quality
from pipeline.score import read_scores, score, scored_by, scores_path
from pipeline.scored import scores_folder
from pipeline.shard_map import code_digest, marker_path, read_markers, summed
from pipeline.shards import list_shards
from pipeline.shards.store import make_folder, stamp, view, write

NOBODY = "patch(target='nothing')"  # what the clean set is "poisoned" with, at dose 0, so that it has an empty ledger


@dataclass(frozen=True)
class Arm:
    """What is done against the poison: nothing, a filter, or a defense."""

    name: str
    filter: Filter | None = None
    defense: str | None = None

    @property
    def folder(self) -> str:
        if self.filter:
            return f"filter-{spec.digest([self.filter.policy, self.filter.epoch])}"
        return f"defense-{spec.digest(self.defense)}" if self.defense else arms.UNDEFENDED

    @property
    def watches(self) -> bool:
        """Whether the undefended model comes first: to look through, or to repair."""
        return bool(self.filter) or bool(self.defense and spec.parse("defenses", self.defense).needs_init)


UNDEFENDED = Arm(arms.UNDEFENDED)


def arms_of(plan: Config) -> list[Arm]:
    """Undefended first."""
    filters = [Arm(_arm_name(one.policy), filter=one) for one in plan.filters]
    return [UNDEFENDED, *filters, *(Arm(spec.key(spec.parse("defenses", d)), defense=d) for d in plan.defenses)]


@dataclass(frozen=True)
class Run:
    """Stages that meet in files under OUT; each finds what it did before."""

    plan: Config
    attack: str
    dose: str
    seed: int
    out: Path

    @property
    def clean(self) -> bool:
        dose = Dose.parse(self.dose)
        return not dose.count and not dose.share

    @property
    def own(self) -> Path:
        """One folder for all that determines a run; another config in the same OUT does not meet it."""
        name, dose = spec.parse_call(self.attack)[0], self.dose.replace("%", "percent")
        facts = spec.digest([self.attack, self.dose, self.plan.shards, self.plan.recipe, self.plan.uid])
        return self.out / f"{name}-{dose}-{facts}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the trainings are: those of dose 0 belong to no attack."""
        if not self.clean:
            return self.own
        return self.out / f"clean-{spec.digest([self.plan.shards, self.plan.recipe, self.plan.uid])}-seed{self.seed}"

    @property
    def poisoned(self) -> str:
        return str(self.folder / "poisoned")

    @property
    def attacked(self) -> str:
        """The poisoned shards by this attack, which at dose 0 are only needed for what test time shares with them."""
        return str(self.own / "poisoned")

    @property
    def scored(self) -> bool:
        """Whether there are scores of all detectors and epochs that the config asks for."""
        return all(
            {spec.text(spec.parse("detectors", text)) for text in scores.detectors}
            <= _scored(self.scores_of(scores), self.plan.shards)
            for scores in self.plan.scores
        )

    @property
    def compares(self) -> bool:
        """Whether some detector sees two epochs: its scores are of what stands before it in the config now."""
        return any(len(self._looks(scores.epoch, scores.detectors)) > 1 for scores in self.plan.scores)

    @property
    def watchable(self) -> bool:
        """Whether the undefended models are there that the config's scores look through."""
        return all(Path(self._checkpoint(scores.epoch)).exists() for scores in self.plan.scores)

    def poison(self) -> None:
        for where, attack in {self.poisoned: NOBODY if self.clean else self.attack, self.attacked: self.attack}.items():
            self._stage("poison", poison, self.plan.shards, where, attack=attack, dose=self.dose, seed=self.seed)

    def score(self) -> None:
        """Embed and score at every epoch that the config names."""
        for scores in self.plan.scores:
            asked = [spec.text(spec.parse("detectors", text)) for text in scores.detectors]
            detectors = dict.fromkeys([*asked, *scored_by(self.scores_of(scores))])  # another config's stay
            looked = self._looks(scores.epoch, detectors)
            for epoch in looked:
                checkpoint = self._checkpoint(epoch)
                embeddings = self._embeddings(epoch)
                self._stage(f"embed epoch {epoch}", embed, self.poisoned, embeddings, checkpoint=checkpoint)
            self._stage(
                f"score epoch {scores.epoch}",
                score,
                self.poisoned,
                self.scores_of(scores),
                detector=tuple(detectors),
                embeddings=self._embeddings(scores.epoch),
                earlier=self._embeddings(looked[0]) if len(looked) > 1 else None,
                pool=scores.pool,
                traces=str(self.folder / UNDEFENDED.folder / "traces"),
                seed=self.seed,
            )

    def path(self, arm: Arm) -> Path:
        """Of its row: bound to what is evaluated on, to what a filter reads, and to all inputs as they are now."""
        plan = self.plan
        facts = [self.attack, self.dose, plan.evaluation, plan.classes, plan.reference, plan.readouts, _stamps(plan)]
        looked = [self._looks(epoch, detectors) for epoch, detectors in self._read(arm).items()]
        more = (self._columns(arm), looked, [stamp(path) for path in self._others(arm)], _by_content(arm.defense))
        return self.folder / arm.folder / f"row-{spec.digest([*facts, *more])}.json"

    def kept(self, arm: Arm) -> dict[str, Any] | None:
        """The row of an arm that is done."""
        try:
            row: dict[str, Any] = json.loads(self.path(arm).read_text())
        except (OSError, ValueError):
            return None
        return row

    def trained(self, arm: Arm) -> bool:
        """Whether the arm's model is there, so that nothing but an evaluation is missing."""
        return (self._model(arm) / "train.json").exists()

    def prepare(self, arm: Arm) -> None:
        """What arms share: the poisoned shards, and scores for those that filter."""
        self.poison()
        if arm.filter:
            self.score()

    def measure(self, arm: Arm, path: Path, spent: float, parallel: int) -> dict[str, Any]:
        """The row of an arm for which all is prepared, and the undefended model there where it `watches`.

        It is kept at `path`, which was asked for before the preparations. They took `spent` seconds; there are
        `parallel` trainings at a time.
        """
        from train.launch import thin

        begin = time.monotonic()
        made_of = self._made_of(arm)  # as it is before the training
        self._train(arm)
        row = self._row(arm) | made_of | self._evaluated(arm)
        row |= {"seconds": spent + time.monotonic() - begin, "parallel": parallel}
        write(str(path), json.dumps(row, indent=1).encode())
        if arm != UNDEFENDED:  # nobody looks through an arm's model while it learns
            thin(str(self._model(arm)))
        return row

    def detectors(self) -> list[dict[str, Any]]:
        rows = []
        for scores in self.plan.scores:
            found, poisoned = self.scores_and_truth(scores)
            seconds, _ = self._spent(self.scores_of(scores))
            for name in (n for n in found if n != "uid"):
                row = self._common() | {"detector": name, "when": scores.when, "pool": scores.pool}
                row |= quality(found[name], found["uid"], poisoned)
                spent = seconds.get(name, 0.0)
                rows.append(row | {"seconds": spent, "microseconds_per_sample": 1e6 * spent / max(len(poisoned), 1)})
        return rows

    def scores_and_truth(self, scores: Scores) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """All scores of an epoch and pool, and which rows are poisoned."""
        parts = [read_scores(scores_path(self.scores_of(scores), s.name)) for s in list_shards(self.poisoned)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        known = ledger.poisoned_uids(ledger.ledger_path(self.poisoned))
        return found, np.asarray([u in known for u in found["uid"]])

    def _train(self, arm: Arm) -> None:
        """Filter and train."""
        from train.launch import final_checkpoint, train

        shards = self.poisoned
        options: dict[str, Any] = {"recipe": self.plan.recipe, "seed": self.seed}
        if arm.filter:
            scored, policy = tuple(map(self._scores, arm.filter.epochs)), arm.filter.policy
            folder, shards = str(self.folder / arm.folder), self._kept(arm)
            self._stage(f"filter {policy}", filter_shards, self.poisoned, folder, scores=scored, policy=policy)
        if arm.defense:
            init = final_checkpoint(str(self.folder / UNDEFENDED.folder)) if arm.watches else None
            options |= {"defense": arm.defense, "init": init}
        self._stage(f"train {arm.name}", train, shards, str(self._model(arm)), **options)

    def _evaluated(self, arm: Arm) -> dict[str, Any]:
        """The metrics of its model, under this attack."""
        from train.evaluate import evaluate
        from train.launch import final_checkpoint

        model = self._model(arm)
        result = model / (f"evaluation-{spec.digest(self.attack)}" if self.clean else "evaluation")
        self._stage(
            f"evaluate {arm.name}",
            evaluate,
            final_checkpoint(str(model)),
            str(result),
            shards=self.plan.evaluation,
            classes=self.plan.classes,
            attack=self._about["spec"]["attack"],
            seed=self.seed,
            reference=self.plan.reference or self.plan.shards,
            ledger=ledger.ledger_path(self.attacked),
            readouts=self.plan.readouts,
        )
        metrics: dict[str, Any] = json.loads((result / "evaluation.json").read_text())["metrics"]
        return metrics

    def _row(self, arm: Arm) -> dict[str, Any]:
        """What it was trained on and by, and what that took."""
        facts, filtered = json.loads((self._model(arm) / "train.json").read_text()), arm.filter
        pairs = self._about["pairs"]
        if arm.defense:  # it removes nothing from the shards
            removed, left = None, facts["known_poisons"]
        else:
            removed = pairs - facts["pairs"] - sum(facts["skipped"].values())
            left = len(ledger.poisoned_uids(ledger.ledger_path(self._kept(arm) if filtered else self.poisoned)))
        return {
            **self._common(),
            "arm": arm.name,
            "when": filtered and filtered.when,
            "recipe": self.plan.recipe,
            "policy": filtered and filtered.policy,
            "samples": facts["pairs"],
            "defense": arm.defense,
            "removed": removed,
            "removed_share": None if removed is None else removed / max(pairs, 1),
            "poisons_in": self._about["poisoned"],
            "poisons_left": left,
            "train_seconds": facts["seconds"],
            "train_cpu_seconds": facts["cpu_seconds"],
            **self._cost(arm, pairs),
            "recipe_digest": facts["recipe_digest"],
            "code": source_digest(),
        }

    def _cost(self, arm: Arm, pairs: int) -> dict[str, float | None]:
        """Seconds of workers, and of their cores: embedding, its detectors, rewriting; not the scoring model."""
        if not arm.filter:
            return {"filter_seconds": None, "filter_cpu_seconds_per_million": None}
        seconds = cpu = 0.0
        stages = {str(self.folder / arm.folder)}
        for epoch, detectors in self._read(arm).items():
            by_clock, of_cores = self._spent(self._scores(epoch))
            seconds += sum(by_clock[name] for name in detectors)
            cpu += sum(of_cores[name] for name in detectors)
            stages |= set(map(self._embeddings, self._looks(epoch, detectors)))
        for stage in stages:
            took = summed(marker["seconds"] for marker in self._markers(stage))
            seconds, cpu = seconds + took["total"], cpu + took["cpu"]
        return {"filter_seconds": seconds, "filter_cpu_seconds_per_million": 1e6 * cpu / max(pairs, 1)}

    def _made_of(self, arm: Arm) -> dict[str, Any]:
        """What tells results apart that are called the same: data, and detectors with all their parameters."""
        return {"detectors": ", ".join(self._columns(arm)) or None, **_data(self.plan)}

    def _read(self, arm: Arm) -> dict[int, list[str]]:
        """By epoch, the detectors whose scores a filter reads."""
        if not arm.filter:
            return {}
        there = columns_of(self.plan, arm.filter.epochs)
        names = sorted({column(there, detector) for detector in read_by(arm.filter.policy)})
        by_folder = {scores_folder(epoch): epoch for epoch in arm.filter.epochs}
        found: dict[int, list[str]] = {}
        for folder, _, detector in (name.partition(":") for name in names):
            found.setdefault(by_folder[folder], []).append(detector)
        return found

    def _columns(self, arm: Arm) -> list[str]:
        """The columns of scores that a filter reads."""
        return [f"{scores_folder(epoch)}:{name}" for epoch, names in self._read(arm).items() for name in names]

    def _looks(self, epoch: int, detectors: Collection[str]) -> tuple[int, ...]:
        """The epochs whose embeddings these detectors are given; the one that they score is the last."""
        needs = set(Wants.of(*(spec.parse("detectors", text) for text in detectors)).needs)
        if needs & set(EARLIER) and (earlier := self.plan.earlier(epoch)):
            return (earlier, epoch)
        return (epoch,) if needs & set(EMBEDDED) else ()

    def _others(self, arm: Arm) -> list[str]:
        """Files that are read besides the shards, the evaluation's and the classes."""
        reference = [shard.path for shard in list_shards(self.plan.reference)] if self.plan.reference else []
        detectors = (spec.parse("detectors", name) for names in self._read(arm).values() for name in names)
        own = sorted(Wants.of(*detectors).files)
        return [*reference, *spec.parse("attacks", self.attack).inputs(), *own]

    @property
    def _about(self) -> dict[str, Any]:
        """What the poisoning wrote of its shards."""
        about: dict[str, Any] = json.loads(Path(self.attacked, "dataset.json").read_text())
        return about

    def _common(self) -> dict[str, Any]:
        about = self._about
        return {"attack": self.attack, "dose": about["poisoned"], "dose_ppm": about["ppm"], "seed": self.seed}

    def _kept(self, arm: Arm) -> str:
        """The shards that its filter leaves."""
        return str(self.folder / arm.folder / "kept")

    def _model(self, arm: Arm) -> Path:
        """The folder of its training."""
        return self.folder / arm.folder / ("" if arm == UNDEFENDED else "model")

    def _checkpoint(self, epoch: int) -> str:
        return str(self.folder / UNDEFENDED.folder / "checkpoints" / f"epoch_{epoch:03d}")

    def _embeddings(self, epoch: int) -> str:
        return str(self.folder / f"embeddings-{epoch:03d}")

    def scores_of(self, scores: Scores) -> str:
        """The folder."""
        return self._scores(scores.epoch) + ("" if scores.pool == POOL else f"-pool{scores.pool}")

    def _scores(self, epoch: int) -> str:
        return str(self.folder / scores_folder(epoch))

    def _markers(self, folder: str) -> list[dict[str, Any]]:
        """Of a job over all shards, one each."""
        return read_markers([marker_path(folder, shard) for shard in list_shards(self.plan.shards)])

    def _spent(self, scores: str) -> tuple[dict[str, float], dict[str, float]]:
        """By detector, seconds of workers and of cores."""
        markers = self._markers(scores)
        cores = summed(marker["facts"]["core_seconds"] for marker in markers)
        return summed(marker["seconds"] for marker in markers), cores

    def _stage(self, name: str, verb: Callable[..., int], *arguments: str, **options: Any) -> None:
        about = f"  ({self.attack}, dose {self.dose}, seed {self.seed})"
        make_folder(str(self.folder))
        run_stage("loop", name, about, verb, *arguments, uid=self.plan.uid, **options)


@cache
def source_digest() -> str:
    """Of all sources that a result depends on: those of the jobs, and the trainer's."""
    root = Path(__file__).parent.parent / "train"
    sources = sorted(root.rglob("*.py"))
    return spec.digest([code_digest(), [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]])


def read_by(policy: str) -> tuple[str, ...]:
    """The detectors whose scores a policy reads."""
    detectors: tuple[str, ...] = spec.parse("policies", policy).detectors
    return detectors


def columns_of(plan: Config, epochs: Collection[int]) -> list[str]:
    """The columns of scores that a filter may read: of these epochs, and of the default pool."""
    return [
        f"{scores_folder(scores.epoch)}:{spec.text(spec.parse('detectors', text))}"
        for scores in plan.scores
        if scores.epoch in epochs and scores.pool == POOL
        for text in scores.detectors
    ]


def _arm_name(policy: str) -> str:
    """The detector that a policy acts on; of several, the policy itself."""
    names = read_by(policy)
    return names[0] if len(names) == 1 else policy


@cache
def _stamps(plan: Config) -> Sequence[Any]:
    from train.recipes import recipe_of

    listed = [shard.path for where in (plan.shards, plan.evaluation) for shard in list_shards(where)]
    return [recipe_of(plan.recipe).digest, *(stamp(path) for path in [*listed, plan.classes])]


@cache
def _data(plan: Config) -> dict[str, str]:
    """Digests of the bytes, so that two machines agree on them."""
    from train.data import digest

    classes = hashlib.sha256(view(plan.classes)).hexdigest()
    evaluation = spec.digest([digest(list_shards(plan.evaluation)), classes])
    return {"dataset_digest": digest(list_shards(plan.shards)), "evaluation_digest": evaluation}


@cache
def _by_content(defense: str | None) -> str | None:
    return spec.text(spec.parse("defenses", defense).by_content()) if defense else None


def _scored(folder: str, shards: str) -> set[str]:
    """The detectors that every shard has scores of; read from the files, for a job may have been killed."""
    import pyarrow.parquet as pq

    paths = [scores_path(folder, shard.name) for shard in list_shards(shards)]
    if not all(Path(path).exists() for path in paths):
        return set()
    return set.intersection(*({*pq.read_schema(path).names} for path in paths))
