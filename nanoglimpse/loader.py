"""`load`: an engine from a checkpoint."""

from pathlib import Path

from nanoglimpse.config import read_config, read_generation
from nanoglimpse.engine import Engine
from nanoglimpse.inputs.processor import Processor
from nanoglimpse.kernels.backends import select
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.quantize import check_supported
from nanoglimpse.model.device import find_device, find_dtype
from nanoglimpse.model.model import Model
from nanoglimpse.weights.checkpoint import Progress
from nanoglimpse.weights.glimpse import load_glimpse
from nanoglimpse.weights.hub import ADAPTER_FILES, GLIMPSE_FILES, MODEL_FILES, locate
from nanoglimpse.weights.load import build, open_checkpoint
from nanoglimpse.weights.lora import read_adapter


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
        glimpse: folder or Hub id of glimpse weights; the folder `glimpse` of the model if None.
        adapter: folder or Hub id of a LoRA adapter (PEFT layout), merged into the weights.
        device: "auto" (cuda if there is a GPU), or a torch device.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16, but float32 for a small model
            on a CPU, and float16 on a GPU older than compute capability 8.0.
        backend: "auto" is the fastest for the device, for inference only; "torch" is plain torch,
            which supports gradients; or operations of your own.
        quantize: "int8" or "int4" for the matrices of the decoder.
        progress: called with the bytes of weights read so far, and their total.

    Raises:
        UsageError: an argument names something that does not exist or is not available.
        NanoglimpseError: a file or tensor is missing, broken, unknown, or of another model.
    """
    place, folder = find_device(device), locate(model, MODEL_FILES)
    config = read_config(folder / "config.json")
    # Small files come first, so that mistakes are found before gigabytes are read.
    processor = Processor(folder, config, raw=place.type == "cuda")
    ops, kind = select(backend, place), find_dtype(dtype, place, config)
    if quantize is not None:
        check_supported(quantize, place, ops)
    generation, own = read_generation(folder / "generation_config.json", config), folder / "glimpse"
    # The layout of a conversation is ours, so that its end token always ends an answer.
    eos = generation.eos | processor.end_ids
    source = locate(glimpse, GLIMPSE_FILES) if glimpse else own if own.is_dir() else None
    extra = load_glimpse(source, config, ops, kind, place) if source else None
    lora = read_adapter(locate(adapter, ADAPTER_FILES)) if adapter else None
    config, tensors = open_checkpoint(folder, config, kind, lora, progress)
    parts = build(config, ops, tensors, kind, place, processor.pixels, lora, quantize)
    for part in parts:
        part.pack(ops)
    loaded = Model(str(model), config, *parts, extra, eos, ops, quantize, generation.sampling)
    return Engine(loaded, processor)
