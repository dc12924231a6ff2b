"""The JSON files of a checkpoint, each read against a table of its keys."""

from nanoglimpse.config.adapter import AdapterConfig, Layer, read_adapter_config
from nanoglimpse.config.archive import load_archive
from nanoglimpse.config.generation import Generation, read_generation
from nanoglimpse.config.model import (
    ANCHORS,
    GREEDY,
    UNSET,
    Config,
    GlimpseConfig,
    Sampling,
    TextConfig,
    VisionConfig,
    check_glimpse,
    parse_config,
    read_config,
    read_glimpse_config,
)
from nanoglimpse.config.pixels import PixelConfig, read_pixel_config
from nanoglimpse.config.schema import read_json, shown
from nanoglimpse.config.session import read_session_header
from nanoglimpse.config.tensors import Stored, as_safetensors, headers, shards
from nanoglimpse.config.tokens import read_tokenizer

__all__ = [
    "ANCHORS",
    "GREEDY",
    "UNSET",
    "AdapterConfig",
    "Config",
    "Generation",
    "GlimpseConfig",
    "Layer",
    "PixelConfig",
    "Sampling",
    "Stored",
    "TextConfig",
    "VisionConfig",
    "as_safetensors",
    "check_glimpse",
    "headers",
    "load_archive",
    "parse_config",
    "read_adapter_config",
    "read_config",
    "read_generation",
    "read_glimpse_config",
    "read_json",
    "read_pixel_config",
    "read_session_header",
    "read_tokenizer",
    "shards",
    "shown",
]
