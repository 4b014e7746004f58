"""A method of your own: distillation gets a fixed share of the loss, whatever the number of old classes.

fastil run digits method=examples/your_own_method.py:FixedShare loss=balanced fixed_share=0.3
"""

from dataclasses import dataclass

from fastil.methods import Method, StepContext


@dataclass(frozen=True)
class Config:
    """The keys of a recipe that are this method's own."""

    fixed_share: float = 0.5  # of distillation in the loss of an incremental step


class FixedShare(Method):
    """(1 - share) cross-entropy + share distillation; the base step has cross-entropy alone."""

    Config = Config

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return the weights of cross-entropy and of distillation."""
        share = self.config.fixed_share if context.num_old else 0.0
        return 1 - share, share
