"""IL-Baseline and BalancedS-CE: rehearsal and distillation under the softmax or the Balanced Softmax (3.1, 3.2).

"L = rho L_d + (1 - rho) L_c" (eq. 1), "where rho is defined as N_t / N_{t+1} [...] the total number of classes": old
classes over all classes seen (`StepContext.rho`). The released BiC code takes the step number instead and leaves T^2
out; here both are the paper's.
"""

from fastil.methods.context import StepContext
from fastil.methods.method import CROSS_ENTROPY, Method
from fastil.methods.registry import register


@register
class ILBaseline(Method):
    """Eq. 1 with any classification loss, on any head."""

    name = "il_baseline"
    base_training = CROSS_ENTROPY

    def loss_weights(self, context: StepContext) -> tuple[float, float]:
        """Return 1 - rho and rho."""
        return 1 - context.rho, context.rho
