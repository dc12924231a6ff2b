"""Targets of a fuzzer: mutated pictures, videos, names, arrays and messages, one call each.

A target gets a generator and an empty folder, writes one input, and returns the call to try. The
call ends in a value or in a NanoglimpseError; anything else is a fault.
"""

import base64
import io
import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from nanoglimpse import Video
from nanoglimpse.pictures.messages import is_messages, read_messages
from nanoglimpse.pictures.picture import load_picture, sources

# Two tags: ImageWidth as text, and Orientation 6.
EXIF = (
    b"Exif\0\0II*\0\x08\0\0\0\x02\0"
    + struct.pack("<HHI4sHHIHH", 0x0100, 2, 4, b"abc\0", 0x0112, 3, 1, 6, 0)
    + bytes(4)
)
Target = Callable[[random.Random, Path], Callable[[], object]]


@cache
def seeds() -> dict[str, list[bytes]]:
    """Small valid files of every format, and of formats that are not read, by their suffix."""
    grey = Image.effect_noise((24, 18), 90)
    rgb = Image.merge("RGB", [grey, grey.rotate(90), grey.rotate(180)])
    rgba = rgb.copy()
    rgba.putalpha(grey)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("key", "value " * 20, zip=True)
    more = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(45)]}
    options: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "png": [
            (rgb, {"pnginfo": text, "exif": EXIF}),
            (rgba, {"save_all": True, "append_images": [rgba.rotate(90)], "duration": 90}),
            (grey.convert("I;16"), {}),
            (rgb.quantize(16), {"transparency": 3}),
            (grey.convert("1"), {}),
        ],
        "jpg": [
            (rgb, {"exif": EXIF}),
            (rgb.convert("CMYK"), {}),
            (rgb, {"progressive": True, "comment": b"words"}),
        ],
        "mpo": [(rgb, more)],
        "webp": [
            (rgba, {"lossless": True}),
            (rgb, {"exif": EXIF}),
            (rgb, {**more, "duration": 80}),
        ],
        "gif": [(rgb.quantize(32), more), (grey, {"comment": b"words"})],
        "avif": [(rgb, {"speed": 10}), (rgba, {"speed": 10})],
        "bmp": [(rgb, {}), (grey, {}), (grey.convert("1"), {})],
        "tif": [
            (rgb, {"compression": kind})
            for kind in (
                "raw",
                "tiff_lzw",
                "tiff_adobe_deflate",
                "jpeg",
                "packbits",
                "lzma",
                "zstd",
            )
        ]
        + [(grey.convert("1"), {"compression": "group4"}), (grey.convert("F"), {}), (rgb, more)],
        "ppm": [(rgb, {}), (grey.convert("I"), {})],
        "pdf": [(rgb, {})],
        "jp2": [(rgb, {})],
        "dds": [(rgb, {})],
        "tga": [(rgb, {"compression": "tga_rle"})],
        "ico": [(rgb, {})],
        "eps": [(rgb, {})],
    }
    formats = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000", "mpo": "MPO", "ppm": "PPM"}
    made: dict[str, list[bytes]] = {}
    for suffix, pairs in options.items():
        for image, given in pairs:
            data = io.BytesIO()
            others = [other.copy() for other in given.get("append_images", ())]
            try:
                own = {**given, "append_images": others} if others else given
                image.copy().save(data, formats.get(suffix, suffix.upper()), **own)
            except (OSError, KeyError, ValueError):  # this Pillow cannot write it
                continue
            made.setdefault(suffix, []).append(data.getvalue())
    made["txt"] = [b"hello", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"]
    made["ppm"].append(b"P3\n2 2\n255\n1 2 3 4 5 6 7 8 9 10 11 12\n")
    return made


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut, repeated, moved, or replaced by values that decoders trip over."""
    out = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8, 30))):
        at = rng.randrange(len(out)) if out else 0
        if rng.random() < 0.5:
            at = min(at, rng.randrange(64))
        kind, size = rng.randrange(7), rng.choice((1, 2, 4, 8))
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            odd = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 13000))
            order = rng.choice(("big", "little"))
            out[at : at + size] = (odd & (256**size - 1)).to_bytes(size, order)
        elif kind == 2:
            del out[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randrange(1, 60)] * rng.randrange(1, 4)
        elif kind == 4 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 5:
            del out[max(at, 12) :]
        else:
            out[at : at + size] = rng.randbytes(size)
    return bytes(out)


def _file(rng: random.Random, folder: Path, kinds: list[str]) -> Path:
    kind = rng.choice(kinds)
    path = folder / f"x.{rng.choice([kind, kind, 'png'])}"
    path.write_bytes(mutated(rng.choice(seeds()[kind]), rng))
    return path


def still(rng: random.Random, folder: Path) -> Callable[[], object]:
    """A picture's file, its bytes, or an open file of it."""
    path = _file(rng, folder, list(seeds()))
    form: Callable[[], Any] = rng.choice(
        (lambda: path, lambda: str(path), path.read_bytes, lambda: io.BytesIO(path.read_bytes()))
    )
    return lambda: load_picture(form())


def animation(rng: random.Random, folder: Path) -> Callable[[], object]:
    """An animation, or what pretends to be one."""
    path = _file(rng, folder, ["gif", "webp", "png", "tif", "mpo", "avif", "txt"])
    rate, most = rng.choice((0.1, 2, 100)), rng.choice((2, 7, 768))

    def call() -> object:
        video = Video(path, rate, most)
        video.check()
        return video.frames(lambda frame, count: frame.resize((8, 8)))

    return call


def name(rng: random.Random, folder: Path) -> Callable[[], object]:
    """A text that should name a picture: paths, file URLs and data URIs."""
    path = _file(rng, folder, ["png", "jpg"])
    encoded = base64.b64encode(path.read_bytes()).decode()
    text = rng.choice(
        (
            str(path),
            path.as_uri(),
            f"data:image/png;base64,{encoded}",
            f"data:image/png,{path.read_bytes().hex()}",
            "http://[::1",
            "~nobody/x.png",
            "\0",
            "x" * 5000,
            "a\ud800",
            "file://host/x",
        )
    )
    letters = list(text)
    for _ in range(rng.choice((0, 0, 1, 4))):
        letters[rng.randrange(len(letters))] = rng.choice("\0\x1b~:/%=,;é\udc80\u202e")
    text = "".join(letters)
    if text[:7].lower() in ("http://", "https:/") and "[" not in text:
        text = "x" + text  # nothing is fetched
    return lambda: load_picture(text) if text != "-" else None


def array(rng: random.Random, folder: Path) -> Callable[[], object]:
    """A tensor or an array of any shape, type and values."""
    shape = [rng.choice((0, 1, 2, 3, 4, 9)) for _ in range(rng.randrange(5))]
    kinds = (torch.uint8, torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    scale = rng.choice((1, 255, 256, 1e30, -1, float("nan"), float("inf")))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * scale
    tensor = values.nan_to_num(7).clamp(-300, 300).to(rng.choice(kinds))
    tensor = tensor if rng.random() < 0.7 else values
    if rng.random() < 0.3 and tensor.dtype != torch.bfloat16:
        return lambda: load_picture(tensor.numpy())
    return lambda: load_picture(tensor)


def messages(rng: random.Random, folder: Path) -> Callable[[], object]:
    """A list of messages with parts, roles and values out of place."""
    path = _file(rng, folder, ["png", "gif"])
    odd = [None, 7, "", "text", str(path), path, {}, [], [7], {"url": str(path)}, b"x", 1.5]

    def part() -> Any:
        kind = rng.choice(("text", "image", "image_url", "video", "audio"))
        made = {"type": kind, kind: rng.choice(odd)}
        if rng.random() < 0.3:
            made[rng.choice(("min_pixels", "fps", "max_frames", "detail", "x"))] = rng.choice(odd)
        return rng.choice((made, made, made, rng.choice(odd)))

    roles = ("user", "assistant", "user", "system", "tool", None)
    given: list[Any] = []
    for number in range(rng.randrange(5)):
        role = ("user", "assistant")[number % 2] if rng.random() < 0.8 else rng.choice(roles)
        content = rng.choice(([part() for _ in range(rng.randrange(4))], "text", rng.choice(odd)))
        message: Any = {"role": role, "content": content}
        given.append(message if rng.random() < 0.95 else rng.choice(odd))
    return lambda: read_messages(given) if is_messages(given) else sources(given)


TARGETS: dict[str, Target] = {
    "still": still,
    "animation": animation,
    "name": name,
    "array": array,
    "messages": messages,
}
