"""The student between two trainings: exemplars, class means and accuracies are computed from it."""

import torch
from torch import Tensor

from fastil.evaluation import BATCH, forward
from fastil.models import Folded, Network, Output
from fastil.nearest_mean import class_means
from fastil.protocol import Ids
from fastil.training import compiling
from fastil.training.run_loaders import RunLoaders


class FrozenNetwork:
    """The student in float32, with the weights that it has when it is called, and the images that it is called on."""

    def __init__(self, student: Network, loaders: RunLoaders) -> None:
        self.loaders, self.folded = loaders, Folded(student, torch.float32, BATCH)
        self.folded.plain.keeps_maps = False

    def training_output(self, ids: Ids, mirrored: bool = False) -> Output:
        """Return features [n, d] and logits [n, W] of training images, by the test-time transform."""
        return forward(self.folded, self.loaders.plain, ids, mirrored=mirrored)

    def training_features(self, ids: Ids, mirrored: bool = False) -> Tensor:
        """Return features [n, d] of training images, by the test-time transform."""
        return forward(self.folded, self.loaders.plain, ids, mirrored=mirrored, keeps_logits=False).features

    def test_output(self, ids: Ids) -> Output:
        """Return features [n, d] and logits [n, W] of test images."""
        return forward(self.folded, self.loaders.test, ids)

    def class_means(self, exemplars: Ids, positions: Ids, mirrored: bool) -> Tensor:
        """Return the means of the exemplars' features, float32 [classes, d]. positions: the classes of the exemplars,
        int64 [m]. mirrored: include mirror images, if training flips."""
        plain = self.training_features(exemplars)
        mirrored = mirrored and self.loaders.train.transform.flip
        other = self.training_features(exemplars, mirrored=True) if mirrored else plain
        return class_means(plain, other, torch.from_numpy(positions).to(plain.device))

    def compile(self) -> str | None:
        """Compile it for full batches. Returns why not, in one line, if that failed."""
        transform = self.loaders.test.transform
        example = torch.zeros(BATCH, 3, transform.height, transform.width, device=self.loaders.test.device)
        example = example.to(memory_format=torch.channels_last)
        self.folded.fast, why_not = compiling.compile_network(self.folded.plain, example, train=False, use="evaluation")
        return why_not
