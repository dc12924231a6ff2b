"""What a model does before its first answer: operations are checked, and decode steps captured."""

from collections.abc import Callable, Collection

import torch
from PIL import Image

from nanoglimpse.inference.decode import decode_steps
from nanoglimpse.inference.outputs import Prefill
from nanoglimpse.inference.session import begin
from nanoglimpse.inputs.processor import SYSTEM, Processor
from nanoglimpse.kernels.checked import Checks, OpCheck
from nanoglimpse.methods.options import Pruning, ResolvedPruning, resolve
from nanoglimpse.model.model import Model

# Sides of the pictures: 576 visual tokens, for what depends on having many rows, and 64.
SIDES = (672, 224)


def check_ops(
    model: Model,
    processor: Processor,
    prefill: Callable[[Model], Callable[..., Prefill]],
    pruning: Pruning | ResolvedPruning,
    batches: Collection[int],
) -> tuple[Model, list[OpCheck]]:
    """Runs prompts of several kinds with each operation beside the reference.

    Args:
        model: its networks use the operations that have passed afterwards, whatever happens.
        processor: builds the prompts, of noise and a question.
        prefill: gives `Engine.prefill_many` of a model.
        pruning: what the answers will use.
        batches: numbers of sequences that will be decoded together.

    Returns:
        The model with a reference in place of each operation at fault, and what was found; nothing
        if all operations are references.

    Raises:
        NanoglimpseError: an operation has stopped the GPU.
    """
    checks = Checks(model.ops)
    if checks.ops == model.ops:
        return model, []
    try:
        watched = model.with_ops(checks.ops)
        rehearse(watched, processor, prefill(watched), resolve(watched, pruning, {}), batches)
    finally:
        model = model.with_ops(checks.passed)
    return model, list(checks.results.values())


@torch.inference_mode()
def rehearse(
    model: Model,
    processor: Processor,
    prefill: Callable[..., Prefill],
    pruning: ResolvedPruning,
    batches: Collection[int],
) -> None:
    """Calls every operation that answers to questions about pictures call."""
    noise = [Image.effect_noise((side, side), 64).convert("RGB") for side in SIDES]
    long, short = (processor.prompt(picture, "What is this?") for picture in noise)
    for chosen in (resolve(model, "dense", {}), pruning):
        for prompts in ([long], [long, short]):
            prefill(prompts, chosen, max_new_tokens=1)
    model.encode(short.patches, short.grids, vision_blocks=[0])
    if not pruning.needs.question:
        data = begin(model, processor, pruning, noise[-1], 0, SYSTEM, None, None)
        asked = data.prompt.then(processor.fill(processor.conversation(["What is this?"], [])))
        shared = {"vision": data.vision, "prefix": data.prefix}
        prefill([asked], pruning, max_new_tokens=1, **shared)
    for batch in batches:
        cache = prefill([short] * batch, "dense", max_new_tokens=2).cache
        with decode_steps(model, None, cache, 1) as step:
            step(torch.zeros(batch, dtype=torch.int64, device=model.device))
