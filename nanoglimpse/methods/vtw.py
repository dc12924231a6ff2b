"""VTW (arXiv 2405.05803): from some layer on, no visual tokens at all.

The public code leaves after 15 of 32 layers; here after as large a share of the model's. The cap
plays no part.
"""

from collections.abc import Sequence

from nanoglimpse.methods.base import Decision, PruningContext, PruningMethod
from nanoglimpse.model.model import Model


class VTW(PruningMethod):
    """Withdraws all visual tokens."""

    name = "vtw"
    about = "VTW, arXiv 2405.05803: after 15/32 of the layers no visual tokens are left"
    budget = "fixed"

    def layers(self, model: Model) -> Sequence[int]:
        """After 15/32 of the layers."""
        return (max(round(model.depth * 15 / 32), 1),)

    def choose(self, context: PruningContext) -> Decision:
        """Nothing."""
        return Decision(~context.prunable)
