"""`load`: an engine from a checkpoint."""

from pathlib import Path

from nanoglimpse.config import read_config
from nanoglimpse.engine import Engine
from nanoglimpse.inputs.processor import Processor
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.model.device import find_device
from nanoglimpse.weights.checkpoint import Progress
from nanoglimpse.weights.hub import MODEL_FILES, locate
from nanoglimpse.weights.load import load_model


def load(
    model: str | Path = "nano",
    *,
    glimpse: str | Path | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    backend: str | Ops = "auto",
    quantize: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Engine:
    """An engine for a Qwen2.5-VL checkpoint.

    Args:
        model: "nano" (embedded), a folder, or a Hub id.
        glimpse: folder or Hub id of glimpse weights; the model's own folder `glimpse` if None.
        adapter: folder or Hub id of a LoRA adapter (PEFT layout), merged into the weights.
        device: "auto" (cuda where there is one), or a torch device.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16, but float32 for a small model
            on a CPU, and float16 on a GPU older than compute capability 8.0.
        backend: "auto" is the fastest on the device, for inference only; "torch" is plain torch,
            through which gradients flow; or operations of your own.
        quantize: "int8" or "int4" for the decoder's matrices.
        progress: called with the bytes of weights read so far, and in all.

    Raises:
        UsageError: an argument names something that does not exist here.
        NanoglimpseError: a file is missing, broken, or of another model.
    """
    place, folder = find_device(device), locate(model, MODEL_FILES)
    config = read_config(folder / "config.json")
    # The small files first, so that a mistake shows before gigabytes are read. To a GPU raw pixels
    # travel in an eighth of the bytes.
    processor = Processor(folder, config, raw=place.type == "cuda")
    loaded = load_model(
        str(model),
        folder,
        config,
        processor.pixels,
        place,
        dtype=dtype,
        backend=backend,
        glimpse=glimpse,
        adapter=adapter,
        quantize=quantize,
        progress=progress,
    )
    return Engine(loaded, processor)
