"""A digest that identifies weights."""

import hashlib
import struct

from nanoglimpse.model.model import Model

# Number of evenly spaced values that are read from each parameter.
SAMPLES = 64


def fingerprint(model: Model) -> str:
    """SHA-256, in hex, of a model's configuration and of some values of every parameter."""
    digest = hashlib.sha256(repr(model.config).encode())
    if model.glimpse is not None:
        digest.update(repr(model.glimpse.config).encode())
    for part, module in model.modules():
        for name, parameter in module.named_parameters():
            if model.config.tie_word_embeddings and name.startswith("lm_head"):
                continue  # the embeddings again, in the layout of this device
            # Weights packed for a CPU have another layout, but the same values.
            weight = parameter.to_dense() if parameter.is_mkldnn else parameter.detach()
            values = weight.flatten()[:: max(weight.numel() // SAMPLES, 1)].float().tolist()
            digest.update(f"{part}.{name}{tuple(weight.shape)}".encode())
            digest.update(struct.pack(f"{len(values)}f", *values))
    return digest.hexdigest()
