"""Video: frames, pixels, positions and logits against transformers; pruning; what users meet."""

import ast
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from nanoglimpse import NanoglimpseError, Prompt, UsageError, Video
from nanoglimpse.cli import ask as generate
from nanoglimpse.cli import options as cli_options
from nanoglimpse.cli.overlay import draw_overlay, save_overlay
from nanoglimpse.config import PixelConfig
from nanoglimpse.inputs.images import preprocess_image
from nanoglimpse.inputs.prompt import PackedBatch
from nanoglimpse.inputs.video import _limits, preprocess_video
from nanoglimpse.methods import METHODS
from nanoglimpse.methods.context import SelectionRule
from tests.helpers import reference
from tests.helpers.commands import exit_code
from tests.helpers.tiny import IMAGE, VIDEO, chat_ids, patches_of

SMALL = {"min_pixels": 3136, "max_pixels": 56 * 84}


def pictures(count, size=(84, 56)):
    """Frames that differ, of few colours so that a palette holds them."""
    frames = []
    for number in range(count):
        frame = Image.new("RGB", size, (10, 40, 90))
        draw = ImageDraw.Draw(frame)
        draw.rectangle((7 * number, 5, 7 * number + 20, 30), fill=(200, 30 * (number % 8), 60))
        draw.text((40, 30), str(number), fill=(255, 255, 255))
        frames.append(frame)
    return frames


def animation(path, frames, durations):
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **lossless)
    return path


def folder(path, frames):
    path.mkdir()
    for number, frame in enumerate(frames):
        frame.save(path / f"frame{number + 5}.png")
    (path / "notes.txt").write_text("no frame")
    (path / ".hidden.png").write_bytes(b"no frame")
    return path


@pytest.fixture(scope="module")
def hf():
    """transformers' own code of its video processor, which wants torchvision to be imported."""
    path = Path(transformers.__path__[0]) / "models/qwen2_vl/video_processing_qwen2_vl.py"
    wanted, names = {"sample_frames", "patchify"}, {"math": math, "torch": torch}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in wanted:
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
            code = ast.Module([node], [])
            exec(compile(code, str(path), "exec"), names)
    return SimpleNamespace(**{name: names[name] for name in wanted})


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 10, 37, 600])
@pytest.mark.parametrize(
    ("rate", "fps", "most"), [(10, 5, 768), (25, 2, 768), (8, 30, 7), (4, 4, 16)]
)
def test_frames_are_sampled_as_in_transformers(hf, total, rate, fps, most):
    chosen = Video("", fps=fps, max_frames=most)._sample([1000 // rate] * total)
    if total == 1:
        assert chosen == [0]
        return
    defaults = SimpleNamespace(
        num_frames=None, fps=2, temporal_patch_size=2, min_frames=4, max_frames=768
    )
    metadata = SimpleNamespace(total_num_frames=total, fps=rate)
    assert chosen == hf.sample_frames(defaults, metadata, max_frames=most, fps=fps).tolist()


def test_frames_are_those_on_display():
    """Durations that differ: at 0, 250, 500 and 750 ms of 300, 100, 100 and 500 ms."""
    assert Video("", fps=4)._sample([300, 100, 100, 500]) == [0, 0, 3, 3]


def test_pixels_are_those_of_transformers(hf):
    """Frames resized by Pillow one by one; pairs, order and values as its `patchify` makes them."""
    frames = pictures(4)
    patches, grid, seconds = preprocess_video(Video(frames, fps=4), 3136, 56 * 84, PixelConfig())
    resized = [preprocess_image(frame, 3136, 56 * 84)[0].view(-1, 3, 2, 196) for frame in frames]
    assert (grid, seconds) == ((2, 4, 6), 0.5)
    ours = patches.view(2, 24, 3, 2, 196)
    for number, own in enumerate(resized):
        assert torch.equal(ours[number // 2, :, :, number % 2], own[:, :, 0])
    config = PixelConfig()
    pixels = torch.stack(
        [
            torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8)
            .view(56, 84, 3)
            .permute(2, 0, 1)
            for frame in frames
        ]
    )
    mean, std = (torch.tensor(c)[:, None, None] for c in (config.image_mean, config.image_std))
    theirs, *hf_grid = hf.patchify(None, ((pixels.float() / 255 - mean) / std)[None], 14, 2, 2)
    assert tuple(hf_grid) == grid
    assert torch.equal(patches, theirs[0])


def test_an_odd_number_of_frames_repeats_the_last(hf):
    frames = pictures(3)
    odd = preprocess_video(Video(frames), None, None, PixelConfig())
    even = preprocess_video(Video([*frames, frames[2]]), None, None, PixelConfig())
    assert odd[1][0] == 2
    assert torch.equal(odd[0], even[0])
    assert odd[1:] == even[1:]


def test_too_thin_a_video_says_so(tmp_path):
    path = animation(tmp_path / "thin.gif", pictures(4, (3, 900)), 100)
    with pytest.raises(UsageError, match=r"^a picture of 3 × 900 px is too thin"):
        preprocess_video(Video(path), None, None, PixelConfig())


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_sources_give_the_same_frames(suffix, tmp_path):
    """An animation sampled at its own rate, a folder in the order of numbers, a list."""
    frames = pictures(8)
    moving = Video(str(animation(tmp_path / f"clip{suffix}", frames, 250)), fps=4)
    still = Video(folder(tmp_path / "frames", frames), fps=4)
    expected = [frame.tobytes() for frame in frames]
    for video in (moving, still, Video(frames, fps=4)):
        found, rate = video.frames()
        assert [frame.tobytes() for frame in found] == expected
        assert rate == 4
        video.check()


def test_durations_of_an_animation_count(tmp_path):
    """What is shown at 0, 750, 1500 and 2250 ms: the first frame lasts a second."""
    frames = pictures(5)
    path = animation(tmp_path / "clip.webp", frames, [1000, 500, 500, 500, 500])
    found, rate = Video(path).frames()
    order = [frames.index(frame) for frame in found]
    assert (order, rate) == ([0, 0, 2, 3], 4 / 3)


def test_frames_may_be_fewer():
    """Evenly spread; the rate falls with them."""
    frames = pictures(10)
    found, rate = Video(frames, fps=2, max_frames=5).frames()
    assert [frames.index(frame) for frame in found] == [0, 2, 5, 7]
    assert rate == 0.8


def test_frame_areas_are_those_of_qwen_vl_utils():
    """128 to 768 tokens a frame, and no more than 115,200 in a clip, two frames deep."""
    unit, pixels = 28, PixelConfig()
    area = unit * unit
    assert _limits(8, unit, None, None, pixels) == (128 * area, 768 * area)
    assert _limits(768, unit, None, None, pixels) == (128 * area, 300 * area)
    assert _limits(4000, unit, None, None, pixels) == (128 * area, int(1.05 * 128 * area))
    assert _limits(8, unit, None, 50176, pixels) == (50176, 50176)
    assert _limits(8, unit, 3136, 50176, pixels) == (3136, 50176)
    with pytest.raises(UsageError, match=r"min_pixels must be in \[1, max_pixels 50176\]"):
        preprocess_video(Video(pictures(2)), 60000, 50176, pixels)


@pytest.mark.slow
def test_a_long_clip_has_small_frames(monkeypatch):
    frames = pictures(8, (560, 560))
    assert preprocess_video(Video(frames), None, None, PixelConfig())[1] == (4, 40, 40)
    monkeypatch.setattr("nanoglimpse.inputs.video.ALL_TOKENS", 4 * 225)
    assert preprocess_video(Video(frames), None, None, PixelConfig())[1] == (4, 30, 30)


def broken(tmp_path):
    path = animation(tmp_path / "broken.gif", pictures(4), 100)
    path.write_bytes(path.read_bytes()[:-400])
    return path


def named(tmp_path, name, data=b"\0\0\0 ftypisom"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


BAD = {
    "missing": (lambda t: t / "none.gif", UsageError, "there is no video"),
    "mp4": (lambda t: named(t, "a.mp4"), UsageError, r"ffmpeg -i a.mp4 -vf fps=2 frames/%05d.png"),
    "empty folder": (empty, UsageError, "contains no pictures"),
    "no frames": (lambda t: [], UsageError, "at least one frame"),
    "sizes": (
        lambda t: [*pictures(2), *pictures(1, (60, 60))],
        UsageError,
        "must have one size; a list of frames",
    ),
    "damaged": (broken, NanoglimpseError, "damaged"),
    "missing frame": (lambda t: [t / "none.png"], UsageError, "there is no picture"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_videos_give_one_clear_line(kind, tmp_path):
    make, error, words = BAD[kind]
    with pytest.raises(error, match=words) as raised:
        preprocess_video(Video(make(tmp_path)), None, None, PixelConfig())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": float("inf")}, {"max_frames": 1}], ids=str)
def test_videos_refuse_nonsense(options):
    with pytest.raises(UsageError):
        Video([], **options)


# --- prompts, positions, logits -------------------------------------------------------------------

CLIP, STILL = (3, 6, 8, "video"), (1, 10, 4)
ORDERS = {
    "video": (3, CLIP, 5),
    "image, video": (2, STILL, 1, CLIP, 6),
    "video, image": (CLIP, 2, STILL, 4),
    "videos around an image": (1, (2, 4, 4, "video"), 1, STILL, 1, CLIP, 3),
}


def prompt_of(engine, parts, seconds=0.25, seed=0):
    grids = [part[:3] for part in parts if not isinstance(part, int)]
    ids = chat_ids(*parts, seed=seed)
    return Prompt.from_tokens(ids, patches_of(grids, seed), grids, seconds, config=engine.config)


def hf_inputs(prompt, seconds):
    """The two modalities apart, as transformers takes them."""
    kinds = prompt.token_ids[prompt.visual].tolist()
    first, images, videos = 0, [], []
    for grid in prompt.grids:
        count = math.prod(grid)
        (images if kinds[first // 4] == IMAGE else videos).append(
            (grid, slice(first, first + count))
        )
        first += count
    ids = prompt.token_ids[None]
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    for found, pixels, grids in (
        (images, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if found:
            inputs[pixels] = torch.cat([prompt.patches[own] for _, own in found])
            inputs[grids] = torch.tensor([grid for grid, _ in found])
    inputs["second_per_grid_ts"] = torch.tensor([seconds] * len(videos))
    return inputs


@pytest.fixture(scope="module")
def hf_tiny(tiny_folder):
    return reference.hf_model(tiny_folder)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.25, 0.5, 2.0])
@pytest.mark.parametrize("parts", ORDERS.values(), ids=ORDERS)
def test_positions_and_logits_are_those_of_transformers(tiny, hf_tiny, parts, seconds):
    """Where a clip is longer than wide, 5.x lets the text behind it go back in time; 4.51 did not,
    and the models were trained with that: then the positions are ours."""
    prompt = prompt_of(tiny, parts, seconds)
    inputs = hf_inputs(prompt, seconds)
    index = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
    positions, _ = hf_tiny.model.get_rope_index(**index)
    if seconds <= 0.5:
        assert torch.equal(prompt.positions, positions[:, 0])
    else:
        until = int((prompt.token_ids == VIDEO).nonzero()[0]) + 1
        assert torch.equal(prompt.positions[:, :until], positions[:, 0, :until])
        clip = prompt.positions[:, prompt.token_ids == VIDEO]
        assert int(clip[0].max() - clip[0].min()) >= 8
        assert int(prompt.positions[0, -1]) > int(positions[0, 0, -1])
    with torch.no_grad():
        out = hf_tiny(**inputs, position_ids=prompt.positions[:, None])
    prefill = tiny.prefill(prompt, "dense")
    scale = out.logits.abs().max()
    torch.testing.assert_close(prefill.logits / scale, out.logits[0, -1] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", ["image", "video"])
def test_prompts_of_pictures_and_videos_in_both_orders(nano, first):
    frames, processor, config = pictures(6), nano.processor, nano.config
    visuals = {"image": frames[0], "video": Video(frames, fps=3)}
    other = "video" if first == "image" else "image"
    prompt = nano.prompt([visuals[first], visuals[other]], "What moves?", **SMALL)
    assert prompt.grids == tuple(
        {"image": (1, 4, 6), "video": (3, 4, 6)}[k] for k in (first, other)
    )
    start, end = config.vision_start_token_id, config.vision_end_token_id
    places = {"image": [config.image_token_id] * 6, "video": [config.video_token_id] * 18}
    turn = [start, *places[first], end, start, *places[other], end, "What moves?"]
    assert prompt.token_ids.tolist() == processor.encode(processor.chat(turn))
    clip = prompt.positions[:, prompt.token_ids == config.video_token_id]
    per_second = config.vision_config.tokens_per_second
    times = [int(i * 2 / 3 * per_second) for i in range(3)]
    assert clip[0].unique().tolist() == [int(clip[0].min()) + time for time in times]
    among = nano.prompt([], ["Look: ", visuals["video"], " What moves?"], **SMALL)
    assert among.grids == ((3, 4, 6),)


# --- pruning --------------------------------------------------------------------------------------


def test_the_predictor_sees_each_pair_of_frames_as_an_image(tiny):
    prefill = tiny.prefill(prompt_of(tiny, (3, (3, 8, 10, "video"), 5)))
    predictor = tiny.glimpse.predictor
    with torch.inference_mode():
        alone = [
            predictor(
                prefill.glimpse_logits[own],
                predictor.condition(prefill.taps[:, own]),
                [(1, 8, 10)],
                [20],
            )
            for own in (slice(0, 20), slice(20, 40), slice(40, 60))
        ]
    torch.testing.assert_close(prefill.importance, torch.cat(alone), rtol=0, atol=1e-5)


def best(importance, count):
    order = sorted(range(len(importance)), key=lambda i: -float(importance[i]))
    return sorted(order[:count])


@pytest.mark.parametrize("order", [0, 1], ids=["image first", "video first"])
def test_the_rule_holds_for_each_clip_and_for_the_pictures(tiny, order):
    """Cap and minimum: over all pairs of frames of a clip, and over all pictures of a prompt."""
    parts = [((1, 12, 8), (1, 4, 4)), ((3, 8, 10, "video"),)]
    parts = parts[::-1] if order else parts
    prompt = prompt_of(tiny, (4, *parts[0], 3, *parts[1], 6))
    counts = [60, 28] if order else [28, 60]
    capped = tiny.prefill(prompt, max_ratio=0.1, threshold=0.0)
    fewest = tiny.prefill(prompt, threshold=1.0, min_tokens=3)
    none = tiny.prefill(prompt, threshold=1.0, min_tokens=0)
    assert not bool(none.kept.any())
    for prefill, counted in ((capped, [int(0.1 * n) for n in counts]), (fewest, [3, 3])):
        groups = zip(
            prefill.kept.split(counts), prefill.importance.split(counts), counted, strict=True
        )
        for kept, importance, count in groups:
            assert kept.nonzero().flatten().tolist() == best(importance, count)


# Three pairs of frames of 2 × 2, in probabilities.
CLIP_OF = [0.9, 0.1, 0.6, 0.4, 0.8, 0.55, 0.7, 0.2, 0.3, 0.2, 0.1, 0.05]
CROWDED = [0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.1, 0.1, 0.55, 0.1, 0.1, 0.1]
FRAME_CAPS = [
    ("without a cap", CLIP_OF, {}, [0, 2, 4, 5, 6]),
    ("half of each", CLIP_OF, {"max_frame_ratio": 0.5}, [0, 2, 4, 6]),
    ("rounded down", CLIP_OF, {"max_frame_ratio": 0.49}, [0, 4]),
    ("all of each", CLIP_OF, {"max_frame_ratio": 1}, [0, 2, 4, 5, 6]),
    ("of equals the first", [0.7] * 12, {"max_frame_ratio": 0.5}, [0, 1, 4, 5, 8, 9]),
    ("then of the clip", CLIP_OF, {"max_frame_ratio": 0.5, "max_ratio": 0.25}, [0, 4, 6]),
    ("not before", CROWDED, {"max_frame_ratio": 0.25, "max_ratio": 0.17}, [0, 4]),
    ("a clip below its own", CLIP_OF, {"max_frame_ratio": 0.25, "max_ratio": 0.4}, [0, 4]),
    (
        "the minimum first of what each may keep",
        CLIP_OF,
        {"max_frame_ratio": 0.25, "threshold": 0.85, "min_tokens": 3},
        [0, 4, 8],
    ),
    (
        "then beyond",
        CLIP_OF,
        {"max_frame_ratio": 0.25, "max_ratio": 0.1, "min_tokens": 5},
        [0, 2, 4, 6, 8],
    ),
    ("nothing of each, minimum one", CLIP_OF, {"max_frame_ratio": 0.2}, [0]),
    ("nothing of each, no minimum", CLIP_OF, {"max_frame_ratio": 0.2, "min_tokens": 0}, []),
    ("anchors whatever", CLIP_OF, {"max_frame_ratio": 0.25, "anchors": ("br",)}, [0, 3, 4, 7, 11]),
]


@pytest.mark.parametrize(
    ("probabilities", "rule", "expected"),
    [c[1:] for c in FRAME_CAPS],
    ids=[c[0] for c in FRAME_CAPS],
)
def test_each_pair_of_frames_may_be_capped(probabilities, rule, expected):
    importance = torch.tensor(probabilities, dtype=torch.float64).logit().float()
    rule, sizes = SelectionRule(**rule), [(2, 2)] * 3
    assert rule(importance, sizes, clip=True).nonzero().flatten().tolist() == expected
    pictures = replace(rule, max_frame_ratio=None)
    assert torch.equal(rule(importance, sizes), pictures(importance, sizes, clip=True))


def test_the_cap_of_frames_holds_for_clips_alone(tiny):
    """Beside pictures, which it leaves to `max_ratio`; with that one and a minimum as well."""
    prompt = prompt_of(tiny, (4, (1, 12, 8), 1, (1, 4, 4), 2, (3, 8, 10, "video"), 6))
    counts = [28, 20, 20, 20]
    free, framed, both, fewest = (
        tiny.prefill(prompt, threshold=threshold, **rule)
        for threshold, rule in (
            (0.0, {}),
            (0.0, {"max_frame_ratio": 0.3}),
            (0.0, {"max_frame_ratio": 0.3, "max_ratio": 0.2}),
            (1.0, {"max_frame_ratio": 0.3, "min_tokens": 20}),
        )
    )
    assert bool(free.kept.all())
    stills, *frames = framed.kept.split(counts)
    assert bool(stills.all())
    importance = framed.importance.split(counts)[1:]
    allowed = [best(own, 6) for own in importance]
    assert [kept.nonzero().flatten().tolist() for kept in frames] == allowed
    ranked = sorted((-float(importance[f][i]), f, i) for f in range(3) for i in allowed[f])
    for prefill, count in ((both, 12), (fewest, 18)):
        expected = {20 * f + i for _, f, i in ranked[:count]}
        assert expected <= set(prefill.kept[28:].nonzero().flatten().tolist())
    assert [int(part.sum()) for part in both.kept.split([28, 60])] == [5, 12]
    assert [int(part.sum()) for part in fewest.kept.split([28, 60])] == [20, 20]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [{}, {"max_ratio": 0.25}, {"max_ratio": 0.1, "min_tokens": 9}])
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].pooled])
def test_capped_frames_are_the_same_in_a_batch_and_in_a_session(tiny, name, rule):
    rule = {"max_ratio": 1, "max_frame_ratio": 0.35, **rule}
    if METHODS[name].budget == "fixed":
        del rule["max_ratio"]  # which is refused
    prompts = [prompt_of(tiny, (*parts, 4), seed=seed) for seed, parts in enumerate(MIXED)]
    masks = [torch.arange(int(prompt.visual.sum())) % 3 == 0 for prompt in prompts]
    together = tiny.prefill_many(prompts, name, evidence=masks, **rule)
    parts = together.kept.split(together.batch.visual_counts)
    for number, (prompt, mask) in enumerate(zip(prompts, masks, strict=True)):
        alone = tiny.prefill(prompt, name, evidence=[mask], **rule)
        assert torch.equal(parts[number], alone.kept)
        end = int(prompt.visual.nonzero().max()) + 2 if len(mask) else 2
        start = cut(prompt, end, tiny)
        session = tiny.session(start, name, **rule)
        asked = session.prefill(prompt.token_ids[end:].tolist(), evidence=mask)
        assert torch.equal(asked.kept, alone.kept)
    clip = parts[3].view(3, 12).sum(1)
    assert int(clip.max()) <= max(int(0.35 * 12), rule.get("min_tokens", 0))
    assert 0 < int(clip.sum()) < 36


def cut(prompt, end, engine):
    """What a session reads of a prompt."""
    ids = prompt.token_ids[:end].tolist()
    return Prompt.from_tokens(ids, prompt.patches, prompt.grids, 0.25, config=engine.config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_frame_ratio": 1.5}, r"max_frame_ratio must be in \[0, 1\], got 1.5"),
        ({"max_frame_ratio": -0.1}, r"max_frame_ratio must be in \[0, 1\], got -0.1"),
        (
            {"max_frame_ratio": 0.2, "max_ratio": 0.2, "method": "divprune"},
            "method divprune does not choose once.*one of glimpse, random",
        ),
        ({"max_frame_ratio": 0.2, "method": "dense"}, "method dense does not choose"),
        (
            {"anchors": ["br"], "max_ratio": 0.2, "method": "pdrop"},
            "method pdrop does not choose once.*so that anchors would",
        ),
        (
            {"max_frame_ratio": 0.2, "kv_drop": "later"},
            "0.2 cannot be reached; give a larger max_ratio",
        ),
    ],
    ids=str,
)
def test_a_part_of_the_rule_that_makes_no_sense_is_refused(tiny, options, words):
    prompt = prompt_of(tiny, (2, CLIP, 3))
    with pytest.raises(UsageError, match=words) as raised:
        tiny.prefill(prompt, **options)
    assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match=words):
        tiny.session(cut(prompt, 40, tiny), **options)


def test_a_cap_of_frames_counts_what_the_cache_holds(tiny):
    """Where layers below K keep everything, 4 of 6, the mean over layers is the cap."""
    prompt = prompt_of(tiny, (2, (3, 8, 10, "video"), 3))
    prefill = tiny.prefill(prompt, threshold=0.0, max_frame_ratio=0.75, kv_drop="later")
    assert [int(part.sum()) for part in prefill.kept.split(20)] == [5, 5, 5]
    assert prefill.budgets.decode_kv_ratio == pytest.approx(0.75)


def test_anchors_are_corners_of_every_pair_of_frames(tiny):
    prompt = prompt_of(tiny, (2, (2, 4, 6, "video"), 3))
    prefill = tiny.prefill(prompt, threshold=1.0, min_tokens=0, anchors=["tl", "br"])
    assert prefill.kept.nonzero().flatten().tolist() == [0, 5, 6, 11]


def test_methods_by_image_take_pairs_of_frames_for_images(tiny):
    kept = tiny.prefill(
        prompt_of(tiny, (2, (3, 8, 10, "video"), 3)), "divprune", max_ratio=0.25
    ).kept
    assert [int(part.sum()) for part in kept.split(20)] == [5, 5, 5]


MIXED = ((4, CLIP, 1, STILL, 5), (7,), (2, STILL, (2, 4, 4, "video"), 1, STILL, 3), (1, CLIP))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_with_videos_is_each_prompt_alone(tiny, name):
    prompts = [prompt_of(tiny, parts, seed=seed) for seed, parts in enumerate(MIXED)]
    masks = [torch.arange(int(prompt.visual.sum())) % 3 == 0 for prompt in prompts]
    cap = {} if METHODS[name].budget == "fixed" else {"max_ratio": 0.3}
    together = tiny.prefill_many(prompts, name, evidence=masks, **cap)
    alone = [
        tiny.prefill(prompt, name, evidence=[mask], **cap)
        for prompt, mask in zip(prompts, masks, strict=True)
    ]
    assert torch.equal(together.kept, torch.cat([one.kept for one in alone]))
    if name != "dense":
        assert int(together.kept.sum()) < len(together.kept)
    tokens = zip(*tiny.decode_many(together, 6, ignore_eos=True), strict=True)
    for answer, one in zip(tokens, alone, strict=True):
        assert list(answer) == list(tiny.decode(one, 6, ignore_eos=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_videos_may_be_left_whole_by_every_method(tiny, name):
    prompt = prompt_of(tiny, (2, STILL, 1, CLIP, 1, STILL, 3))
    video = prompt.token_ids[prompt.visual] == VIDEO
    mask = [torch.zeros(len(video), dtype=torch.bool)]
    cap = {} if METHODS[name].budget == "fixed" else {"max_ratio": 0.3}
    prefill = tiny.prefill(prompt, name, prune_videos=False, evidence=mask, **cap)
    assert bool(prefill.kept[video].all())
    if name not in ("dense", "evs"):
        assert not bool(prefill.kept[~video].all())


def test_a_video_left_whole_is_not_looked_at(tiny, monkeypatch):
    """Methods that merge must not touch the tokens of a video that stays."""
    sizes = []

    def watched(x, count):
        sizes.append(len(x))
        return torch.arange(count)

    monkeypatch.setattr("nanoglimpse.methods.divprune.diverse", watched)
    prompt = prompt_of(tiny, (2, STILL, 1, CLIP, 1, STILL, 3))
    tiny.prefill(prompt, "divprune", max_ratio=0.3, prune_videos=False)
    assert sizes == [10, 10]
    tiny.prefill(prompt, "divprune", max_ratio=0.3)
    assert sizes[2:] == [10, 12, 12, 12, 10]


def test_pools_of_a_batch_have_numbers_of_their_own(tiny):
    prompts = [prompt_of(tiny, parts) for parts in MIXED]
    batch = PackedBatch.pack(prompts, tiny.config, tiny.device)
    runs = [36, 10, 10, 8, 10, 36]
    assert [int(part.unique()) for part in batch.pools.split(runs)] == [0, 1, 2, 3, 2, 4]
    sizes = {0: [(3, 4)] * 3, 1: [(5, 2)], 2: [(5, 2)] * 2, 3: [(2, 2)] * 2, 4: [(3, 4)] * 3}
    assert dict(enumerate(batch.pool_sizes)) == sizes


# --- what users meet ------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path):
    return str(animation(tmp_path / "clip.webp", pictures(6), 500))


def call(*arguments, capsys):
    code = exit_code(generate.main, arguments)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.slow
def test_the_command_line_takes_videos(clip, tmp_path, capsys, monkeypatch, nano):
    monkeypatch.setattr(cli_options, "load", lambda *_, **__: nano)
    image = tmp_path / "image.png"
    pictures(1)[0].save(image)
    common = ("What?", "--json", "--max-new-tokens", 3, "--max-pixels", 56 * 84)
    first = call(*common, "--video", clip, "--image", image, capsys=capsys)
    assert first[0] == 0
    data = json.loads(first[1])
    assert data["images"] == [clip, str(image)]
    assert data["grids"] == [[3, 4, 6], [1, 4, 6]]
    other = call(
        *common,
        "--image",
        image,
        "--video",
        clip,
        "--max-frames",
        4,
        "--keep-videos",
        capsys=capsys,
    )
    data = json.loads(other[1])
    assert data["grids"] == [[1, 4, 6], [2, 4, 6]]
    assert set(range(6, 18)) <= set(data["kept"])
    options = ("--threshold", 0, "--max-frame-ratio", 0.4)
    data = json.loads(call(*common, "--video", clip, *options, capsys=capsys)[1])
    assert [sum(6 * f <= i < 6 * f + 6 for i in data["kept"]) for f in range(3)] == [2, 2, 2]
    fewer = call(*common, "--video", clip, "--fps", 1.4, capsys=capsys)
    assert json.loads(fewer[1])["grids"] == [[2, 4, 6]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--video", "none.gif"], "there is no video"),
        (["--video", "film.mp4"], "ffmpeg"),
        (["--video", "clip.webp", "--fps", "0"], "--fps: must be in (0, 1000], got '0'"),
        (
            ["--video", "clip.webp", "--max-frames", "1"],
            "--max-frames: must be a whole number of at least 2",
        ),
        (
            ["--video", "clip.webp", "--method", "nothing", "--max-frame-ratio", "0.1"],
            "method nothing does not choose",
        ),
    ],
    ids=str,
)
def test_errors_come_before_any_work(clip, options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_options, "load", None)
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0 ftypisom")
    code, _, err = call("What?", *options, capsys=capsys)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_file_of_questions_may_name_videos(clip, tmp_path, capsys, monkeypatch, nano):
    monkeypatch.setattr(cli_options, "load", lambda *_, **__: nano)
    pictures(1)[0].save(tmp_path / "image.png")
    rows = [
        {"video": "clip.webp", "question": "What?"},
        {"image": "image.png", "video": ["clip.webp"], "question": "What?"},
        {"video": "none.webp", "question": "What?"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--max-new-tokens", 3, "--max-pixels", 56 * 84, "--max-frames", 4)
    code, out, _ = call("--batch-file", file, *options, capsys=capsys)
    assert code == 1
    lines = {line["index"]: line for line in map(json.loads, out.splitlines())}
    assert lines[0]["grids"] == [[2, 4, 6]]
    assert lines[1]["grids"] == [[1, 4, 6], [2, 4, 6]]
    assert lines[1]["images"] == ["image.png", "clip.webp"]
    assert "there is no video" in lines[2]["error"]
    assert call("--batch-file", file, "--fps", 0, "--quiet", capsys=capsys)[0] == 2
    one = nano.ask(Video(clip, max_frames=4), "What?", max_new_tokens=3, prompt_options=SMALL)
    assert lines[0]["tokens"] == one.token_ids
    options = (*options, "--threshold", 0, "--max-frame-ratio", 0.2)
    _, out, _ = call("--batch-file", file, *options, capsys=capsys)
    lines = {line["index"]: line for line in map(json.loads, out.splitlines())}
    assert lines[0]["settings"]["max_frame_ratio"] == 0.2
    rule = {"threshold": 0.0, "max_frame_ratio": 0.2}
    given = {"max_new_tokens": 3, "prompt_options": SMALL}
    one = nano.ask(Video(clip, max_frames=4), "What?", **rule, **given)
    assert (lines[0]["tokens"], lines[0]["kept_tokens"]) == (one.token_ids, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["glimpse", "dense"])
def test_the_overlay_of_a_clip(nano, tmp_path, method):
    """A sheet with every pair of frames, and an animation that shows each as long as it lasts."""
    visuals = [pictures(1)[0], Video(pictures(5), fps=4)]
    answer = nano.ask(visuals, "What?", method=method, max_new_tokens=3, prompt_options=SMALL)
    sheet = draw_overlay(visuals, "What?", answer, nano.config)
    alone = nano.ask(visuals[:1], "What?", method=method, max_new_tokens=3, prompt_options=SMALL)
    assert sheet.height > draw_overlay(visuals[:1], "What?", alone, nano.config).height + 300
    for suffix in (".gif", ".webp"):
        path = tmp_path / f"overlay{suffix}"
        save_overlay(path, visuals, "What?", answer, nano.config)
        with Image.open(path) as moving:
            assert moving.n_frames == 4
            durations = []
            for number in range(4):
                moving.seek(number)
                moving.load()
                durations.append(moving.info["duration"])
        assert durations == [2000, 500, 500, 500]
    text = nano.ask([], "What?", max_new_tokens=3)
    save_overlay(tmp_path / "text.gif", [], "What?", text, nano.config)
