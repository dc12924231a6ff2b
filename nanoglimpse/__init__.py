"""nanoglimpse: a minimal engine for Qwen2.5-VL in which GlimpsePrune is native."""

import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

with warnings.catch_warnings():
    # torch says on import that it has no NumPy; nothing here needs it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch  # noqa: F401


class _Checkout:
    """Finds the sub-packages that a checkout keeps beside this folder, and nothing else there."""

    ROOT = Path(__file__).resolve().parent.parent

    @classmethod
    def find_spec(cls, name: str, path=None, target=None) -> ModuleSpec | None:
        """The spec of nanoglimpse.kernels or nanoglimpse.weights; None for other names."""
        if name not in ("nanoglimpse.kernels", "nanoglimpse.weights"):
            return None
        folder = cls.ROOT / name.partition(".")[2]
        if (folder / "__init__.py").is_file():
            return spec_from_file_location(name, folder / "__init__.py")
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec


if PathFinder.find_spec("nanoglimpse.kernels", __path__) is None:
    # Before the finders of editable installations, which may be those of another checkout.
    sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, _Checkout)

from nanoglimpse.engine import Engine  # noqa: E402
from nanoglimpse.errors import NanoglimpseError, UsageError  # noqa: E402
from nanoglimpse.inference.sampling import Sampling  # noqa: E402
from nanoglimpse.inputs.prompt import Prompt  # noqa: E402
from nanoglimpse.loader import load  # noqa: E402
from nanoglimpse.methods.options import Pruning  # noqa: E402
from nanoglimpse.moved import Moved  # noqa: E402
from nanoglimpse.pictures.video import Video  # noqa: E402
from nanoglimpse.version import VERSION  # noqa: E402

# Last, so that it is asked only about modules that do not exist.
sys.meta_path.append(Moved)

__version__ = VERSION
__all__ = [
    "Engine",
    "NanoglimpseError",
    "Prompt",
    "Pruning",
    "Sampling",
    "UsageError",
    "Video",
    "load",
]
