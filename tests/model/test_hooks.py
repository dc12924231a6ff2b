"""Modules are torch's: hooks fire, in the modules in which a reader would put them."""

import pytest

from tests.helpers.prompts import QUESTION, SCENE


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vision.blocks.0",
        "vision.merger",
        "decoder.layers.0",
        "decoder.layers.8.mlp.down",
        "decoder.layers.0.qkv",
        "glimpse.predictor",
    ],
)
def test_forward_hooks_fire(nano, name):
    calls = []
    module = nano.model
    for part in name.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    handle = module.register_forward_hook(lambda *_: calls.append(name))
    try:
        nano.ask(SCENE, QUESTION, max_new_tokens=2)
    finally:
        handle.remove()
    assert calls
