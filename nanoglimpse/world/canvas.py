"""Drawing primitives that the domains share: textures, clutter and text, all in Pillow."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar, cast

from PIL import Image, ImageDraw, ImageFont, ImageOps

from nanoglimpse.world.types import Box

Colour = tuple[int, int, int]
Pixels = tuple[int, int, int, int]
Bounds = TypeVar("Bounds", Pixels, Box)

TEXTURES, SIDE = 64, 512
BLACK, WHITE = (16, 16, 18), (250, 250, 250)
RGB = {
    "red": (212, 34, 40),
    "green": (30, 145, 58),
    "blue": (34, 84, 214),
    "yellow": (248, 220, 40),
    "orange": (244, 132, 22),
    "purple": (138, 48, 172),
    "white": (246, 246, 246),
    "black": (20, 20, 22),
}
INK = {name: BLACK if name in ("yellow", "orange", "white") else WHITE for name in RGB}


@dataclass(frozen=True)
class Stamp:
    """Text as a mask without margins, with the mask's offset from the start of the baseline."""

    mask: Image.Image
    left: int
    top: int


@lru_cache(maxsize=4096)
def stamp(text: str, size: int, bold: bool = False) -> Stamp:
    """Renders text in Pillow's built-in font, which has no bold: bold text is drawn twice."""
    font = _font(size)
    box = font.getbbox(text, anchor="ls")
    x0, y0, x1, y1 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    shift = max(1, size // 18) if bold else 0
    mask = Image.new("L", (x1 - x0 + shift, y1 - y0))
    draw = ImageDraw.Draw(mask)
    for offset in range(0, shift + 1, max(shift, 1)):
        draw.text((offset - x0, -y0), text, 255, font, anchor="ls")
    ink = mask.getbbox() or (0, 0, *mask.size)
    return Stamp(mask.crop(ink), x0 + ink[0], y0 + ink[1])


@lru_cache(maxsize=128)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


def width_of(text: str, size: int, bold: bool = False) -> int:
    """The width of the text's ink in pixels."""
    return stamp(text, size, bold).mask.width


@lru_cache(maxsize=4096)
def edges(text: str) -> tuple[float, ...]:
    """The left edge of each character and the end of the last, as shares of the text's width."""
    whole = _font(32).getlength(text)
    return tuple(_font(32).getlength(text[:count]) / whole for count in range(len(text) + 1))


def write(
    image: Image.Image,
    place: tuple[float, float],
    text: str,
    size: int,
    ink: Colour,
    *,
    bold: bool = False,
    align: float = 0.0,
) -> Pixels:
    """Prints one line of text.

    Args:
        image: the image to print on.
        place: x of the point that `align` selects, and y of the baseline.
        text: the text.
        size: font size in pixels.
        ink: colour of the text.
        bold: whether to print bold.
        align: the point of the ink that lies at x: 0 its left edge, 0.5 its middle, 1 its right
            edge.

    Returns:
        The box of the ink.
    """
    printed = stamp(text, size, bold)
    x = round(place[0] - align * printed.mask.width)
    y = round(place[1]) + printed.top
    image.paste(ink, (x, y), printed.mask)
    return x, y, x + printed.mask.width, y + printed.mask.height


def bounding_box(boxes: Sequence[Bounds], pad: int = 0) -> Bounds:
    """The smallest box around all boxes, enlarged by `pad` on every side."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0) - pad, min(y0) - pad, max(x1) + pad, max(y1) + pad


def normalised(box: Pixels, canvas: tuple[int, int]) -> Box:
    """A box in pixels as shares of the canvas, clipped at its edges."""
    shares = [at / canvas[axis % 2] for axis, at in enumerate(box)]
    x0, y0, x1, y1 = (min(max(share, 0.0), 1.0) for share in shares)
    return x0, y0, x1, y1


def shade(rng: random.Random, level: int, chroma: int) -> Colour:
    """A random colour whose channels differ from a grey level by at most `chroma`."""
    return jitter(rng, (level, level, level), chroma)


def jitter(rng: random.Random, colour: Colour, by: int = 6) -> Colour:
    """A random colour whose channels differ from those of `colour` by at most `by`."""
    red, green, blue = (min(max(channel + rng.randint(-by, by), 0), 255) for channel in colour)
    return red, green, blue


def background(
    rng: random.Random, size: tuple[int, int], level: int, spread: int, chroma: int = 14
) -> Image.Image:
    """A textured area.

    Args:
        rng: chooses the texture, its crop and its tint.
        size: width and height.
        level: the middle grey level.
        spread: the distance of the darkest and the lightest grey from that level.
        chroma: the largest shift of a colour channel.
    """
    grey = _texture(rng.randrange(TEXTURES))
    if rng.random() < 0.5:
        grey = grey.transpose(Image.Transpose.ROTATE_90)
    scale = rng.uniform(0.5, 1.0) * SIDE / max(size)
    width, height = size[0] * scale, size[1] * scale
    x, y = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - height)
    grey = grey.resize(size, Image.Resampling.BILINEAR, (x, y, x + width, y + height))
    tint = [rng.randint(-chroma, chroma) for _ in "rgb"]
    dark, light = (
        tuple(min(max(level + side * spread + part, 0), 255) for part in tint) for side in (-1, 1)
    )
    return Image.composite(Image.new("RGB", size, light), Image.new("RGB", size, dark), grey)


@lru_cache(maxsize=TEXTURES)
def _texture(number: int) -> Image.Image:
    """One of the grey textures, which are the same in every process."""
    rng = random.Random(f"texture {number}")
    make = (_clouds, _stripes, _gradient, _speckle)[number % 4]
    return ImageOps.autocontrast(make(rng), cutoff=1)


def _noise(rng: random.Random, cells: int) -> Image.Image:
    grey = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells))
    return grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _clouds(rng: random.Random) -> Image.Image:
    """Noise at several scales."""
    grey, weight = _noise(rng, rng.randint(3, 6)), rng.uniform(0.25, 0.5)
    for cells in (12, 30, 80, 200):
        grey = Image.blend(grey, _noise(rng, cells), weight)
    return grey


def _stripes(rng: random.Random) -> Image.Image:
    """Bands of random greys at a random angle, blended with clouds."""
    bands = Image.frombytes("L", (count := rng.randint(6, 40), 1), rng.randbytes(count))
    smooth = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BICUBIC))
    wide = SIDE * 3 // 2
    grey = bands.resize((wide, wide), smooth).rotate(rng.uniform(0, 180), Image.Resampling.BILINEAR)
    grey = grey.crop(((edge := SIDE // 4), edge, edge + SIDE, edge + SIDE))
    return Image.blend(grey, _clouds(rng), rng.uniform(0.3, 0.7))


def _gradient(rng: random.Random) -> Image.Image:
    """A linear or radial gradient, blended with clouds."""
    make = rng.choice((Image.linear_gradient, Image.radial_gradient))
    grey = make("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return Image.blend(grey, _clouds(rng), rng.uniform(0.2, 0.5))


def _speckle(rng: random.Random) -> Image.Image:
    """Sparse dark and light grains, blended with clouds."""
    few = rng.randint(6, 30)
    grains = _noise(rng, rng.randint(90, 200)).point(
        [0 if v < few else 255 if v > 255 - few else 128 for v in range(256)]
    )
    return Image.blend(grains, _clouds(rng), rng.uniform(0.5, 0.8))


def clutter(rng: random.Random, image: Image.Image, count: int) -> None:
    """Draws distractors: grey lines, arcs, dots, scribbles and letters."""
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        x, y = rng.randrange(image.width), rng.randrange(image.height)
        rng.choice((_line, _arc, _dots, _scribble, _letter))(rng, draw, image, x, y)


def _grey(rng: random.Random) -> Colour:
    return shade(rng, rng.randint(60, 200), 10)


def _line(rng: random.Random, draw: ImageDraw.ImageDraw, image: Image.Image, x: int, y: int):
    angle, length = rng.uniform(0, math.pi), rng.uniform(0.1, 0.5) * image.width
    end = (x + length * math.cos(angle), y + length * math.sin(angle))
    draw.line(((x, y), end), _grey(rng), rng.randint(1, 2))


def _arc(rng: random.Random, draw: ImageDraw.ImageDraw, image: Image.Image, x: int, y: int):
    radius, start = rng.randint(8, 60), rng.randint(0, 360)
    box = (x - radius, y - radius, x + radius, y + radius)
    draw.arc(box, start, start + rng.randint(40, 160), _grey(rng), rng.randint(1, 2))


def _dots(rng: random.Random, draw: ImageDraw.ImageDraw, image: Image.Image, x: int, y: int):
    colour = _grey(rng)
    for _ in range(rng.randint(2, 7)):
        at, radius = (x + rng.randint(-25, 25), y + rng.randint(-25, 25)), rng.randint(1, 2)
        draw.ellipse((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius), colour)


def _scribble(rng: random.Random, draw: ImageDraw.ImageDraw, image: Image.Image, x: int, y: int):
    points = [(x + 5 * step, y + rng.randint(-6, 6)) for step in range(rng.randint(4, 12))]
    draw.line(points, _grey(rng), 1)


def _letter(rng: random.Random, draw: ImageDraw.ImageDraw, image: Image.Image, x: int, y: int):
    write(image, (x, y), rng.choice("abcdefhkmnprstuvwxyz"), rng.randint(10, 15), _grey(rng))
