"""Images of every kind against Pillow, and the files that must end in one clear message."""

import io
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from metr.data.formats.files import Files
from metr.data.images import (
    check_image,
    exif_oriented_record,
    load_image,
    probe_size,
    read_annotated,
    read_header,
    read_image,
)
from metr.data.records import ImageRecord
from metr.errors import DataError
from odd_images import READABLE, UNREADABLE, box_of, shows_marker

HEIGHT, WIDTH = 46, 70


@pytest.fixture
def pil_image() -> Image.Image:
    """A smooth image without any symmetry, so that lossy formats stay close and no turn goes unnoticed."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    channels = [columns * 3, rows * 5, (rows + columns) * 2]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def record(path: Path, height: int, width: int) -> ImageRecord:
    return ImageRecord(
        image_id=1,
        path=path,
        width=width,
        height=height,
        boxes=np.array([[2, 4, 10, 20]], dtype=np.float32),
        labels=np.array([0], dtype=np.int64),
        areas=np.array([128], dtype=np.float32),
        ignore=np.array([False]),
    )


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.jpg", {"quality": 95}, 3),
        ("progressive.JPG", {"quality": 95, "progressive": True}, 3),
        ("a.png", {}, 0),
        ("a.bmp", {}, 0),
        ("lossy.webp", {"quality": 95}, 6),
        ("lossless.webp", {"lossless": True}, 0),
        ("a.tif", {}, 0),
        ("lzw.tiff", {"compression": "tiff_lzw"}, 0),
        ("with spaces и буквы 图.png", {}, 0),
    ],
)
def test_formats_agree_with_pillow(
    tmp_path: Path, pil_image: Image.Image, name: str, options: dict[str, object], tolerance: int
) -> None:
    path = save(pil_image, tmp_path / name, **options)
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.flags["C_CONTIGUOUS"]
    assert image.flags["WRITEABLE"]
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(image.astype(int) - expected).max() <= tolerance
    assert probe_size(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_modes_become_rgb(tmp_path: Path, pil_image: Image.Image, mode: str) -> None:
    path = save(pil_image.convert(mode), tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(read_image(path).astype(int) - expected).max() <= 1


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path, pil_image: Image.Image) -> None:
    path = save(pil_image.convert("CMYK"), tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(path).astype(int) - np.asarray(pil_image).astype(int)).mean() < 4


def test_gif_gives_its_first_frame(tmp_path: Path, pil_image: Image.Image) -> None:
    first, second = pil_image.quantize(), ImageOps.mirror(pil_image).quantize()
    path = save(first, tmp_path / "a.gif", save_all=True, append_images=[second])
    assert probe_size(path) == (HEIGHT, WIDTH)
    expected = np.asarray(first.convert("RGB")).astype(int)
    assert np.abs(read_image(path).astype(int) - expected).mean() < 2


def test_sixteen_bits_keep_the_high_byte(tmp_path: Path) -> None:
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 20
    path = save(Image.fromarray(values), tmp_path / "a.png")
    assert np.array_equal(read_image(path), np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[0, :, 3] = [0, 128, 255]
    pixels[1] = [200, 100, 50, 255]
    image = read_image(save(Image.fromarray(pixels), tmp_path / "a.png"))
    assert image[0, :, 0].tolist() == [255, 127, 0]
    assert image[1, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_orientation_agrees_with_pillow(tmp_path: Path, pil_image: Image.Image, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if suffix == ".jpg" else {"lossless": True} if suffix == ".webp" else {}
    pil_image.save(path, exif=exif.tobytes() if suffix != ".tif" else exif, **options)
    assert read_header(path).orientation == orientation
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
    image = read_image(path).astype(int)
    assert probe_size(path) == image.shape[:2] == expected.shape[:2]
    assert np.abs(image - expected).max() <= 3
    assert read_header(path).stored_size == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", READABLE)
def test_an_image_has_the_same_pixels_however_it_is_given(tmp_path: Path, name: str) -> None:
    path = tmp_path / "data" / "images" / name
    path.parent.mkdir(parents=True)
    READABLE[name](path)
    pixels = read_image(path)
    assert shows_marker(pixels, box_of(name))
    given = [str(path), pixels]
    with Image.open(path) as undecoded, Image.open(io.BytesIO(path.read_bytes())) as decoded:
        decoded.load()
        for image in (*given, undecoded, decoded, decoded.copy(), Image.fromarray(pixels)):
            np.testing.assert_array_equal(load_image(image, "given"), pixels)


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_damaged_image_is_an_error_however_it_is_given(tmp_path: Path, name: str) -> None:
    UNREADABLE[name](tmp_path / name)
    with pytest.raises(DataError) as caught:
        load_image(tmp_path / name, "given")
    assert caught.value.where == tmp_path / name
    if name.startswith("cut off") and not name.endswith(".webp"):  # which PIL does not open
        with Image.open(tmp_path / name) as image, pytest.raises(DataError, match=r"given: .*cannot be decoded"):
            load_image(image, "given")


def test_numbers_of_any_range_become_bytes() -> None:
    wide = np.array([[0, 255, 256, 65535]])
    for image in (Image.fromarray(wide.astype(np.uint16)), Image.fromarray(wide.astype(np.int32))):
        assert load_image(image, "given")[0, :, 0].tolist() == [0, 0, 1, 255]
    floats = np.array([[-1.0, 0.0, 127.5, 255.0, 1000.0, np.nan]], dtype=np.float32)
    assert load_image(Image.fromarray(floats), "given")[0, :, 0].tolist() == [0, 0, 127, 255, 255, 0]


def tiff(pixels: np.ndarray) -> bytes:
    """A TIFF file of pixels [h w n] of any type, which Pillow does not write."""
    height, width, channels = pixels.shape
    bits, kind = 8 * pixels.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    lists = [struct.pack(f"<{channels}H", *[value] * channels) for value in (bits, kind)]
    values = {256: width, 257: height, 258: 0, 259: 1, 262: 2 if channels > 2 else 1, 273: 0, 277: channels}
    values |= {278: height, 279: pixels.nbytes, 284: 1, 339: 0}
    lists_at = 8 + 2 + 12 * len(values) + 4
    pixels_at = lists_at + len(lists[0]) + len(lists[1])
    entries = b""
    for tag, value in values.items():
        at = {258: lists_at, 339: lists_at + len(lists[0]), 273: pixels_at}.get(tag, value)
        if tag in {258, 339} and channels <= 2:  # a short list stands in the entry
            at = int.from_bytes(lists[tag == 339].ljust(4, b"\0"), "little")
        entries += struct.pack("<HHII", tag, 3 if tag in {258, 339} else 4, channels if tag in {258, 339} else 1, at)
    head = b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + struct.pack("<I", 0)
    return head + b"".join(lists) + pixels.tobytes()


@pytest.mark.parametrize(
    ("dtype", "channels", "said"),
    [
        ("<f4", 3, "3 channels of 32-bit floating-point numbers"),
        ("<f4", 4, "4 channels of 32-bit floating-point numbers"),
        ("<f8", 1, "1 channel of 64-bit floating-point numbers"),
        ("<f2", 3, "3 channels of 16-bit floating-point numbers"),
        ("<u4", 3, "3 channels of 32-bit integers"),
        ("<i2", 2, "2 channels of 16-bit integers with a sign"),
    ],
)
def test_a_tiff_of_an_unusual_pixel_type_is_refused_with_its_reason(
    tmp_path: Path, dtype: str, channels: int, said: str
) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(np.ones((6, 8, channels), dtype=dtype)))
    for read in (read_image, probe_size):
        with pytest.raises(DataError, match=f"a TIFF image of {said}, a pixel type that cannot be read") as caught:
            read(path)
        assert "8-bit RGB" in str(caught.value.hint)


def test_floats_of_one_channel_and_wide_colours_are_read(tmp_path: Path) -> None:
    for name, dtype, channels, value in (("a.tif", "<f4", 1, 0.5), ("b.tif", "<u2", 3, 0x8000)):
        (tmp_path / name).write_bytes(tiff(np.full((6, 8, channels), value, dtype=dtype)))
        assert set(read_image(tmp_path / name).flatten().tolist()) <= {127, 128}


def test_long_metadata_before_the_frame(tmp_path: Path, pil_image: Image.Image) -> None:
    data = io.BytesIO()
    pil_image.save(data, "JPEG")
    comment = b"\xff\xfe" + struct.pack(">H", 60002) + bytes(60000)
    path = tmp_path / "a.jpg"
    path.write_bytes(data.getvalue()[:2] + comment + data.getvalue()[2:])
    assert probe_size(path) == (HEIGHT, WIDTH)
    assert read_image(path).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(("suffix", "options"), [(".jpg", {"quality": 95}), (".png", {}), (".webp", {}), (".tif", {})])
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_truncated(tmp_path: Path, suffix: str, options: dict[str, object], share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    path = save(Image.fromarray(noise), tmp_path / f"a{suffix}", **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=r"cannot be decoded|header is cut off"):
        read_image(path)


def test_truncated_jpeg_with_a_whole_thumbnail(tmp_path: Path, pil_image: Image.Image) -> None:
    """The thumbnail's end marker must not pass for the image's."""
    data = io.BytesIO()
    pil_image.save(data, "JPEG")
    thumbnail = b"\xff\xe1" + struct.pack(">H", 8) + b"ab\xff\xd9cd"
    path = tmp_path / "a.jpg"
    path.write_bytes((data.getvalue()[:2] + thumbnail + data.getvalue()[2:])[:-2])
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(path)


def test_bad_files(tmp_path: Path) -> None:
    missing, empty, text = tmp_path / "missing.jpg", tmp_path / "empty.jpg", tmp_path / "text.jpg"
    empty.touch()
    text.write_text("not an image")
    short = tmp_path / "short.png"
    short.write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    for path, message in [
        (missing, "no such image"),
        (empty, "0 bytes"),
        (text, "not an image"),
        (short, "a PNG image whose header is cut off"),
        (tmp_path, "cannot be read"),
    ]:
        for read in (read_image, probe_size):
            with pytest.raises(DataError, match=message) as caught:
                read(path)
            assert caught.value.where == path


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    """The file says 30,000 x 30,000 and has no pixels: decoding it would fail in another way."""
    header = b"IHDR" + struct.pack(">II", 30000, 30000) + b"\x08\x02\0\0\0"
    path = tmp_path / "bomb.png"
    end = struct.pack(">I4sI", 0, b"IDAT", 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + end
    )
    assert probe_size(path) == (30000, 30000)
    with pytest.raises(DataError, match="more than the limit"):
        read_image(path)


def test_zero_sized_header(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(b"GIF89a" + bytes(10))
    with pytest.raises(DataError, match="a GIF image whose header is cut off or broken"):
        probe_size(path)


def test_boxes_of_the_shown_image(tmp_path: Path, pil_image: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(pil_image, tmp_path / "a.jpg", exif=exif)
    shown = record(path, height=WIDTH, width=HEIGHT)
    image, fitted, issue = read_annotated(shown)
    assert image.shape == (WIDTH, HEIGHT, 3)
    assert fitted is shown
    assert issue is None
    assert check_image(shown) is None


def test_boxes_of_the_stored_pixels(tmp_path: Path, pil_image: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(pil_image, tmp_path / "a.jpg", exif=exif)
    stored = record(path, height=HEIGHT, width=WIDTH)
    image, fitted, issue = read_annotated(stored)
    np.testing.assert_array_equal(image, read_image(path))
    assert (fitted.height, fitted.width) == image.shape[:2] == (WIDTH, HEIGHT)
    assert issue is not None
    assert issue.kind == "orientation"
    assert check_image(stored) == issue
    assert exif_oriented_record(stored).boxes.tolist() == fitted.boxes.tolist()


@pytest.mark.parametrize("orientation", range(5, 9))
def test_boxes_are_turned_with_their_image(tmp_path: Path, orientation: int) -> None:
    """The white rectangle that a box is around before it is around after."""
    pixels = np.zeros((30, 50, 3), dtype=np.uint8)
    pixels[4:10, 20:45] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(pixels), tmp_path / "a.png", exif=exif)
    stored = replace(record(path, height=30, width=50), boxes=np.array([[20, 4, 45, 10]], dtype=np.float32))
    image, fitted, _ = read_annotated(stored)
    left, top, right, bottom = fitted.boxes[0].astype(int).tolist()
    assert image.shape == (50, 30, 3)
    assert (image[top:bottom, left:right] == 255).all()
    assert (image == 255).sum() == 3 * (bottom - top) * (right - left) == 3 * 25 * 6
    assert fitted.boxes.dtype == np.float32
    assert fitted.areas.tolist() == stored.areas.tolist()


def test_a_image_that_ends_early_is_found_by_decoding(tmp_path: Path, pil_image: Image.Image) -> None:
    path = save(pil_image, tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:-20])
    whole = record(path, height=HEIGHT, width=WIDTH)
    assert check_image(whole) is None
    issue = check_image(whole, decode=True)
    assert issue is not None
    assert issue.kind == "unreadable image"


def test_boxes_of_another_size_are_scaled(tmp_path: Path, pil_image: Image.Image) -> None:
    path = save(pil_image, tmp_path / "a.png")
    image, fitted, issue = read_annotated(record(path, height=HEIGHT * 2, width=WIDTH // 2))
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert (fitted.height, fitted.width) == (HEIGHT, WIDTH)
    assert fitted.boxes.tolist() == [[4, 2, 20, 10]]
    assert fitted.areas.tolist() == [128]
    assert fitted.boxes.dtype == np.float32 == fitted.areas.dtype
    assert issue is not None
    assert issue.kind == "size differs"


def test_check_image_reports_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    issue = check_image(record(tmp_path / "a.jpg", height=1, width=1))
    assert issue is not None
    assert issue.kind == "unreadable image"
    assert "0 bytes" in issue.detail


def test_a_heic_image_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "phone.heic"
    path.write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1heicMiHBMiHE" + bytes(100))
    with pytest.raises(DataError, match=r"metr\[heif\]"):
        read_image(path)


def test_an_avif_image_without_its_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    READABLE["plain.avif"](tmp_path / "plain.avif")
    monkeypatch.setattr("metr.data.images.features.check", lambda name: False)
    with pytest.raises(DataError, match=r"needs Pillow 11\.3 or newer"):
        read_image(tmp_path / "plain.avif")


def test_the_common_kind_of_a_pair_is_taken(tmp_path: Path) -> None:
    for name in ("a.avif", "a.jpg", "b.HEIC", "b.JPG", "c.heic", "c.avif"):
        (tmp_path / name).touch()
    files = Files(tmp_path)
    assert [files.find_stem(stem, [""]) for stem in "abc"] == ["a.jpg", "b.JPG", "c.avif"]
