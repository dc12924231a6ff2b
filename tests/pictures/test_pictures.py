"""What may be given as a picture, and that no file costs more than its bound or ends a program."""

import base64
import http.server
import io
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanoglimpse import NanoglimpseError, UsageError, Video
from nanoglimpse.cli import ask, batch_file
from nanoglimpse.pictures import fetch, fonts, pdf, picture
from nanoglimpse.pictures.fonts import find_font
from nanoglimpse.pictures.picture import load_picture, source, sources
from tests.helpers.fuzz_pictures import EXIF, TARGETS, seeds
from tests.helpers.prompts import SCENE

ROOT = Path(__file__).parents[2]
PIXELS = load_picture(SCENE)
PNG = SCENE.read_bytes()

# Hostile files ------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side, bits, kind, row, *extra, after=b""):
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + row)) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0))
    parts = (b"\x89PNG\r\n\x1a\n", header, *extra, chunk(b"IDAT", rows), after, chunk(b"IEND", b""))
    return b"".join(parts)


def tiff(*entries, data=b""):
    """16 × 16 px of grey with more entries (tag, type, count, value); `data` at byte 1000."""
    plain = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    listed = sorted([*plain, *entries])
    head = b"II*\0" + struct.pack("<IH", 8, len(listed))
    return (head + b"".join(struct.pack("<HHII", *e) for e in listed)).ljust(1000, b"\0") + data


def jpeg(segment, count):
    data = io.BytesIO()
    Image.new("RGB", (64, 64)).save(data, "JPEG")
    part = b"\xff" + segment + b"\xff\xff" + b"x" * 65533
    return data.getvalue()[:2] + part * count + data.getvalue()[2:]


def tile():
    data = zlib.compress(bytes(20000 * 20000), 1)
    sizes = ((322, 4, 1, 20000), (323, 4, 1, 20000), (324, 4, 1, 1000), (325, 4, 1, len(data)))
    return tiff((259, 3, 1, 8), *sizes, data=data)


def gif(*frames):
    """Frames (width, height) of 13000 × 13000 px, of damaged data."""
    data = b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0x80, 0, 0) + bytes(6)
    for frame in frames:
        data += b",\0\0\0\0" + struct.pack("<HH", *frame) + b"\0\x02\x02\x4c\x01\0"
    return data + b";"


def rle(width, height):
    runs = b"\0\2\xff\xff" * 10
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + sizes + bytes(1024) + runs


SIDE = 13370
WEBP = "524946461a000000574542505650384c0d0000002fc7f2b11c071011118888fe0700"
TEXT = chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"a" * 10**6 + "\U0001f600".encode(), 9))
STRIPS = ((259, 3, 1, 1), (273, 4, 1, 200), (278, 3, 1, 16), (279, 4, 1, 256))
# name: (content, whether it is answered)
HOSTILE = {
    "bomb.webp": (lambda: bytes.fromhex(WEBP), False),
    "bit.png": (lambda: png(SIDE, 1, 0, -(-SIDE // 8), chunk(b"tRNS", b"\0\0")), True),
    "rgba.png": (lambda: png(SIDE, 8, 6, 4 * SIDE), True),
    "grey16.png": (lambda: png(SIDE, 16, 0, 2 * SIDE), True),
    "text.png": (lambda: png(8, 8, 2, 24, TEXT * 90), False),
    "text_after.png": (lambda: png(8, 8, 2, 24, after=TEXT * 90), False),
    "words.png": (lambda: png(8, 8, 2, 24, chunk(b"tEXt", b"k\0" + b"a" * 90_000_000)), False),
    "late.png": (lambda: png(8, 8, 2, 24, after=chunk(b"tEXt", b"k\0" + b"a" * 45_000_000)), False),
    "profile.png": (
        lambda: png(8, 8, 2, 24, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
        False,
    ),
    "segments.jpg": (lambda: jpeg(b"\xe9", 1300), False),
    "comments.jpg": (lambda: jpeg(b"\xfe", 1300), False),
    "tile.tif": (tile, False),
    "tag.tif": (lambda: tiff(*STRIPS, (700, 7, 90_000_000, 1000), data=bytes(90_000_000)), False),
    "strips.tif": (
        lambda: tiff((259, 3, 1, 1), (273, 4, 4_000_000, 1000), data=bytes(16_000_000)),
        False,
    ),
    "junk.webp": (lambda: bytes.fromhex(WEBP) + bytes(90_000_000), False),
    "frame.gif": (lambda: gif((10, 10), (60000, 60000)), False),
    "wide.bmp": (lambda: rle(100_000_000, 1), False),
    "rle.bmp": (lambda: rle(9000, 2000), True),
    "script.png": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 13000 13000\n%%EndComments\n%%EOF\n",
        False,
    ),
}
CHILD = """
import io, resource, subprocess, sys
from PIL import Image
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.pictures.picture import load_picture, FORMATS

def refuse(*args, **options):
    raise SystemExit("a program was started")

subprocess.Popen = subprocess.call = subprocess.check_call = refuse
for kind in FORMATS:  # what is loaded once does not count
    data = io.BytesIO()
    Image.new("RGB", (32, 32)).save(data, kind)
    load_picture(data.getvalue())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
before = peak()
try:
    size = load_picture(sys.argv[1]).size
except NanoglimpseError as error:
    size = None
    assert sys.argv[1] in str(error) and "\\n" not in str(error), error
print(peak() - before, *(size or ()))
"""


def cost(path):
    """Bytes and size of loading a picture in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    peak, *size = map(int, done.stdout.split())
    return peak, size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("name", HOSTILE)
def test_no_file_costs_more_than_its_bound(name, tmp_path):
    """5 × the bytes of its RGB and 50 MB, and never more than 2.8 GB; programs are not started."""
    make, answered = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(make())
    peak, size = cost(path)
    assert bool(size) == answered
    pixels = size[0] * size[1] if size else 0
    assert peak <= min(5 * 3 * pixels + 50_000_000, 2_800_000_000)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"progressive": True, "subsampling": 0}),
        ("WEBP", {"lossless": True, "method": 0}),
        ("WEBP", {"method": 0}),
        ("AVIF", {"speed": 10, "subsampling": "4:4:4"}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
        ("PPM", {}),
    ],
    ids=str,
)
def test_ordinary_pictures_stay_within_the_bound(kind, options, tmp_path):
    path = tmp_path / "x"
    image = Image.effect_noise((700, 600), 60).resize((3500, 3000)).convert("RGB")
    image.save(path, kind, **options)
    peak, size = cost(path)
    assert size == [3500, 3000]
    assert peak <= 15 * 3500 * 3000 + 50_000_000


def test_only_the_orientation_is_read_of_exif(tmp_path):
    """ImageWidth as text makes Pillow's `exif_transpose` fail; the picture is good."""
    path = tmp_path / "x.jpg"
    PIXELS.save(path, quality=95, exif=EXIF)
    plain = tmp_path / "plain.jpg"
    PIXELS.save(plain, quality=95)
    turned = load_picture(plain).transpose(Image.Transpose.ROTATE_270)
    assert load_picture(path).tobytes() == turned.tobytes()


@pytest.mark.parametrize("kind", ["psd", "dds", "tga", "eps", "ico", "jp2"])
def test_formats_that_are_not_listed_are_refused(kind, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes({"psd": [b"8BPS\0\1" + bytes(40)], **seeds()}[kind][0])
    with pytest.raises(UsageError, match=r"not a picture of a format that is read \(PNG, JPEG"):
        load_picture(path)


def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(PNG)
    for error in (RuntimeError("a\nb"), ZeroDivisionError(), struct.error("c"), MemoryError("d")):

        def fail(self, error=error):
            raise error

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(NanoglimpseError, match=r"x\.png is damaged or cannot be read: \S") as e:
            load_picture(path)
        assert "\n" not in str(e.value)
        with pytest.raises(NanoglimpseError, match=r"x\.png is damaged"):
            Video(path).frames()


def test_strips_are_as_the_whole(monkeypatch):
    """Conversion in strips changes no pixel."""
    generator = np.random.default_rng(0)
    rgba = Image.fromarray(generator.integers(0, 256, (61, 47, 4), np.uint8), "RGBA")
    palette = rgba.convert("RGB").quantize(16)
    palette.info["transparency"] = bytes(range(0, 256, 16))
    for image in (rgba, palette, rgba.convert("CMYK"), rgba.convert("LA")):
        whole = picture.to_rgb(image)
        monkeypatch.setattr(picture, "STRIP", 100)
        assert picture.to_rgb(image).tobytes() == whole.tobytes()
        monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_mutated_inputs_end_in_a_value_or_an_error_of_ours(target, tmp_path):
    for seed in range(150):
        folder = tmp_path / str(seed)
        folder.mkdir()
        call = TARGETS[target](random.Random(f"{target} {seed}"), folder)
        with suppress(NanoglimpseError):
            call()


# What may be given --------------------------------------------------------------------------------


def given(tmp_path, monkeypatch):
    """The same picture in every form, by name."""
    path = tmp_path / "a b.png"
    path.write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    stdin = io.TextIOWrapper(io.BytesIO(PNG))
    monkeypatch.setattr(sys, "stdin", stdin)
    array = np.asarray(PIXELS)
    tensor = torch.from_numpy(array.copy())
    return {
        "path": path,
        "text": str(path),
        "home": "~/a b.png",
        "home path": Path("~/a b.png"),
        "file URL": path.as_uri(),
        "data URI": "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "escaped data URI": "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
        "stdin": "-",
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "BytesIO": io.BytesIO(PNG),
        "Pillow": Image.open(path),
        "numpy": array,
        "numpy, strided": np.ascontiguousarray(array[::-1])[::-1],
        "numpy, floats": array / 255,
        "numpy, channels first": array.transpose(2, 0, 1),
        "tensor": tensor.permute(2, 0, 1),
        "tensor, channels last": tensor,
        "tensor, floats": tensor.permute(2, 0, 1).float() / 255,
        "tensor, 16 bits": (tensor.permute(2, 0, 1).int() * 256).to(torch.uint16),
    }


def test_every_form_of_a_picture_is_the_same_picture(tmp_path, monkeypatch):
    forms = given(tmp_path, monkeypatch)
    with (tmp_path / "a b.png").open("rb") as file:
        assert load_picture(file).tobytes() == PIXELS.tobytes()
    for name, form in forms.items():
        assert load_picture(form).tobytes() == PIXELS.tobytes(), name
        if name == "BytesIO":
            assert load_picture(form).size == PIXELS.size  # it can be read again


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=lambda: path.write_bytes(PNG), daemon=True).start()
    found = source(str(path))
    assert found.load().tobytes() == found.load().tobytes() == PIXELS.tobytes()


@pytest.mark.parametrize(
    "wrong",
    [
        378,
        None,
        1.5,
        {"image": "x"},
        [["x"]],
        np.zeros((2, 2, 2)),
        np.full((2, 2), np.nan),
        object(),
    ],
    ids=lambda wrong: type(wrong).__name__,
)
def test_what_is_no_picture_is_refused(wrong):
    with pytest.raises(UsageError):
        sources([wrong])


@pytest.mark.parametrize(
    ("images", "question"),
    [
        ([], [378]),
        ([378], "What?"),
        ([], 378),
        ([], b"What?"),
        ([], {"role": "user", "content": "What?"}),
        ([], ["What?", None]),
        ([{"role": "user", "content": "What?"}], "What?"),
    ],
    ids=str,
)
def test_numbers_are_not_token_ids(nano, images, question):
    with pytest.raises(UsageError):
        nano.prompt(images, question)


def test_numbers_in_a_history_are_not_token_ids(nano):
    with pytest.raises(UsageError):
        nano.prompt([], "What?", history=[([378], "x")])
    with pytest.raises(UsageError):
        nano.prompt([], "What?", history=[(378, "x")])


def user(*parts):
    return {"role": "user", "content": list(parts)}


IMAGE = {"type": "image", "image": SCENE.as_uri()}
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def test_messages_are_the_same_prompt(nano):
    """Of Qwen's utilities and of OpenAI's clients, with a system prompt and earlier turns."""
    asked = {"type": "text", "text": "What is red?"}
    expected = nano.prompt(SCENE, "What is red?", system="Be brief.")
    openai = {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}
    for part in (IMAGE, openai, {"type": "image_url", "image_url": URL}):
        system = {"role": "system", "content": "Be brief."}
        prompt = nano.prompt([], [system, user(part, asked)])
        assert torch.equal(prompt.token_ids, expected.token_ids)
        assert torch.equal(prompt.patches, expected.patches)
    turns = [user(IMAGE, "First?"), {"role": "assistant", "content": "Yes."}, user("And now?")]
    prompt = nano.prompt([], turns)
    expected = nano.prompt([], "And now?", history=[([SCENE, "First?"], "Yes.")])
    assert torch.equal(prompt.token_ids, expected.token_ids)
    small = nano.prompt([], [user({**IMAGE, "max_pixels": 56 * 56}, "What?")])
    assert small.grids == ((1, 4, 4),)
    clip = {"type": "video", "video": [SCENE.as_uri()] * 2, "fps": 4, "max_pixels": 56 * 56}
    assert nano.prompt([], [user(clip, "What?")]).grids == ((1, 4, 4),)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "assistant", "content": "x"}], "message 1 must have the role 'user'"),
        ([user("x"), user("y")], "message 2 must have the role 'assistant'"),
        (
            [user("x"), {"role": "assistant", "content": "y"}],
            "last message must be one of the user",
        ),
        ([user({"type": "audio", "audio": "x"})], "a part must be a dict with one of"),
        ([user({**IMAGE, "resized_height": 3})], "unknown key 'resized_height'"),
        ([{"role": "user", "content": 7}], "content must be text or a list of parts"),
        ([user({"type": "text", "text": 7})], "text must be a str"),
    ],
)
def test_messages_that_make_no_sense_are_refused(nano, messages, words):
    with pytest.raises(UsageError, match=words):
        nano.prompt([], messages)


# URLs ---------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path == "/drip":
            for _ in range(100):
                self.wfile.write(b"X")
                time.sleep(0.1)
            return
        if self.path.startswith("/to"):
            places = {"/to": "/x.png", "/to-file": SCENE.as_uri(), "/to-self": "/to-self"}
            self.send_response(302)
            self.send_header("Location", places[self.path])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        size = (
            len(PNG) + 9 if self.path == "/short" else 10**12 if self.path == "/big" else len(PNG)
        )
        self.send_header("Content-Length", str(size))
        self.end_headers()
        try:
            self.wfile.write(PNG)
            while self.path == "/big":
                self.wfile.write(bytes(1 << 20))
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.paths, made.daemon_threads = [], True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def address(server, path):
    return f"http://127.0.0.1:{server.server_port}{path}"


@pytest.mark.parametrize("path", ["/x.png", "/to"])
def test_urls_are_fetched(server, path):
    assert load_picture(address(server, path)).tobytes() == PIXELS.tobytes()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/none", "404"),
        ("/short", "bytes are missing"),
        ("/to-file", "cannot be fetched: 302"),
        ("/to-self", "cannot be fetched: 302"),
        ("/big", "more than 32 MiB"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(server, path, words):
    with pytest.raises(NanoglimpseError, match=words) as raised:
        load_picture(address(server, path))
    assert "\n" not in str(raised.value)
    assert len(server.paths) <= 1 + fetch.REDIRECTS


@pytest.mark.slow
def test_a_server_that_never_ends_its_headers_is_left(server, monkeypatch):
    monkeypatch.setattr(fetch, "SECONDS", 0.5)
    with pytest.raises(NanoglimpseError, match=r"no answer within 0\.5 s"):
        load_picture(address(server, "/drip"))


def test_offline_fetches_nothing(server, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    url = address(server, "/x.png")
    assert ask.main(["What?", "--image", url, "--offline", "--quiet"]) == 2
    assert "--offline or HF_HUB_OFFLINE forbids it" in capsys.readouterr().err
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert server.paths == []


def test_no_url_is_fetched_because_a_file_names_it(server, tmp_path):
    rows = tmp_path / "rows.jsonl"
    url = address(server, "/x.png")
    for name in (url, SCENE.as_uri(), "-"):
        rows.write_text(json.dumps({"image": name, "question": "What?"}))
        with pytest.raises(UsageError, match=r"line 1: .* because a file names it"):
            batch_file.read_questions(rows, 2, 4)
    assert not Path(url).exists()
    with pytest.raises(UsageError, match="there is no picture"):
        load_picture(Path(url))
    rows.write_text(json.dumps({"image": [URL, "a.png"], "question": "What?"}))
    (question,) = batch_file.read_questions(rows, 2, 4)
    assert question.visuals == [URL, tmp_path / "a.png"]
    assert len(question.names[0]) < 80
    assert server.paths == []


def test_a_password_is_not_shown():
    with pytest.raises(NanoglimpseError) as raised:
        load_picture("http://name:secret@127.0.0.1:9/x.png")
    assert "secret" not in str(raised.value)


# Command line -------------------------------------------------------------------------------------


def parsed(*words):
    args = ask.parser().parse_args([str(word) for word in words])
    ask._find_question(args)
    return args.image, args.question


def test_a_question_may_stand_before_or_after_its_pictures(tmp_path):
    a, b = (str(tmp_path / name) for name in ("a.png", "b.png"))
    for path in (a, b):
        Path(path).write_bytes(PNG)
    assert parsed("What?", "--image", a, b) == ([a, b], "What?")
    assert parsed("--image", a, "What?") == ([a], "What?")
    assert parsed("--image", a, b, "What?") == ([a, b], "What?")
    assert parsed("--image", a, "What?", "--image", b) == ([a, b], "What?")
    assert parsed("--image", a, "--video", b, "What?") == ([a, b], "What?")
    assert parsed("--image", a, "no.png", "What?") == ([a, "no.png"], "What?")
    assert parsed("--image", "http://x/y.png", URL, "W" * 5000) == (
        ["http://x/y.png", URL],
        "W" * 5000,
    )
    assert parsed("--image", "no.png") == (["no.png"], None)
    assert parsed("What?", "--image", a, "no.png") == ([a, "no.png"], "What?")


def test_stdin_cannot_be_a_picture_and_a_chat(capsys):
    assert ask.main(["--image", "-", "--chat", "--quiet"]) == 2
    assert "which reads questions there" in capsys.readouterr().err


# PDF ----------------------------------------------------------------------------------------------


def pages(path, count=2):
    first, *rest = [Image.new("RGB", (150, 75), colour) for colour in ("red", "blue", "green")][
        :count
    ]
    first.save(path, "PDF", save_all=True, append_images=rest, resolution=pdf.DPI)
    return path


def test_a_pdf_without_the_package_says_how(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    for call in (load_picture, sources):
        with pytest.raises(UsageError, match=r"is a PDF: pip install .*\[pdf\].*pdftoppm"):
            call(pages(tmp_path / "x.pdf"))


def test_pages_of_a_pdf_are_pictures(tmp_path):
    pytest.importorskip("pypdfium2")
    found = sources(str(pages(tmp_path / "x.pdf")))
    assert [one.name[-13:] for one in found] == ["x.pdf, page 1", "x.pdf, page 2"]
    assert [one.load().size for one in found] == [(150, 75)] * 2
    assert [one.load().getpixel((30, 20))[::2] for one in found] == [(254, 0), (0, 254)]


# Fonts --------------------------------------------------------------------------------------------


def test_a_font_has_every_letter_or_is_not_used(monkeypatch, tmp_path):
    """Latin letters are Pillow's own; for the others an installed font is found, or none."""
    monkeypatch.setattr("nanoglimpse.pictures.fonts._folders", lambda: [tmp_path])
    fonts._installed.cache_clear()
    fonts._file_for.cache_clear()
    assert find_font("What is it?", 16) is not None
    assert find_font("\u6570", 16) is None
    with pytest.raises(UsageError, match="is not a font"):
        find_font("x", 16, SCENE)
