"""The two lines that every method lies between: joint training above, plain finetuning below (not in the paper)."""

from fastil.methods.context import StepContext
from fastil.methods.method import CROSS_ENTROPY, Method
from fastil.methods.registry import register


@register
class Finetune(Method):
    """The classification loss alone, on the new classes and the exemplars; with exemplars_per_class=0 on the new
    classes only, so the old ones are forgotten.
    """

    name = "finetune"
    base_training = CROSS_ENTROPY
    uses_teacher = False
    distils_logits = False

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return 1 and 0: nothing is distilled."""
        return 1.0, 0.0


@register
class Joint(Finetune):
    """A new network for each step, trained on all images of the classes seen so far. It keeps what no incremental
    method may keep, so its accuracy is the most they can hope for.
    """

    name = "joint"
    is_joint = True
