"""Which images a step trains on, holds out and keeps: new classes, exemplars of old ones, held-out exemplars."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastil import memory, ranks
from fastil.data import Dataset
from fastil.plan import Key
from fastil.protocol import Ids, Protocol
from fastil.recipe import Recipe
from fastil.training.frozen import FrozenNetwork

NAMED = 5  # classes in a message


class Rehearsal:
    """The rehearsal memory of a run, and the sets of images that are made from it.

    network: the one whose features are herded. say: prints a line for the user.
    """

    def __init__(
        self,
        recipe: Recipe,
        protocol: Protocol,
        dataset: Dataset,
        network: FrozenNetwork,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.protocol, self.dataset, self.network, self.say = recipe, protocol, dataset, network, say
        self.steps = protocol.steps
        self.positions = protocol.positions(len(dataset.class_names))
        self.memory = memory.RehearsalMemory()
        self.finetuning_set = np.empty(0, dtype=np.int64)  # ids to finetune on, while that is under way

    def positions_of(self, ids: Ids) -> Ids:
        """Return the incremental positions of the classes of training images, int64 [n]."""
        return self.positions[self.dataset.train.labels[ids]]

    def num_classes(self, step: int) -> tuple[int, int]:
        """Return how many classes are old in a step, and how many are seen by then."""
        num_old = sum(len(c) for c in self.steps[:step])
        return num_old, num_old + len(self.steps[step])

    def training_set(self, step: int) -> tuple[Ids, Ids]:
        """Return the ids to train on, new classes and exemplars of old ones (in joint training all of their images),
        and the held-out ids of both (Meta's B_t, BiC's validation images)."""
        num_old, num_seen = self.num_classes(step)
        new = [self.dataset.train.of_class(c) for c in self.steps[step]]
        old = [self.memory.ids()]
        if self.recipe.procedure.is_joint:
            old = [self.dataset.train.of_class(c) for c in self.protocol.order[:num_old]]
        ids, held_out = np.concatenate([*new, *old]), np.empty(0, dtype=np.int64)
        if self.recipe.reserves:
            held_out = self.reserved(self.protocol.order[:num_seen], num_old or num_seen)
            ids = ids[~np.isin(ids, held_out)]
        elif step > 0 and self.recipe.holds_out:
            per_class = self.recipe.held_out(self.recipe.memory.quota(num_old))
            key = Key(self.recipe.train.seed, step, "meta")
            ids, held_out = memory.hold_out(ids, self.positions_of(ids), per_class, key)
        return ids, held_out

    def reserved(self, classes: Ids, sharing: int) -> Ids:
        """Return the images of these classes that are never trained on, once `sharing` classes share the memory."""
        per_class = self.recipe.held_out(self.recipe.memory.quota(sharing))
        key = Key(self.recipe.train.seed, 0, "meta")
        drawn = [memory.select_at_random(self.dataset.train.of_class(c), per_class, key) for c in classes]
        return np.concatenate(drawn)

    def select_finetuning_set(self, step: int) -> None:
        """Set `finetuning_set`: the same number of exemplars of every class seen, none of them held out. The number is
        the quota, or what the smallest class has."""
        held_out = self.training_set(step)[1]
        exemplars = [*self.memory.exemplars.values(), *self.select(step).values()]
        exemplars = [ids[~np.isin(ids, held_out)] for ids in exemplars]
        size = min(self.quota(self.num_classes(step)[1]), *map(len, exemplars))
        self.finetuning_set = np.concatenate([ids[:size] for ids in exemplars])

    def select(self, step: int) -> dict[int, Ids]:
        """Return the exemplars of each new class, best first, from one pass over its images."""
        classes, (num_old, num_seen) = self.steps[step], self.num_classes(step)
        quota = self.quota(num_seen)
        ids = [self.dataset.train.of_class(c) for c in classes]
        if self.recipe.reserves:
            reserved = self.reserved(classes, num_old or num_seen)
            ids = [i[~np.isin(i, reserved)] for i in ids]
        if quota == 0:
            chosen = [i[:0] for i in ids]
        elif self.recipe.memory.exemplar_selection == "herding":
            features = torch.split(self.network.training_features(np.concatenate(ids)), [len(i) for i in ids])
            picked = ranks.from_first(lambda: memory.herd_classes(features, quota))
            chosen = [i[rank] for i, rank in zip(ids, picked, strict=True)]
        else:
            key = Key(self.recipe.train.seed, step, "memory")
            chosen = [memory.select_at_random(i, quota, key) for i in ids]
        short = [self.dataset.class_names[c] for c, i in zip(classes, ids, strict=True) if len(i) < quota]
        if short:
            named = ", ".join(short[:NAMED]) + (f" and {len(short) - NAMED} more" if len(short) > NAMED else "")
            self.say(f"step {step}: fewer than {quota} images in {named}; all of them are kept")
        return {int(c): exemplars for c, exemplars in zip(classes, chosen, strict=True)}

    def update(self, step: int) -> dict[int, Ids]:
        """Add the exemplars of the new classes to the memory; older classes keep a prefix of theirs. Returns the ids
        kept of every class, reserved ones included."""
        chosen, num_seen = self.select(step), self.num_classes(step)[1]
        self.memory.reduce(self.quota(num_seen))
        for class_id, exemplars in chosen.items():
            self.memory.add(class_id, exemplars)
        kept = self.memory.exemplars
        if self.recipe.reserves:  # they take a part of the memory as well
            kept = {c: np.concatenate([ids, self.reserved(np.array([c]), num_seen)]) for c, ids in kept.items()}
        return kept

    def quota(self, num_seen: int) -> int:
        """Return the number of exemplars of a class to train on, once num_seen classes share the memory."""
        quota = self.recipe.memory.quota(num_seen)
        return quota - self.recipe.held_out(quota) if self.recipe.reserves else quota

    def state_dict(self) -> dict[str, Any]:
        """Return the memory and the finetuning set as lists of ids."""
        return {
            "memory": {class_id: ids.tolist() for class_id, ids in self.memory.exemplars.items()},
            "finetuning": self.finetuning_set.tolist(),
        }

    def load_state_dict(self, memory: Mapping[int, Sequence[int]], finetuning: Sequence[int]) -> None:
        """Take up memory and finetuning set of a checkpoint. Raises ValueError for ids that are no images of these
        classes."""
        labels = self.dataset.train.labels
        for class_id, ids in memory.items():
            if any(i >= len(labels) or labels[i] != class_id for i in ids):
                raise ValueError(f"memory: ids that are no images of class {class_id}")
        if any(i >= len(labels) for i in finetuning):
            raise ValueError("finetuning: ids that are no images")
        self.memory.exemplars = {c: np.array(ids, dtype=np.int64) for c, ids in memory.items()}
        self.finetuning_set = np.array(finetuning, dtype=np.int64)
