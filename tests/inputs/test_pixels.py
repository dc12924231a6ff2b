"""Pixels that the vision encoder takes as they are: normalised there, or in its first matrix."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nanoglimpse import Prompt, UsageError, Video, load
from nanoglimpse.config import PixelConfig
from nanoglimpse.inputs.images import joined, preprocess_image
from nanoglimpse.inputs.processor import Processor
from nanoglimpse.inputs.video import preprocess_video
from nanoglimpse.model.vision import normalise
from tests.helpers.tiny import chat_ids

# Every channel its own, so that none can stand for another.
CONFIG = PixelConfig(image_mean=(0.1, 0.5, 0.3), image_std=(0.5, 0.2, 0.7))
RAW = replace(CONFIG, raw=True)


def picture(height=84, width=140, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), "uint8")
    )


def clip(count=4):
    return Video([picture(56, 84, seed) for seed in range(count)])


def test_raw_patches_are_the_picture_and_normalise_to_the_bit():
    raw, grid = preprocess_image(picture(), config=RAW)
    exact, same = preprocess_image(picture(), config=CONFIG)
    assert grid == same == (1, 6, 10)
    assert (raw.dtype, raw.shape) == (torch.uint8, (60, 3 * 14 * 14))
    assert raw.nbytes * 8 == exact.nbytes
    assert torch.equal(normalise(raw, CONFIG), exact)
    pixels = np.asarray(picture())
    assert raw[0].view(3, 14, 14).permute(1, 2, 0).tolist() == pixels[:14, :14].tolist()


def test_a_pair_of_frames_stays_a_pair():
    raw, grid, seconds = preprocess_video(clip(), None, None, RAW)
    exact, *rest = preprocess_video(clip(), None, None, CONFIG)
    assert rest == [grid, seconds]
    assert raw.shape == exact.shape
    assert torch.equal(normalise(raw, CONFIG), exact)
    first, second = normalise(raw, CONFIG).view(len(raw), 3, 2, -1).unbind(2)
    assert not torch.equal(first, second)


def test_stills_beside_clips_are_repeated():
    still, _ = preprocess_image(picture(), config=RAW)
    pair, _, _ = preprocess_video(clip(), None, None, RAW)
    nothing = torch.empty(0, 1176)
    both = joined([still, nothing, pair])
    assert torch.equal(normalise(both[:60], CONFIG), normalise(still, CONFIG))
    assert torch.equal(both[60:], pair)
    assert joined([nothing, still]) is still
    assert joined([nothing, nothing]) is nothing
    with pytest.raises(UsageError, match="raw and normalised patches cannot be combined"):
        joined([still, normalise(pair, CONFIG)])


@pytest.fixture(scope="module")
def engines(tiny_folder):
    """Pixels normalised by the processor, and raw ones normalised by the encoder."""
    exact, raw = (load(tiny_folder, dtype="float32", device="cpu", backend="torch") for _ in "ab")
    raw.vision.pixels = CONFIG
    for engine, pixels in ((exact, CONFIG), (raw, RAW)):
        engine.processor.pixels = pixels
    return exact, raw


def prompts_of(engine):
    """A still picture; a clip and a still one; text."""
    pixels, config, prompts = engine.processor.pixels, engine.config, []
    still, grid = preprocess_image(picture(), config=pixels)
    prompts.append(Prompt.from_tokens(chat_ids(3, grid, 4), still, [grid], config=config))
    pair, clip_grid, _ = preprocess_video(clip(), None, None, pixels)
    ids = chat_ids(2, (*clip_grid, "clip"), 3, grid, 2)
    both = joined([pair, still])
    prompts.append(Prompt.from_tokens(ids, both, [clip_grid, grid], config=config))
    return [*prompts, Prompt.from_tokens(chat_ids(5), config=config)]


@pytest.mark.slow
def test_raw_pixels_are_seen_as_normalised_ones(engines):
    exact, raw = engines
    expected = exact.prefill_many(prompts_of(exact), "glimpse")
    inside = raw.prefill_many(prompts_of(raw), "glimpse")
    assert torch.equal(inside.visual, expected.visual)
    assert torch.equal(inside.logits, expected.logits)


def test_a_processor_leaves_pixels_raw_where_it_is_told_to(tiny, tiny_folder):
    assert not tiny.processor.pixels.raw
    raw = Processor(tiny_folder, tiny.config, raw=True)
    assert raw.pixels == replace(tiny.processor.pixels, raw=True)
    assert tiny.vision.pixels == tiny.processor.pixels


def test_raw_patches_of_another_size_are_refused(tiny):
    raw, grid = preprocess_image(picture(), config=RAW)
    for patches in (raw[:, :-1], raw.float(), raw[1:]):
        with pytest.raises(UsageError, match="patches must have shape"):
            Prompt.from_tokens(chat_ids(1, grid), patches, [grid], config=tiny.config)


def test_a_session_takes_raw_pixels(engines):
    answers = []
    for engine in engines:
        prompt = prompts_of(engine)[0]
        session = engine.session(replace_tail(prompt, engine), "glimpse")
        answers.append(list(engine.decode(session.prefill(torch.arange(7, 12)), 4, True)))
    assert answers[0] == answers[1]


def replace_tail(prompt, engine):
    """The prompt up to its picture."""
    stop = int(prompt.visual.nonzero()[-1]) + 2
    ids = prompt.token_ids[:stop]
    return Prompt.from_tokens(ids, prompt.patches, prompt.grids, config=engine.config)
