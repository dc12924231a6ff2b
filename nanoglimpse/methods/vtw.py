"""VTW (arXiv 2405.05803): from some layer on, no visual tokens at all.

The public code leaves after 15 of 32 layers; here after as large a share of the model's. The cap
plays no part.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Choice, Look, Method

if TYPE_CHECKING:
    from ..engine import Engine


class VTW(Method):
    """Withdraws all visual tokens."""

    name = "vtw"
    about = "VTW, arXiv 2405.05803: after 15/32 of the layers no visual tokens are left"
    capped = False
    fixed = True
    needs_hidden = False

    def stops(self, engine: "Engine") -> Sequence[int]:
        """After 15/32 of the layers."""
        return (max(round(engine.config.text_config.num_hidden_layers * 15 / 32), 1),)

    def choose(self, look: Look) -> Choice:
        """Nothing."""
        return Choice(~look.batch.prunable)
