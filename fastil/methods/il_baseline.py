"""IL-Baseline and BalancedS-CE: rehearsal and distillation under the softmax or the Balanced Softmax (3.1, 3.2).

"L = rho L_d + (1 - rho) L_c" (eq. 1), "where rho is defined as N_t / N_{t+1} [...] the total number of classes". The
released BiC code weighs the two by the step number and leaves T^2 out; here both are the paper's.
"""

from fastil.methods.classification_loss import StepContext
from fastil.methods.method import CROSS_ENTROPY, Method
from fastil.methods.registry import register


@register
class ILBaseline(Method):
    """Eq. 1 with any classification loss, on any head."""

    name = "il_baseline"
    base = CROSS_ENTROPY

    def weigh(self, context: StepContext) -> tuple[float, float]:
        rho = context.num_old / context.num_seen
        return 1 - rho, rho
