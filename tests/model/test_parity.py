"""Dense inference, stage by stage, against transformers on the same files in fp32."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2_5_VLForConditionalGeneration

from nanoglimpse import Prompt, load
from nanoglimpse.inference.decode import decode_rope
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.model.rope import mrope
from tests.helpers.tiny import chat_ids, config_dict, patches_of, write_checkpoint

CASES = {
    "text": (9,),
    "whole windows": (4, (1, 16, 8), 5),
    "partial windows": (4, (1, 12, 18), 5),
    "odd shapes": (1, (1, 2, 22), 6),
    "image first and last": ((1, 10, 6), 3, (1, 6, 20)),
    "three images, two alike": (2, (1, 6, 6), 1, (1, 18, 4), 1, (1, 6, 6), 8),
    "image at the end": (7, (1, 4, 4)),
}


@pytest.fixture(scope="module", params=["untied, 4.x layout", "tied, 5.x layout"])
def pair(request, tmp_path_factory):
    """The engine and transformers on one checkpoint, in both layouts of the ecosystem."""
    folder = tmp_path_factory.mktemp("parity")
    tied = request.param.startswith("tied")
    write_checkpoint(folder, config_dict(tie_word_embeddings=tied))
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if "5.x" in request.param:
        folder = tmp_path_factory.mktemp("parity5")
        hf.save_pretrained(folder, save_original_format=False)
        config = json.loads((folder / "config.json").read_text())
        assert "text_config" in config
        assert "hidden_size" not in config
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert "model.language_model.norm.weight" in file.keys()  # noqa: SIM118
    return load(folder, dtype="float32", device="cpu"), hf


def prompt_of(engine, parts):
    grids = [part for part in parts if not isinstance(part, int)]
    return Prompt.from_tokens(chat_ids(*parts), patches_of(grids), grids, config=engine.config)


def hf_inputs(prompt, config):
    ids = prompt.token_ids[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.grids:
        inputs |= {
            "pixel_values": prompt.patches,
            "image_grid_thw": torch.tensor(prompt.grids),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
        }
    return inputs


def close(ours, theirs, tolerance=1e-5):
    scale = theirs.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("parts", CASES.values(), ids=CASES)
def test_stages_and_tokens(pair, parts):
    engine, hf = pair
    prompt = prompt_of(engine, parts)
    inputs = hf_inputs(prompt, engine.config)
    with torch.no_grad():
        out = hf(**inputs, output_hidden_states=True, use_cache=True)
    prefill = engine.prefill(prompt, method="dense")
    if prompt.grids:
        thw = inputs["image_grid_thw"]
        merged = hf.model.visual(prompt.patches, grid_thw=thw).pooler_output.detach()
        close(prefill.visual, merged)
        positions, _ = hf.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=thw
        )
        assert torch.equal(prompt.positions, positions[:, 0])
    close(prefill.logits, out.logits[0, -1])
    for layer, cached in enumerate(out.past_key_values.layers):
        k, v = prefill.cache.layer(layer)
        close(k, cached.keys[0].transpose(0, 1))
        close(v, cached.values[0].transpose(0, 1))
    theirs = hf.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None)
    ours = list(engine.decode(prefill, 32, ignore_eos=True))
    assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_every_hidden_state_of_the_decoder(pair):
    engine, hf = pair
    prompt = prompt_of(engine, CASES["partial windows"])
    text, counts = engine.config.text_config, [len(prompt)]
    with torch.no_grad():
        states = hf(**hf_inputs(prompt, engine.config), output_hidden_states=True).hidden_states
        hidden = engine.decoder.embed_tokens(prompt.token_ids)
        hidden[prompt.visual], _ = engine.vision(prompt.patches, prompt.grids)
        close(hidden, states[0][0])
        cache = KVCache(text, range(6), counts, prompt.positions.max()[None] + 1, hidden, TORCH)
        kv, rope = cache.reserve(counts), mrope(prompt.positions, text)
        for layer, block in enumerate(engine.decoder.layers[:-1]):
            hidden = block(hidden, rope, kv.layer(layer), Segments(counts), None)
            close(hidden, states[layer + 1][0])


@pytest.mark.slow
@pytest.mark.parametrize("step", range(4))
def test_prefill_equals_decoding_token_by_token(pair, step):
    """The logits of a prompt are those of a shorter one, decoded over its last tokens."""
    engine, _ = pair
    prompt = prompt_of(engine, (4, (1, 12, 18), 9))
    whole = engine.prefill(prompt, method="dense").logits
    cut = step + 1
    shorter = Prompt(
        prompt.token_ids[:-cut],
        prompt.positions[:, :-cut],
        prompt.visual[:-cut],
        prompt.patches,
        prompt.grids,
    )
    prefill = engine.prefill(shorter, method="dense")
    cache = prefill.rewind(cut)
    rope = decode_rope(engine.model, cache.next_position, cut)
    with torch.inference_mode():
        for number in range(cut):
            token = prompt.token_ids[len(prompt) - cut + number]
            logits = engine.decoder.step(token[None], rope[number], cache)
    close(logits[0], whole)


def video_positions(token_ids, grids, seconds, config):
    """M-RoPE of 4.51 as lists: text goes on after the largest id of any axis."""
    ids, out, following, at = token_ids.tolist(), [], 0, 0
    grids, seconds = list(grids), list(seconds)
    while at < len(ids):
        if ids[at] not in (config.image_token_id, config.video_token_id):
            out.append((following,) * 3)
            following, at = following + 1, at + 1
            continue
        t, h, w = grids.pop(0)
        rate = 0.0
        if ids[at] == config.video_token_id:
            rate = seconds.pop(0) * config.vision_config.tokens_per_second
        block = [
            (following + int(frame * rate), following + row, following + column)
            for frame in range(t)
            for row in range(h // 2)
            for column in range(w // 2)
        ]
        out += block
        following = max(max(place) for place in block) + 1
        at += len(block)
    return torch.tensor(out).T


@pytest.mark.parametrize("seconds", [[1.0, 0.5], [0.25, 3.0]])
def test_video_positions_follow_the_models(pair, seconds):
    engine, _ = pair
    parts = (3, (4, 6, 8, "video"), 2, (1, 6, 4), 1, (3, 4, 4, "video"), 5)
    grids = [part[:3] for part in parts if not isinstance(part, int)]
    ids = chat_ids(*parts)
    prompt = Prompt.from_tokens(ids, patches_of(grids), grids, seconds, config=engine.config)
    expected = video_positions(prompt.token_ids, grids, seconds, engine.config)
    assert torch.equal(prompt.positions, expected)
    engine.prefill(prompt)


def test_video_frames_attend_inside_themselves(pair):
    """The encoder treats every pair of frames as an image of its own, as transformers does."""
    engine, hf = pair
    grid = (3, 6, 10)
    patches = patches_of([grid])
    theirs = hf.model.visual(patches, grid_thw=torch.tensor([grid])).pooler_output.detach()
    with torch.no_grad():
        ours, _ = engine.vision(patches, [grid])
        alone = torch.cat([engine.vision(part, [(1, 6, 10)])[0] for part in patches.split(60)])
    close(ours, theirs)
    close(ours, alone)
