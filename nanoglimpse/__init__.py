"""nanoglimpse: a minimal engine for Qwen2.5-VL in which GlimpsePrune is native."""

import warnings
from pathlib import Path

with warnings.catch_warnings():
    # torch says on import that it has no NumPy; nothing here needs it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch  # noqa: F401

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    # A checkout keeps the sub-packages kernels and weights beside this folder, not inside it.
    __path__.append(str(_here.parent))

from .engine import Engine, load  # noqa: E402
from .errors import NanoglimpseError, UsageError  # noqa: E402
from .processor import Prompt  # noqa: E402
from .sampling import Sampling  # noqa: E402
from .video import Video  # noqa: E402

__version__ = "0.1.0"
__all__ = ["Engine", "NanoglimpseError", "Prompt", "Sampling", "UsageError", "Video", "load"]
