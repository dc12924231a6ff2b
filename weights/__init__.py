"""Loading: where a checkpoint lies, and its weights into the modules that use them."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import Config
from ..decoder import Decoder
from ..errors import NanoglimpseError, UsageError
from ..kernels.ops import Ops
from ..vision import VisionEncoder
from .checkpoint import Progress, fill, shards, stream
from .glimpse import load_glimpse, read_tensors, save_glimpse
from .lora import Adapter, merge, read_adapter
from .names import parts

__all__ = ["load_glimpse", "load_model", "locate", "read_adapter", "read_tensors", "save_glimpse"]

EMBEDDED = {"nano": Path(__file__).parent / "nano"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(source: str | Path, files: list[str]) -> Path:
    """The folder of a checkpoint: an embedded one by name, a local one, or one from the Hub.

    Args:
        source: "nano", a folder, or a Hub id, which huggingface_hub fetches or finds in its cache.
        files: patterns of what is needed from the Hub.

    Raises:
        UsageError: there is no such folder and it is no Hub id.
        NanoglimpseError: the Hub cannot be reached or refuses.
    """
    name = str(source)
    if name in EMBEDDED:
        return EMBEDDED[name]
    if Path(source).is_dir():
        return Path(source)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise UsageError(f"{name} is no folder, no Hub id and none of {', '.join(EMBEDDED)}")
    from huggingface_hub import snapshot_download  # costs a fifth of a second
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise NanoglimpseError(
            f"{name} is no folder, and the Hub does not give it ({reason}); where there is a "
            f"network fetch it with 'hf download {name}', or give the path of its folder"
        ) from None


def load_model(
    folder: Path,
    config: Config,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Adapter | None,
    progress: Progress,
    quantize: str | None = None,
) -> tuple[VisionEncoder, Decoder]:
    """Vision encoder and decoder of the checkpoint in `folder`, a LoRA adapter merged into them.

    With `quantize`, of `kernels.quantized`, each matrix of the decoder becomes one of few bits when
    its last tensor has been read, so that the dense model is never in memory.

    Raises:
        NanoglimpseError: a file or tensor is missing, broken, unknown or misshapen.
    """
    with torch.device("meta"):
        vision = VisionEncoder(config.vision_config, ops)
        decoder = Decoder(config, ops)
    model = nn.ModuleDict({"vision": vision, "decoder": decoder})
    table = parts(model)
    # A tied checkpoint may still carry its head, and old ones their rotary frequencies.
    unused = {"lm_head.weight"} if config.tie_word_embeddings else set()

    def whole(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if adapter:
            merge(name, tensor, adapter, table)
        own = name.removeprefix("decoder.")
        if quantize is None or own == name:
            return {name: tensor}
        parts_of = decoder.quantize(own, tensor, quantize)
        return {f"decoder.{leaf}": part for leaf, part in parts_of.items()}

    fill(
        model,
        stream(shards(folder), progress),
        table,
        lambda name: name in unused or name.endswith("rotary_emb.inv_freq"),
        dtype,
        device,
        whole,
    )
    return vision, decoder
