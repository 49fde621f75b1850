"""Photographs in, the same photographs out: every format, depth, colour space and orientation; and what is refused."""

import contextlib
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageCms, ImageOps
from test_images import cmyk_profile, icc_profile, p3_in_srgb, p3_profile

from autoretouch_jax.data import images, libvips
from autoretouch_jax.data.colour import adobe_rgb_profile
from autoretouch_jax.data.images import read_rgb
from autoretouch_jax.data.spaces import Space
from autoretouch_jax.demo import faces
from autoretouch_jax.errors import BadInput
from autoretouch_jax.inference.files import unsupported
from autoretouch_jax.inference.photo import SUFFIXES, Photo, encode, read_photo, write_photo

SIDE, WIDTH = 64, 48
FACE = faces.draw_face(0, SIDE)[:, :WIDTH]
# 16 bits that 8 cannot hold: a face with a fine ramp below its levels.
DEEP = FACE.astype(np.uint16) * 257 - (FACE > 0) * np.arange(FACE.size, dtype=np.uint16).reshape(FACE.shape) % 200
ALPHA = np.linspace(1, 65535, SIDE * WIDTH).astype(np.uint16).reshape(SIDE, WIDTH, 1)
BOX = np.s_[20:40, 10:30]


def pillow(pixels: np.ndarray | Image.Image, kind: str, mode: str | None = None, **options) -> bytes:
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, kind, **options)
    return out.getvalue()


def tiff(pixels: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, metadata=None, **options)
    return out.getvalue()


def vips(pixels: np.ndarray, kind: str, **options) -> bytes:
    """libvips' own files: PNG of 16 bits and TIFF in LZW, which the others cannot write."""
    height, width, channels = pixels.shape
    space = ("rgb16" if channels > 2 else "grey16") if pixels.dtype == np.uint16 else "srgb" if channels > 2 else "b-w"
    image = pyvips.Image.new_from_array(pixels).copy(interpretation=options.pop("interpretation", space))
    assert (image.width, image.height, image.bands) == (width, height, channels)
    return image.write_to_buffer(kind, keep="none", **options)


def veiled(mode: str) -> Image.Image:
    image = Image.fromarray(FACE).convert(mode)
    image.putalpha(Image.fromarray((ALPHA[..., 0] >> 8).astype(np.uint8)))
    return image


GREY, CMYK = DEEP[..., :1].copy(), np.concatenate([65535 - DEEP, ALPHA // 4], -1)
PLANES = np.moveaxis(DEEP, -1, 0).copy()
RGBA, GREY_ALPHA = np.concatenate([DEEP, ALPHA], -1), np.concatenate([GREY, ALPHA], -1)
# Each writes a photograph; the depth and channels that it must have when it is read.
LOSSLESS = {
    "rgb.png": (lambda: pillow(FACE, "PNG"), np.uint8, 3),
    "grey.png": (lambda: pillow(FACE, "PNG", "L"), np.uint8, 1),
    "alpha.png": (lambda: pillow(veiled("RGB"), "PNG"), np.uint8, 4),
    "grey_alpha.png": (lambda: pillow(veiled("L"), "PNG"), np.uint8, 2),
    "palette.png": (lambda: pillow(FACE, "PNG", "P"), np.uint8, 3),
    "palette_alpha.png": (lambda: pillow(FACE, "PNG", "P", transparency=3), np.uint8, 4),
    "one_bit.png": (lambda: pillow(FACE, "PNG", "1"), np.uint8, 1),
    "key.png": (lambda: pillow(FACE, "PNG", transparency=tuple(map(int, FACE[0, 0]))), np.uint8, 4),
    "deep.png": (lambda: vips(DEEP, ".png"), np.uint16, 3),
    "deep_grey.png": (lambda: vips(GREY, ".png"), np.uint16, 1),
    "deep_alpha.png": (lambda: vips(RGBA, ".png"), np.uint16, 4),
    "deep_grey_alpha.png": (lambda: vips(GREY_ALPHA, ".png"), np.uint16, 2),
    "deep_interlaced.png": (lambda: vips(DEEP, ".png", interlace=True), np.uint16, 3),
    "rgb.webp": (lambda: pillow(FACE, "WEBP", lossless=True), np.uint8, 3),
    "lossy.webp": (lambda: pillow(FACE, "WEBP", quality=80), np.uint8, 3),
    "alpha.webp": (lambda: pillow(veiled("RGB"), "WEBP", quality=80), np.uint8, 4),
    "rgb.bmp": (lambda: pillow(FACE, "BMP", dpi=(300, 300)), np.uint8, 3),
    "grey.bmp": (lambda: pillow(FACE, "BMP", "L"), np.uint8, 1),
    "rgb.tif": (lambda: pillow(FACE, "TIFF"), np.uint8, 3),
    "lzw.tif": (lambda: vips(FACE, ".tif", compression="lzw", predictor="horizontal"), np.uint8, 3),
    "deflate.tif": (lambda: pillow(FACE, "TIFF", compression="tiff_adobe_deflate"), np.uint8, 3),
    "packbits.tif": (lambda: pillow(FACE, "TIFF", compression="packbits"), np.uint8, 3),
    "grey.tif": (lambda: pillow(FACE, "TIFF", "L"), np.uint8, 1),
    "white_is_zero.tif": (lambda: tiff(FACE[..., 0], photometric="miniswhite"), np.uint8, 1),
    "alpha.tif": (lambda: pillow(veiled("RGB"), "TIFF"), np.uint8, 4),
    "cmyk.tif": (lambda: pillow(FACE, "TIFF", "CMYK", compression="tiff_lzw"), np.uint8, 4),
    "palette.tif": (lambda: pillow(FACE, "TIFF", "P"), np.uint8, 3),
    "one_bit.tif": (lambda: pillow(FACE, "TIFF", "1"), np.uint8, 1),
    "jpeg.tif": (lambda: pillow(FACE, "TIFF", compression="jpeg", quality=95), np.uint8, 3),
    "deep.tif": (lambda: tiff(DEEP, photometric="rgb", rowsperstrip=7), np.uint16, 3),
    "deep_big_endian.tif": (lambda: tiff(DEEP, photometric="rgb", byteorder=">", compression="zlib"), np.uint16, 3),
    "deep_lzw.tif": (lambda: vips(DEEP, ".tif", compression="lzw", predictor="horizontal"), np.uint16, 3),
    "deep_tiles.tif": (lambda: tiff(DEEP, photometric="rgb", tile=(16, 32), compression="zlib", predictor=2), np.uint16, 3),
    "deep_planes.tif": (lambda: tiff(PLANES, photometric="rgb", planarconfig="separate"), np.uint16, 3),
    "deep_large.tif": (lambda: tiff(DEEP, photometric="rgb", bigtiff=True), np.uint16, 3),
    "deep_grey.tif": (lambda: tiff(GREY[..., 0], photometric="minisblack"), np.uint16, 1),
    "deep_cmyk.tif": (lambda: tiff(CMYK, photometric="separated"), np.uint16, 4),
    "deep_alpha.tif": (lambda: tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]), np.uint16, 4),
    "deep_multiplied.tif": (lambda: tiff(RGBA, photometric="rgb", extrasamples=["assocalpha"]), np.uint16, 4),
    "deep_grey_alpha.tif": (lambda: tiff(GREY_ALPHA, photometric="minisblack", extrasamples=["unassalpha"]), np.uint16, 2),
}  # fmt: skip
LOSSY = {
    "rgb.jpg": (lambda: pillow(FACE, "JPEG", quality=93), np.uint8, 3),
    "full.jpe": (lambda: pillow(FACE, "JPEG", quality=80, subsampling=0), np.uint8, 3),
    "half.jfif": (lambda: pillow(FACE, "JPEG", quality=80, subsampling=1), np.uint8, 3),
    "progressive.jpg": (lambda: pillow(FACE, "JPEG", quality=90, progressive=True), np.uint8, 3),
    "grey.jpg": (lambda: pillow(FACE, "JPEG", "L", quality=98), np.uint8, 1),
    "cmyk.jpg": (lambda: pillow(FACE, "JPEG", "CMYK", quality=95), np.uint8, 4),
    "uncoded.jpg": (lambda: pillow(FACE, "JPEG", quality=95, keep_rgb=True), np.uint8, 3),
    **({"rgb.avif": (lambda: pillow(FACE, "AVIF"), np.uint8, 3)} if images.AVIF else {}),
}
HEIC = {"rgb.heic": (lambda: heic(FACE), np.uint8, 3), "deep.heic": (lambda: heic(DEEP), np.uint16, 3)}
EVERY = {**LOSSLESS, **LOSSY, **HEIC}


def heic(pixels: np.ndarray, profile: bytes = b"", **options) -> bytes:
    import pillow_heif

    mode = "RGB" if pixels.dtype == np.uint8 else "RGB;16"
    file = pillow_heif.from_bytes(mode, pixels.shape[1::-1], pixels.tobytes())
    if profile:
        file.info["icc_profile"] = profile
    out = io.BytesIO()
    file.save(out, quality=90, **options)
    return out.getvalue()


def with_chunk(name: bytes, content: bytes, data: bytes | None = None) -> bytes:
    """A PNG with a further chunk before its pixels."""
    data, chunk = data or pillow(FACE, "PNG"), name + content
    return data[:33] + struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def read(data: bytes, name: str = "a photograph") -> Photo:
    return read_photo(io.BytesIO(data), name)


def change(level: float = -40, shape: tuple[int, ...] = FACE.shape) -> np.ndarray:
    step = np.zeros(shape, np.int16)
    step[BOX] = level
    return step


# ---- every format -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_without_a_change_every_photograph_is_the_same_file(name):
    write, kind, channels = EVERY[name]
    data = write()
    photo = read(data)
    assert (photo.pixels.dtype, photo.pixels.shape) == (kind, (SIDE, WIDTH, channels))
    same = photo.applied(np.zeros(FACE.shape, np.int16))
    np.testing.assert_array_equal(same, photo.pixels)
    assert encode(photo, same) == data
    for metadata in ("safe", "none"):
        np.testing.assert_array_equal(read(encode(photo, same, metadata)).pixels, photo.pixels)
    assert "." + name.split(".")[1] in SUFFIXES


@pytest.mark.parametrize("name", [*LOSSLESS, "rgb.heic"])
@pytest.mark.parametrize("metadata", ["keep", "safe", "none"])
def test_what_is_left_alone_is_bit_identical(name, metadata):
    photo = read(EVERY[name][0]())
    pixels = photo.applied(change())
    after = read(encode(photo, pixels, metadata))
    np.testing.assert_array_equal(after.pixels, pixels)
    assert (after.format, after.pixels.dtype, after.space) == (photo.format, photo.pixels.dtype, photo.space)
    different = (pixels != photo.pixels).any(-1)
    assert different[BOX].mean() > 0.2
    different[BOX] = False
    assert not different.any()
    if photo.has_alpha:
        np.testing.assert_array_equal(pixels[..., -1], photo.pixels[..., -1])


@pytest.mark.parametrize("name", LOSSY)
def test_formats_with_losses_get_the_photographs_own_quality(name):
    data = EVERY[name][0]()
    photo = read(data)
    pixels = photo.applied(change())
    written = encode(photo, pixels)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(written)) as after:
        assert (after.mode, after.format) == (before.mode, before.format)
        if before.format == "JPEG":
            assert after.quantization[0] == before.quantization[0]
            assert [layer[1:3] for layer in after.layer] == [layer[1:3] for layer in before.layer]
            assert after.info.get("progressive") == before.info.get("progressive")
    again = read(written).pixels.astype(int)
    assert np.abs(again - pixels).mean() < 3
    # Where nothing changed, the encoder writes what it would have written without any change.
    far = np.ones((SIDE, WIDTH), bool)
    far[15:49, :33] = False  # the blocks of the box, and a pixel around them, to which colour is interpolated
    unchanged = photo.pixels.copy()
    unchanged[0, 0, 0] ^= 1  # else nothing is encoded
    far[:17, :17] = False
    plain = read(encode(photo, unchanged)).pixels
    if not name.endswith("avif"):
        np.testing.assert_array_equal(again[far], plain[far])


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep_lzw.tif"])
def test_sixteen_bits_keep_their_levels(name):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = np.stack([ramp, ramp[::-1], ramp.T], -1)
    kind = name.split(".")[1]
    data = vips(pixels, ".png") if kind == "png" else vips(pixels, ".tif", compression="lzw" if "lzw" in name else "none")
    photo = read(data)
    step = np.full((256, 256, 3), -0.25, np.float32)
    after = read(encode(photo, photo.applied(step))).pixels
    assert after.dtype == np.uint16
    assert min(len(np.unique(after[..., channel])) for channel in range(3)) >= 60_000
    np.testing.assert_array_equal(after, np.clip(np.rint(pixels - np.float32(64.25)), 0, 65535))


@pytest.mark.parametrize("name", ["rgb.png", "deep.png", "rgb.tif", "deep_tiles.tif", "rgb.webp", "rgb.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_may_be_held_in_any_way(name, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = EVERY[name][0]()
    if name.endswith(".tif"):
        pixels = DEEP if "deep" in name else FACE
        data = tiff(pixels, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    else:
        data = with_exif(data, tags.tobytes())
    photo = read(data)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.abs(photo.seen().astype(int) - np.asarray(shown)).max() <= 1
    step = np.zeros(photo.seen().shape, np.int16)
    step[5:9, 20:40, 1] = -30
    after = read(encode(photo, photo.applied(step)))
    assert after.orientation == orientation
    difference = after.seen().astype(int) - photo.seen()
    if not name.endswith("jpg"):
        np.testing.assert_array_equal(difference, np.maximum(step, -photo.seen().astype(int)))
    assert difference[6:8, 24:36, 1].mean() < -20


def with_exif(data: bytes, exif: bytes) -> bytes:
    """The same file with EXIF in it, pixels untouched."""
    if data.startswith(b"\xff\xd8"):
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    exif = exif.removeprefix(b"Exif\0\0")
    if data.startswith(b"\x89PNG"):
        return with_chunk(b"eXIf", exif, data)
    image = Image.open(io.BytesIO(data))
    return pillow(image, "WEBP", lossless=True, exif=exif)


def test_a_png_has_no_chunks_of_the_kind_of_pixels_that_it_had():
    data = EVERY["palette_alpha.png"][0]()
    assert b"PLTE" in data
    assert b"tRNS" in data
    photo = read(data)
    written = encode(photo, photo.applied(change()))
    assert b"PLTE" not in written
    assert b"tRNS" not in written


def test_a_change_of_another_shape_is_a_mistake():
    with pytest.raises(ValueError, match="cannot be applied"):
        read(pillow(FACE, "PNG")).applied(np.zeros((WIDTH, SIDE, 3), np.int16))


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    photo = read(pillow(FACE, "PNG"))
    write_photo(tmp_path / "a.png", photo, photo.applied(change()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        write_photo(tmp_path / "b.png", photo, photo.applied(change()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_rewritten_tiff_keeps_the_strips_that_did_not_change():
    data = tiff(DEEP, photometric="rgb", rowsperstrip=8, compression="zlib", predictor=2)
    photo = read(data)
    after = encode(photo, photo.applied(change()))
    before, new = (tifffile.TiffFile(io.BytesIO(content)).pages[0] for content in (data, after))
    assert (new.compression, new.predictor, new.rowsperstrip) == (before.compression, before.predictor, before.rowsperstrip)
    kept = [a == b for a, b in zip(before.dataoffsets, new.dataoffsets, strict=True)]
    assert kept[:2] == [True, True]
    assert kept[5:] == [True, True, True]
    for (start, size), same in zip(zip(before.dataoffsets, before.databytecounts, strict=True), kept, strict=True):
        assert not same or after[start : start + size] == data[start : start + size] or size >= new.databytecounts[2]
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(after)), photo.applied(change()))


# ---- colours ----------------------------------------------------------------------------------------------------------------


def in_srgb(pixels: np.ndarray, profile: bytes) -> np.ndarray:
    return read_rgb(io.BytesIO(pillow(pixels, "PNG", icc_profile=profile)))


@pytest.mark.parametrize("profile", [p3_profile(), adobe_rgb_profile(), bytes(pyvips.Image.profile_load("p3"))])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_photograph_in_another_space_is_retouched_as_its_srgb_version(profile, depth):
    """The same edit of the same colours, within 2 levels of 255 after conversion."""
    rng = np.random.default_rng(0)
    # Colours of skin. An 8-bit level of a wide space is several levels of sRGB in its most saturated colours.
    tint = rng.uniform((0, -15, -45), (40, 0, -10), FACE.shape)
    srgb = (257 * (rng.uniform(80, 190, (SIDE, WIDTH, 1)) + tint)).astype(np.uint16)
    space = Space("RGB", profile)
    own = libvips.from_srgb(srgb, profile)
    if depth == 8:
        own = np.rint(own / 257).astype(np.uint8)
    data = pillow(own, "PNG", icc_profile=profile) if depth == 8 else with_profile(vips(own, ".png"), profile)
    photo = read(data)
    assert photo.space == space
    step = np.zeros(FACE.shape, np.float32)
    step[BOX] = rng.uniform(-30, 30, step[BOX].shape)
    wanted = np.clip(photo.seen() + step, 0, 255)
    after = read(encode(photo, photo.applied(step)))
    assert np.abs(after.seen() - wanted).max() <= 2
    np.testing.assert_array_equal(after.pixels[step == 0], photo.pixels[step == 0])


def with_profile(data: bytes, profile: bytes) -> bytes:
    return with_chunk(b"iCCP", b"its own\0\0" + zlib.compress(profile), data)


def test_colours_that_srgb_lacks_stay_what_they_are():
    own = np.full((4, 4, 3), (255, 0, 0), np.uint8)
    photo = Photo(own, "PNG", Space("RGB", bytes(pyvips.Image.profile_load("p3"))))
    assert (photo.seen()[0, 0] == (255, 0, 0)).all(), "the nearest colour of sRGB"
    step = np.full(own.shape, (-3, 0, 0), np.int16)
    assert 0 < np.abs(photo.applied(step).astype(int) - own).max() <= 4


def test_the_network_sees_a_profile_as_in_training():
    data = pillow(FACE, "PNG", icc_profile=p3_profile())
    np.testing.assert_array_equal(read(data).seen(), read_rgb(io.BytesIO(data)))
    deep = read(with_profile(vips(FACE.astype(np.uint16) * 257, ".png"), p3_profile()))
    assert np.abs(deep.seen() - p3_in_srgb(FACE)).max() < 1.6


def test_adobe_rgb_may_be_named_in_exif_alone():
    interop = b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x8769, 4, 1, 26, 0)
    interop += struct.pack("<HHHIII", 1, 0xA005, 4, 1, 44, 0) + struct.pack("<HHHI4sI", 1, 1, 2, 4, b"R03\0", 0)
    data = with_exif(pillow(FACE, "JPEG", quality=95), b"Exif\0\0" + interop)
    photo = read(data)
    assert photo.space.profile == adobe_rgb_profile()
    with Image.open(io.BytesIO(pillow(FACE, "JPEG", quality=95))) as image:
        np.testing.assert_array_equal(photo.seen(), in_srgb(np.asarray(image), adobe_rgb_profile()))
    assert Image.open(io.BytesIO(encode(photo, photo.applied(change())))).info.get("icc_profile") is None
    primaries = ImageCms.getOpenProfile(io.BytesIO(adobe_rgb_profile())).profile
    assert primaries.red_primary[1][:2] == pytest.approx((0.64, 0.33), abs=0.02)


@pytest.mark.parametrize("depth", [8, 16])
def test_cmyk_is_retouched_in_its_own_inks(depth):
    pixels = CMYK if depth == 16 else (CMYK >> 8).astype(np.uint8)
    photo = read(tiff(pixels, photometric="separated", iccprofile=cmyk_profile()))
    assert photo.space == Space("CMYK", cmyk_profile())
    inks = read(tiff(pixels, photometric="separated"))
    step = change(-25)
    after = inks.applied(step)
    seen = Photo(after, "TIFF", inks.space).seen()
    wanted = np.clip(inks.seen().astype(int) + step, 0, 255)
    assert np.abs(seen - wanted).max() <= 2
    np.testing.assert_array_equal(after[..., 3], inks.pixels[..., 3])


def test_cmyk_with_a_profile_of_both_ways():
    profile = bytes(pyvips.Image.profile_load("cmyk"))
    own = libvips.from_srgb(DEEP, profile)
    photo = read(tiff(own, photometric="separated", iccprofile=profile))
    step = change(-15)
    after = Photo(photo.applied(step), "TIFF", photo.space)
    wanted = np.clip(photo.seen().astype(int) + step, 0, 255)
    assert np.median(np.abs(after.seen() - wanted)[BOX]) <= 2
    np.testing.assert_array_equal(after.pixels[step[..., 0] == 0], own[step[..., 0] == 0])


def test_grey_stays_grey_and_has_a_profile_of_its_own():
    power = icc_profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(1.8 * 256), 0)})
    photo = read(pillow(FACE, "PNG", "L", icc_profile=power))
    assert photo.seen().shape == FACE.shape
    assert (photo.seen() == photo.seen()[..., :1]).all()
    assert np.abs(photo.seen()[..., 0].astype(int) - photo.pixels[..., 0]).max() > 8, "the profile matters"
    step = np.zeros(FACE.shape, np.int16)
    step[BOX] = (-20, 10, 30)
    luma = 0.299 * -20 + 0.587 * 10 + 0.114 * 30
    after = Photo(photo.applied(step), "PNG", photo.space)
    error = after.seen()[..., 0].astype(float) - photo.seen()[..., 0] - np.where(step.any(-1), luma, 0)
    assert np.abs(error).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_profile_of_other_colours_is_ignored(mode):
    profile = p3_profile() if mode != "RGB" else cmyk_profile()
    image = Image.fromarray(FACE).convert(mode)
    own, plain = (read(pillow(image, "TIFF", icc_profile=icc)) for icc in (profile, b""))
    np.testing.assert_array_equal(own.seen(), plain.seen())
    np.testing.assert_array_equal(own.applied(change()), plain.applied(change()))
    assert Image.open(io.BytesIO(encode(own, own.applied(change())))).info["icc_profile"] == profile


# ---- what is refused --------------------------------------------------------------------------------------------------------


def sized_png(width: int, height: int, content: bytes = b"\0" * 10) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [head, b"IDAT" + zlib.compress(content), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def frames(kind: str) -> bytes:
    out = io.BytesIO()
    pictures = [Image.fromarray(np.roll(FACE, 9 * i, 0)) for i in range(3)]
    pictures[0].save(out, kind, save_all=True, append_images=pictures[1:])
    return out.getvalue()


def many_channels() -> bytes:
    """A small TIFF that states 60,000 channels."""
    data = tiff(np.zeros((200, 200, 3), np.uint16), photometric="rgb", compression="zlib")
    stated = struct.pack("<HHIH", 277, 3, 1, 3)
    assert stated in data
    return data.replace(stated, struct.pack("<HHIH", 277, 3, 1, 60_000))


BOMB = zlib.compress(bytes(80_000_000), 9)
REFUSED = {
    "empty": (lambda: b"", "is empty"),
    "svg": (lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "psd": (lambda: b"8BPS" + bytes(100), "Photoshop document"),
    "gif": (lambda: frames("GIF"), "GIF"),
    "text": (lambda: b"no image at all", "PNG JPEG"),
    "pixels": (lambda: sized_png(60_000, 60_000), "pixels"),
    "limit": (lambda: sized_png(16_000, 16_000), "(more than|limit of) 250"),
    "strip": (lambda: sized_png(50_000, 40), "longer than the 40000"),
    "other strip": (lambda: sized_png(3, 50_000), "longer than the 40000"),
    "bomb": (lambda: sized_png(15_000, 15_000), "which no photograph would fit into"),
    "iCCP": (lambda: with_chunk(b"iCCP", b"name\0\0" + BOMB), "too large"),
    "iTXt": (lambda: with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB), "too large"),
    "zTXt": (lambda: with_chunk(b"zTXt", b"Comment\0\0" + BOMB), "too large"),
    "animated png": (lambda: frames("PNG"), "3 frames"),
    "animated webp": (lambda: frames("WEBP"), "3 frames"),
    "pages": (lambda: frames("TIFF"), "3 frames or pages"),
    "float": (lambda: tiff(FACE.astype(np.float32), photometric="rgb"), "floating-point"),
    "32 bits": (lambda: tiff(FACE.astype(np.uint32), photometric="rgb"), "32-bit"),
    "signed": (lambda: tiff(FACE.astype(np.int16), photometric="rgb"), "signed"),
    "channels": (lambda: many_channels(), "more than 1.5 GB"),
    "layers": (lambda: tiff(FACE, photometric="rgb", extratags=[(37724, 7, 4, b"8BIM", True)]), "layers"),
    "raw": (lambda: tiff(FACE, photometric="rgb", extratags=[(50706, 1, 4, (1, 4, 0, 0), True)]), "raw file"),
    "preview": (lambda: tiff(FACE, photometric="rgb", subfiletype=1), "raw file"),
    "lab": (lambda: pillow(Image.new("LAB", (8, 8)), "TIFF"), "other colours"),
    **{f"cut {name}": (lambda name=name: EVERY[name][0]()[:-200], "cut short|cannot be decoded")
       for name in ("rgb.png", "deep.png", "rgb.jpg", "rgb.webp", "rgb.tif", "deep.tif", "lzw.tif", "rgb.bmp", "rgb.heic")},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_photograph_is_refused_by_name_in_little_memory(name, tmp_path):
    write, reason = REFUSED[name]
    path = tmp_path / "photo.png"
    path.write_bytes(write())
    tracemalloc.start()
    with pytest.raises(BadInput, match=rf"photo\.png: .*({reason})"):
        read_photo(path)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_a_preview_behind_a_tiff_is_no_second_page_and_is_not_kept():
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(DEEP, photometric="rgb", metadata=None)
        writer.write(FACE[::4, ::4], photometric="rgb", subfiletype=1, metadata=None)
    photo = read(out.getvalue())
    after = encode(photo, photo.applied(change()))
    assert len(tifffile.TiffFile(io.BytesIO(after)).pages) == 1


def test_the_first_picture_of_several_in_a_jpeg_is_the_photograph():
    out = io.BytesIO()
    Image.fromarray(FACE).save(out, "MPO", save_all=True, append_images=[Image.fromarray(FACE[::-1])])
    photo = read(out.getvalue() + b"a film")
    assert photo.format == "JPEG"
    after = encode(photo, photo.applied(change()))
    assert after.endswith(b"\xff\xd9")
    with Image.open(io.BytesIO(after)) as image:
        assert (image.format, getattr(image, "n_frames", 1)) == ("JPEG", 1)
    assert b"MPF\0" not in after
    stripped = encode(photo, photo.pixels, "none")
    assert stripped.count(b"\xff\xd8\xff") == 1
    np.testing.assert_array_equal(read(stripped).pixels, photo.pixels)


def test_heic_names_its_extra(monkeypatch):
    data = heic(FACE)
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(BadInput, match=r"a\.heic: HEIC needs pillow_heif: pip install 'autoretouch-jax\[heic\]'"):
        read(data, "a.heic")


def test_training_still_refuses_what_it_would_change():
    for name in ("deep.png", "deep.tif"):
        with pytest.raises(BadInput, match="8 bits"):
            read_rgb(io.BytesIO(EVERY[name][0]()), name)


@pytest.mark.parametrize("name", ["rgb.png", "rgb.jpg", "rgb.webp", "lzw.tif", "deep_tiles.tif", "deep.png", "rgb.heic"])
def test_damage_raises_nothing_else(name):
    data, rng = EVERY[name][0](), np.random.default_rng(0)
    for trial in range(40):
        damaged = bytearray(data[: int(rng.integers(len(data)))] if trial % 4 == 0 else data)
        for place in rng.integers(0, min(len(damaged), 500) + 1, 4 if trial % 4 else 0):
            damaged[min(place, len(damaged) - 1)] = rng.integers(256)
        # Some damage only changes pixels.
        with contextlib.suppress(BadInput):
            photo = read(bytes(damaged), "broken.file")
            encode(photo, photo.applied(np.ones(photo.seen().shape, np.int16)), ("keep", "safe", "none")[trial % 3])


def test_a_large_photograph_is_read_and_changed_band_by_band():
    side = 1500
    data = pillow(np.tile(FACE, (24, 32, 1))[:side, :side].copy(), "JPEG", icc_profile=p3_profile(), quality=80)
    photo = read(data)
    step = np.zeros((side, side, 3), np.int16)
    step[700:800, 700:800] = -9
    tracemalloc.start()
    photo.seen()
    photo.applied(step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * photo.pixels.nbytes


def test_sizes_are_checked_in_one_place():
    assert unsupported.fault_of_size(4000, 3000, 10_000) == ""
    assert "million" in unsupported.fault_of_size(20_000, 20_000, 10**9)
