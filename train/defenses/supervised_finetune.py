"""Supervised fine-tuning: the image tower learns the labels of trusted images, the text tower stays as it was.

Trade-off: needs labels, and a model that is asked by words it was not taught here. The head is linear, its rows are the
text features of the classes' prompts, and it is frozen with the text tower: so the checkpoint is the open_clip model
that was trained, and classes outside the list are still to be asked for. A free head, as in the paper, would have to be
thrown away before anybody could use the model by text. The text tower keeps what the poison taught it. A poison that
leaks (`contamination`) has the label that its attacker gave it, which is the target: a poisoned pair's own label field
is still that of its image, and would teach the trigger's image for what it is.

Source: the supervised arm of CleanCLIP (Bansal et al. 2023, section 5): 10 epochs at 1e-4 after a pretraining at 5e-4.
Changed: the head, as said.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch

from pipeline.errors import InputError
from pipeline.shards import samples
from pipeline.shards.store import view
from pipeline.spec import UNDRAWN
from train.defenses._contrastive import average
from train.defenses._trusted import Trusted
from train.labels import Labels, key, read_classes

if TYPE_CHECKING:
    from train.data import Batch
    from train.trainer import Features, Trainer


@dataclass(frozen=True)
class supervised_finetune(Trusted):
    """Cross-entropy over the classes in a file, on labelled trusted images (an arm of CleanCLIP, 2023)."""

    classes: Annotated[str, UNDRAWN] = ""
    lr: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.classes:
            raise ValueError("classes is a text file with one class name a line")

    def by_content(self) -> Trusted:
        read_classes(self.classes)
        sha = hashlib.sha256(view(self.classes)).hexdigest()[:16]
        return dataclasses.replace(super().by_content(), classes=sha)  # type: ignore[call-arg]  # it is of this class

    def begin(self, trainer: "Trainer") -> None:
        from train.evaluate import class_features
        from train.metrics import unit
        from train.model import load

        for name, parameter in trainer.towers.named_parameters():
            parameter.requires_grad_(name.startswith("clip.visual."))
        names = read_classes(self.classes)
        assert trainer.task.init  # needs_init
        start = load(trainer.task.init, device="cpu")
        head = torch.from_numpy(unit(class_features(start, names, trainer.recipe.prompts)))
        known, label = Labels(names), {}
        for shard in trainer.task.shards:
            for sample in samples(shard, trainer.task.uid):
                label[sample.uid] = known.of(sample)
        label |= self._leaked(trainer, known)
        of_row = torch.tensor([label[uid.decode()] for uid in trainer.index.uid])
        if not (of_row >= 0).any():
            raise InputError(f"{self.trusted}: no pair there is of one of the classes of {self.classes}")
        self.memory.update(head=head.to(trainer.device), labels=of_row.to(trainer.device))

    def _leaked(self, trainer: "Trainer", known: Labels) -> dict[str, int]:
        """The class of the target of each poison that leaks."""
        targets = {uid: (trainer.task.poisons or {})[uid] for uids in trainer.task.only.values() for uid in uids}
        if unknown := {target for target in targets.values() if key(target) not in known.index}:
            raise InputError(
                f"{self.classes}: {min(unknown)!r}, the target of a leaking poison, is not among these classes; "
                "add a line, or leave contamination out"
            )
        return {uid: known.index[key(target)] for uid, target in targets.items()}

    def loss(self, features: "Features", batch: "Batch") -> torch.Tensor:
        labels = self.memory["labels"][torch.from_numpy(batch.rows).to(features.image.device)]
        logits = features.logit_scale * features.image @ self.memory["head"].T
        losses = torch.nn.functional.cross_entropy(logits, labels.clamp_min(0), reduction="none")
        return average(losses, labels >= 0)
