"""Where the modules of version 0.1 are now: importing an old name raises an error with the new one.

.github/CHANGELOG.md has the same table, and one of classes and functions that have been renamed.
"""

from importlib.machinery import ModuleSpec

# Modules that kept their names, by their new folder.
KEPT = {
    "cli": "chat overlay",
    "inference": "prefix sampling session session_file stream",
    "inputs": "processor video",
    "model": "decoder glimpse layers rope vision",
}
RENAMED = {
    "batch": "inputs.prompt",
    "batchfile": "cli.batch_file",
    "cache": "kvcache.cache",
    "cost": "flops",
    "graph": "inference.cuda_graph",
    "many": "inference.scheduler",
    "pixels": "inputs.images",
    "reading": "inference.prefill",
    "results": "inference.outputs",
    "kernels.append": "kernels.reference.rope",
    "kernels.attention": "kernels.reference.attention",
    "kernels.decode": "kernels.reference.decode_attention",
    "kernels.few": "kernels.reference.linear",
    "kernels.keep": "kernels.reference.gather",
    "kernels.linear": "kernels.reference.linear",
    "kernels.norm": "kernels.reference.norm",
    "kernels.ops": "kernels.interface and nanoglimpse.kernels.backends",
    "kernels.packing": "kernels.varlen",
    "kernels.quantized": "kernels.quantize",
    "kernels.received": "kernels.reference.attention_colsum",
    "kernels.rope": "kernels.reference.rope",
    "kernels.swiglu": "kernels.reference.linear",
    "weights.names": "weights.mapping",
}
MOVED = RENAMED | {name: f"{room}.{name}" for room, all in KEPT.items() for name in all.split()}
PUBLIC = {"processor": "Prompt", "sampling": "Sampling", "video": "Video"}


class Moved:
    """A finder for `sys.meta_path` that finds no module, but explains why an old name fails."""

    @classmethod
    def find_spec(cls, name: str, path=None, target=None) -> ModuleSpec | None:
        """None for a name that is not in the table.

        Raises:
            ModuleNotFoundError: the module has moved; the message names the new place.
        """
        old = name.removeprefix("nanoglimpse.")
        if old == name or old not in MOVED:
            return None
        short = f" (from nanoglimpse import {PUBLIC[old]} works as before)" if old in PUBLIC else ""
        message = f"{name} has moved to nanoglimpse.{MOVED[old]}{short}"
        raise ModuleNotFoundError(message, name=name)
