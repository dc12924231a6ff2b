"""Pages of PDF files, with the optional package pypdfium2 (`pip install "nanoglimpse[pdf]"`)."""

from typing import Any, BinaryIO

from PIL import Image

from nanoglimpse.errors import UsageError, one_line

# An A4 page of 150 dpi has 1240 × 1754 px. Pages may be of any size, so that larger ones get less.
DPI, MAX_PIXELS, MAX_PAGES = 150, 16_000_000, 64


def page_count(file: BinaryIO, name: str) -> int:
    """The number of pages.

    Raises:
        UsageError: pypdfium2 is not installed, or there are more than `MAX_PAGES`.
    """
    document = _document(file, name)
    try:
        count = len(document)
    finally:
        document.close()
    if not 0 < count <= MAX_PAGES:
        raise UsageError(
            f"{one_line(name)} has {count} pages, of at most {MAX_PAGES}; split it into pictures "
            f"(pdftoppm -r {DPI} -f FIRST -l LAST -png FILE.pdf page)"
        )
    return count


def render(file: BinaryIO, page: int, name: str) -> Image.Image:
    """A page as RGB.

    Raises:
        UsageError: pypdfium2 is not installed.
    """
    document = _document(file, name)
    try:
        width, height = document[page].get_size()  # in points
        scale = min(DPI / 72, (MAX_PIXELS / max(width * height, 1)) ** 0.5)
        return document[page].render(scale=scale).to_pil().convert("RGB")
    finally:
        document.close()


def _document(file: BinaryIO, name: str) -> Any:
    try:
        import pypdfium2
    except ImportError:
        raise UsageError(
            f'{one_line(name)} is a PDF: pip install "nanoglimpse[pdf]", or split it into pictures '
            f"(pdftoppm -r {DPI} -png FILE.pdf page)"
        ) from None
    return pypdfium2.PdfDocument(file)
