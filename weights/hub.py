"""Finds the files of a model: in a folder, or on the Hugging Face Hub."""

import re
from pathlib import Path

from nanoglimpse.errors import NanoglimpseError, UsageError

MODEL_FILES = ["*.json", "*.safetensors", "glimpse/*"]
GLIMPSE_FILES = ["config.json", "new_modules_gp.pt", "glimpse.safetensors"]
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]

EMBEDDED = {"nano": Path(__file__).parent / "nano"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(source: str | Path, files: list[str]) -> Path:
    """The folder of a checkpoint: an embedded one by name, a local one, or one from the Hub.

    Args:
        source: "nano", a folder, or a Hub id, which huggingface_hub fetches or finds in its cache.
        files: patterns of what is needed from the Hub.

    Raises:
        UsageError: `source` is neither a folder nor a Hub id.
        NanoglimpseError: the Hub cannot be reached, or refuses the download.
    """
    name = str(source)
    if name in EMBEDDED:
        return EMBEDDED[name]
    if Path(source).is_dir():
        return Path(source)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise UsageError(
            f"{name} is neither a folder nor a Hub id; embedded: {', '.join(EMBEDDED)}"
        )
    from huggingface_hub import snapshot_download  # costs a fifth of a second
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise NanoglimpseError(
            f"{name} is not a folder, and cannot be downloaded from the Hub ({reason}); download "
            f"it elsewhere with 'hf download {name}', or give the path of a folder"
        ) from None
