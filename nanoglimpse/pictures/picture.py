"""What may be given as a picture, and the one place where its bytes are decoded.

Pillow decodes, and only the formats below, whose readers start no program. Before anything is
decoded, the header is compared with the bounds: a picture takes at most five times the bytes of its
RGB and 50 MB, and never more than 2.8 GB. Whatever a decoder raises becomes one line with the name
of the file.
"""

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from nanoglimpse.errors import NanoglimpseError, UsageError, one_line
from nanoglimpse.pictures import arrays, fetch, pdf

# Bytes that each pixel takes at most while it is decoded and becomes RGB, as measured; TIFF is
# computed from its strips. AVIF is that of ten bits.
COSTS = {"PNG": 8, "JPEG": 12, "MPO": 12, "WEBP": 16.5, "GIF": 6, "BMP": 8, "PPM": 8, "AVIF": 18}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# Suffixes of the frames in a folder.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".avif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
MAX_PIXELS, MAX_SIDE = 178_956_970, 65_535
# RGB takes four bytes a pixel in Pillow. The rest of the 50 MB is for strips and small objects.
PER_PIXEL, SPARE = 15, 46_000_000
STRIP = 1 << 20
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bytes of a header with all that stands beside the pixels; of EXIF that is searched for a turn.
METADATA, MAX_EXIF = 16_000_000, 1_000_000
# Pillow reads pixels in blocks of this size, and anything else in one piece or in larger blocks.
BLOCK = 1 << 16
# WebP and AVIF are read whole, and copied once, before their size is known.
WHOLE, WHOLE_MOVING = 23_000_000, 256_000_000
# Numbers in the tags of a TIFF become objects of Python, and strips and tiles larger ones.
MAX_NUMBERS, MAX_STRIPS = 400_000, 1 << 16
# Dictionaries of the other compressions are as large as the file says.
TIFF_COMPRESSIONS = (
    *("raw", "tiff_raw_16", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"),
    *("jpeg", "tiff_jpeg", "tiff_ccitt", "group3", "group4"),
)
# Pillow inflates up to 64 million letters of up to four bytes.
PngImagePlugin.MAX_TEXT_MEMORY = min(PngImagePlugin.MAX_TEXT_MEMORY, 6 << 20)

# Also everything with the buffer protocol, as NumPy's arrays.
Picture = str | os.PathLike[str] | bytes | bytearray | BinaryIO | Image.Image | Tensor


class _Counting:
    """Counts what is read beside the pixels, which may be gigabytes beside a single pixel.

    Attributes:
        opened: format of the picture when its header has been read.
        left: bytes that may still be read beside the pixels.
    """

    opened: str | None = None
    left = METADATA

    def counted(self, data: bytes, size: int | None) -> bytes:
        """The data that have been read; a read without a size is one of a whole file."""
        if size is not None and size >= 0 and (self.opened is None or size > BLOCK):
            self.left -= len(data)
            if self.left < 0 and self.opened != "PPM":
                raise ValueError(f"more than {METADATA / 1e6:g} MB of metadata; save it as PNG")
        return data


class MeteredFile(_Counting, io.BufferedReader):
    """A file whose metadata are limited."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of a file."""
        return self.counted(super().read(size), size)


class MeteredBytes(_Counting, io.BytesIO):
    """Bytes whose metadata are limited."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of a file."""
        return self.counted(super().read(size), size)


@dataclass(frozen=True)
class Source:
    """A picture that has been found, and not decoded yet.

    Attributes:
        name: what errors and results call it.
        data: a file, its content, or pixels.
        page: number of a page from 0, if it is a PDF.
        min_pixels, max_pixels: limits of its area, in place of those of the prompt.
    """

    name: str
    data: Path | bytes | Image.Image
    page: int = 0
    min_pixels: int | None = None
    max_pixels: int | None = None

    @contextmanager
    def open(self, moving: bool = False) -> Iterator[Image.Image]:
        """The picture with its header read and found to be within the bounds; nothing is decoded.

        Args:
            moving: all frames of an animation will be decoded, one after the other.

        Raises:
            UsageError: there is no such file, or it is not a picture of a format that is read.
            NanoglimpseError: it is damaged, or exceeds the bounds.
        """
        with decoding(self.name):
            if isinstance(self.data, Image.Image):
                check(self.data, self.name, 0)
                yield self.data
                return
            with self.file() as file:
                if is_pdf(file):
                    yield pdf.render(file, self.page, self.name)
                    return
                size = _header(file, moving)
                with Image.open(file, formats=FORMATS) as image:
                    file.opened = image.format
                    held = size if isinstance(self.data, Path) else 2 * size
                    check(image, self.name, held, getattr(image, "n_frames", 1) if moving else 1)
                    yield image

    def file(self) -> MeteredFile | MeteredBytes:
        """The content as a file; pixels have none."""
        if isinstance(self.data, Path):
            return MeteredFile(self.data.open("rb", buffering=0))
        return MeteredBytes(self.data if isinstance(self.data, bytes) else b"")

    def check(self) -> None:
        """Raises the errors of `open`."""
        with self.open():
            pass

    def load(self) -> Image.Image:
        """The picture as RGB, composited on white where it is transparent.

        Of an animation it is the first frame, of a PDF the page. The EXIF orientation of a file is
        applied, that of a Pillow image is not.

        Raises:
            UsageError, NanoglimpseError: as `open`; or the rest of the file is damaged.
        """
        with decoding(self.name):
            image, turn = self._pixels()
            image = to_rgb(image)
            return image.transpose(turn) if turn is not None else image

    def _pixels(self) -> tuple[Image.Image, Image.Transpose | None]:
        """The decoded pixels without their decoder, which may hold twice as many bytes."""
        with self.open() as image:
            image.load()
            given = isinstance(self.data, Image.Image)
            return image._new(image.im), None if given else orientation(image)


def load_picture(picture: Picture | Source) -> Image.Image:
    """A picture as RGB; see `source` for what it may be, and `Source.load` for what is done.

    Raises:
        UsageError, NanoglimpseError: as these.
    """
    return source(picture).load()


def source(picture: Any) -> Source:
    """Finds a picture, and fetches it if it is not a file.

    Args:
        picture: a path; or, as str only, a file:, http: or https: URL, a data URI, or "-" for
            standard input. Or the bytes of a file, an open file, a Pillow image, or pixels as a
            tensor or an array (`arrays.as_image`).

    Raises:
        UsageError: it is none of these, or cannot be fetched as asked.
        NanoglimpseError: it cannot be fetched.
    """
    if isinstance(picture, Source):
        return picture
    if isinstance(picture, str) and fetch.NAMED.match(picture):
        return Source(*fetch.named(picture))
    if isinstance(picture, str | os.PathLike):
        return _of_path(Path(picture))
    if isinstance(picture, bytes | bytearray):
        return Source("bytes", bytes(picture))
    if isinstance(picture, Image.Image):
        return Source(getattr(picture, "filename", "") or "a Pillow image", picture)
    if hasattr(picture, "read"):
        name = getattr(picture, "name", None)
        return Source(name if isinstance(name, str) else "a file", fetch.content(picture, "a file"))
    return Source("an array", arrays.as_image(picture))


def sources(pictures: Any) -> list[Source]:
    """One or several pictures, in a list, a tuple or an iterator; a PDF becomes its pages.

    Raises:
        UsageError, NanoglimpseError: as `source`.
    """
    several = isinstance(pictures, list | tuple | Iterator)
    return [page for one in (pictures if several else [pictures]) for page in _pages(source(one))]


def _pages(one: Source) -> list[Source]:
    if not _holds_pdf(one):
        return [one]
    with decoding(one.name), one.file() as file:
        count = pdf.page_count(file, one.name)
    names = [f"{one.name}, page {page + 1}" for page in range(count)]
    return [replace(one, name=name, page=page) for page, name in enumerate(names)]


def _holds_pdf(one: Source) -> bool:
    if isinstance(one.data, Image.Image):
        return False
    with suppress(OSError, ValueError), one.file() as file:
        return is_pdf(file)
    return False  # what is wrong with the file is said when it is opened


def _of_path(path: Path) -> Source:
    """A file that can be opened again and again, or the content of a pipe."""
    with suppress(OSError, ValueError, RuntimeError):
        if path.parts[:1] and path.parts[0].startswith("~") and not path.exists():
            return replace(_of_path(path.expanduser()), name=str(path))
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode):
            with path.open("rb") as file:
                return Source(str(path), fetch.content(file, str(path)))
    return Source(str(path), path)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises into one line; Pillow's warnings are not shown.

    Raises:
        UsageError: there is no file, or it is not a picture of a format that is read.
        NanoglimpseError: anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except NanoglimpseError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"there is no picture {one_line(name)}") from None
    except UnidentifiedImageError:
        raise UsageError(
            f"{one_line(name)} is not a picture of a format that is read ({', '.join(FORMATS)}); "
            "convert it"
        ) from None
    except Image.DecompressionBombError as error:
        raise NanoglimpseError(f"{one_line(name)} is refused: {one_line(error)}") from None
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise NanoglimpseError(f"{one_line(name)} is damaged or cannot be read: {reason}") from None


def check(image: Image.Image, name: str, held: int, frames: int = 1) -> None:
    """Compares an opened picture with the bounds.

    Args:
        image: the picture; its header is read and its pixels are not.
        name: what errors call it.
        held: bytes of its file that decoding may hold in memory.
        frames: how many frames are decoded, one after the other.

    Raises:
        NanoglimpseError: it exceeds the bounds.
        ValueError: a TIFF is compressed in a way that is not read.
    """
    width, height = image.size
    pixels = width * height
    if pixels > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise NanoglimpseError(
            f"{one_line(name)} is refused: it says that it has {width} × {height} px; the limits "
            f"are {MAX_PIXELS:,} px and {MAX_SIDE:,} px a side"
        )
    cost = COSTS.get(image.format or "", PER_PIXEL) * pixels
    if image.format == "TIFF":
        cost = max(8 * pixels, 4 * pixels + _strip_bytes(image))
    allowed = min(PER_PIXEL * pixels * frames, PER_PIXEL * MAX_PIXELS) + SPARE
    if cost + held > allowed:
        raise NanoglimpseError(
            f"{one_line(name)} is refused: decoding {width} × {height} px of {image.format} may "
            f"take {(cost + held) / 1e6:,.0f} MB, and the limit for its size is "
            f"{allowed / 1e6:,.0f} MB; shrink it, or save it as PNG or JPEG"
        )


def is_pdf(file: BinaryIO) -> bool:
    """Whether a file is a PDF, before whose mark there may be other bytes; it is rewound."""
    head = file.read(1024)
    file.seek(0)
    return b"%PDF-" in head and head[:3] not in (b"\x89PN", b"GIF", b"RIF", b"\xff\xd8\xff")


def _header(file: MeteredFile | MeteredBytes, moving: bool) -> int:
    """Bytes of a file, after what Pillow would take for opening it has been bounded.

    Raises:
        ValueError: a WebP or AVIF is too large, or a TIFF lists too much.
    """
    head, size = file.read(16), file.seek(0, io.SEEK_END)
    whole = WHOLE_MOVING if moving else WHOLE
    if (head[8:12] == b"WEBP" or head[4:8] == b"ftyp") and size > whole:
        raise ValueError(
            f"it has {size / 1e6:,.0f} MB, and a WebP or AVIF, which is read whole, may have "
            f"{whole / 1e6:,.0f}; save it as PNG or JPEG"
        )
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tags(file, head)
    file.seek(0)
    return size


def _check_tags(file: BinaryIO, head: bytes) -> None:
    """Counts the numbers that the first directory of a TIFF lists."""
    order, big = "<" if head[:2] == b"II" else ">", b"+" in head[:4]
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)
    file.seek(start)
    (count,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
    size, layout, total = (20, "HHQ", 0) if big else (12, "HHI", 0)
    for _ in range(min(count, 1 << 16)):
        if len(entry := file.read(size)) < size:
            return
        tag, kind, numbers = struct.unpack_from(order + layout, entry)
        total += 0 if kind in (1, 2, 6, 7) else numbers  # bytes and text
        if total > MAX_NUMBERS or (tag in (273, 324) and numbers > MAX_STRIPS):
            raise ValueError("its tags list too many numbers; save it as PNG")


def _strip_bytes(image: Any) -> int:
    """Bytes of a TIFF's largest strip or tile, which its decoder holds, whatever size it has.

    Raises:
        ValueError: it is compressed in a way that is not read.
    """
    tags, compression = image.tag_v2, image.info.get("compression")
    if compression not in TIFF_COMPRESSIONS:
        raise ValueError(f"a TIFF compressed by {compression} is not read; save it as PNG")
    area = image.width * min(tags.get(278, image.height), image.height)
    if 322 in tags:
        area = tags[322] * tags[323]
    bits = tags.get(277, 1) * max(tags.get(258, (1,)))
    return area * bits // 8 * (4 if "jpeg" in compression else 1)


def orientation(image: Image.Image) -> Image.Transpose | None:
    """How a file's EXIF says that the picture is turned; nothing else of EXIF is read."""
    with suppress(Exception):  # of damaged EXIF, whose picture is good
        if len(image.info.get("exif", b"")) > MAX_EXIF:
            return None
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, composited on white where it is transparent.

    Grey values of more than 8 bits are scaled by the range of their type: 16 bits, or that which
    holds the largest value (8, 16 or 31 bits; 0 … 1 or 0 … 255).
    """
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    scale = _scale(image)
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP // max(image.width, 1))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_strip_to_rgb(strip, scale), (0, top))
    return rgb


def _strip_to_rgb(strip: Image.Image, scale: float) -> Image.Image:
    if strip.mode[0] in "IF":
        if strip.mode.startswith("I;"):
            strip = strip.convert("I")
        if scale != 1:
            offset = 0.5 if strip.mode == "F" else 0
            strip = strip.point(lambda value: value * scale + offset)
        return strip.convert("L")
    if "A" in strip.getbands() or strip.info.get("transparency") is not None:
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        strip = Image.alpha_composite(white, strip.convert("RGBA"))
    return strip if strip.mode == "RGB" else strip.convert("RGB")


def _scale(image: Image.Image) -> float:
    """What the grey values of more than 8 bits are multiplied with."""
    if image.mode.startswith("I;"):
        return 1 / 256
    if image.mode not in ("I", "F") or 0 in image.size:
        return 1
    extrema: Sequence[Any] = image.getextrema()
    top = float(extrema[1])
    if image.mode == "I":
        return 1 if top < 256 else 1 / 256 if top < 65536 else 2.0**-23
    return 255 if top <= 1 else 1 if top <= 255 else 255 / top
