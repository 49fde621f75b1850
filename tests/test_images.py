"""The one decoder: orientation, colour profiles, depth, what lies behind a file's end, damage; and which files are listed."""

import io
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from autoretouch_jax.config import AutoRetouch
from autoretouch_jax.data import images
from autoretouch_jax.data.folders import FaceSource, PairSource
from autoretouch_jax.data.images import decoded, list_images, read_header, read_rgb, split_alpha
from autoretouch_jax.demo import faces
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.inference import retoucher
from autoretouch_jax.inference.edit import Edit
from autoretouch_jax.inference.photo import read_photo

FACE = faces.draw_face(0, 64)[:, :48]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FORMATS = ["png", "jpg", "webp", "tif", *(["avif"] if images.AVIF else [])]
# Display P3's primaries, adapted to the white point of profiles (D50), as columns X, Y, Z.
P3 = np.array([(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]).T
XYZ_TO_SRGB = np.array([(3.13386, -1.61687, -0.49062), (-0.97877, 1.91614, 0.03345), (0.07194, -0.22899, 1.40523)])
CYAN = np.array((60, -30, -40))  # CIELAB of the colour that the CMYK profile below gives its cyan ink


def save(path: Path, pixels: np.ndarray = FACE, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def icc_profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2 from its tags (ICC.1:2001-04)."""
    s15 = lambda *values: b"".join(struct.pack(">i", round(value * 65536)) for value in values)  # noqa: E731
    white = s15(0.9642, 1, 0.8249)
    tags = tags | {b"desc": b"desc\0\0\0\0\0\0\0\x05test\0" + bytes(79), b"wtpt": b"XYZ \0\0\0\0" + white}
    place, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4xI4s4s4s12x4s", size, 0x02400000, kind, space, connection, b"acsp").ljust(68, b"\0") + white
    return head.ljust(128, b"\0") + table + body


def p3_profile() -> bytes:
    """Display P3's primaries with the curve of Adobe RGB, a power of 2.2."""
    tags = {b"%cTRC" % name: b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) for name in b"rgb"}
    for name, column in zip(b"rgb", P3.T, strict=True):
        tags[b"%cXYZ" % name] = b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in column)
    return icc_profile(b"mntr", b"RGB ", b"XYZ ", tags)


def p3_in_srgb(pixels: np.ndarray) -> np.ndarray:
    linear = np.clip((pixels / 255) ** 2.2 @ P3.T @ XYZ_TO_SRGB.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # IEC 61966-2-1


def cmyk_profile() -> bytes:
    """A printer whose inks multiply, with a table of 2⁴ colours. Its cyan is `CYAN`."""
    inks = np.indices((2, 2, 2, 2)).reshape(4, -1).T
    light = (1 - 0.3 * inks[:, 1]) * (1 - 0.1 * inks[:, 2]) * (1 - inks[:, 3])
    cyan = inks[:, :1] * (1 - inks[:, 3:])
    lab = np.concatenate([light[:, None] * (100 - cyan * (100 - CYAN[0])) * 2.55, 128 + cyan * CYAN[1:]], -1)
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    table = b"mft1\0\0\0\0\x04\x03\x02\0" + matrix + 4 * ramp + lab.round().astype(np.uint8).tobytes() + 3 * ramp
    return icc_profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


# ---- orientation ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_everywhere(tmp_path, kind, orientation):
    path = save(tmp_path / f"face.{kind}", exif=exif(orientation))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read_rgb(path), expected)
    header, fault = read_header(path)
    assert ((header.height, header.width), fault) == (expected.shape[:2], "")
    np.testing.assert_array_equal(read_photo(path).seen(), expected)
    np.testing.assert_array_equal(images.as_stored(images.upright(FACE, orientation), orientation), FACE)


def test_a_turned_camera_jpeg_meets_its_upright_target(tmp_path):
    for side in ("source", "target"):
        (tmp_path / side).mkdir()
    with Image.open(save(tmp_path / "source" / "a.jpg", exif=exif(6), quality=95)) as image:
        ImageOps.exif_transpose(image).save(tmp_path / "target" / "a.png")
    source = PairSource(tmp_path / "source", tmp_path / "target")
    assert source.smallest[1:] == (64, 48), "width and height as they are seen"
    np.testing.assert_array_equal(source[0].images["source"], source[0].images["target"])


def test_an_orientation_behind_the_pixels_of_a_png_counts_in_the_header_too(tmp_path):
    data = save(tmp_path / "a.png").read_bytes()
    chunk = b"eXIf" + exif(6).tobytes().removeprefix(b"Exif\0\0")
    late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(data[:-12] + late + data[-12:])
    header, fault = read_header(tmp_path / "a.png")
    assert (read_rgb(tmp_path / "a.png").shape, (header.width, header.height), fault) == ((48, 64, 3), (64, 48), "")


@pytest.mark.parametrize(("options", "plain"), [({}, True), ({"icc_profile": SRGB}, True), ({"exif": exif(3)}, False)])
def test_a_data_set_keeps_the_bytes_of_plain_files_alone(tmp_path, options, plain):
    path = save(tmp_path / "a.png", **options)
    assert images.is_plain(io.BytesIO(path.read_bytes())) == plain
    assert not images.is_plain(io.BytesIO(save(path, icc_profile=p3_profile()).read_bytes()))


def test_broken_exif_leaves_an_image_as_it_is(tmp_path):
    path = save(tmp_path / "a.webp", lossless=True, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(read_rgb(path), FACE)


# ---- colours ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_a_profile_is_converted_to_srgb(tmp_path, kind):
    path = save(tmp_path / f"a.{kind}", icc_profile=p3_profile())
    assert np.abs(read_rgb(path) - p3_in_srgb(FACE)).max() < 1.6
    assert np.abs(read_rgb(path).astype(int) - FACE).max() > 8, "the profile matters"
    veiled = Image.fromarray(FACE).convert("RGBA")
    veiled.save(path, icc_profile=p3_profile())
    assert np.abs(read_rgb(path) - p3_in_srgb(FACE)).max() < 1.6


@pytest.mark.parametrize("profile", [SRGB, b"no profile at all", cmyk_profile()])
def test_srgb_and_profiles_that_say_nothing_leave_the_pixels_alone(tmp_path, profile):
    path = save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(read_rgb(path), FACE)
    grey = save(tmp_path / "grey.png", FACE[..., 0], icc_profile=profile)
    np.testing.assert_array_equal(read_rgb(grey), FACE[..., [0, 0, 0]])


def test_cmyk_is_converted_by_its_profile(tmp_path):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[8:, :, 0] = 255
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", icc_profile=cmyk_profile(), quality=100, subsampling=0)
    pixels = read_rgb(tmp_path / "a.jpg").astype(int)
    lab = Image.new("LAB", (1, 1), (round(CYAN[0] * 2.55), *(128 + CYAN[1:]).tolist()))
    expected = ImageCms.profileToProfile(lab, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert np.abs(pixels[2, 2] - 255).max() <= 3, "paper is white"
    assert np.abs(pixels[13, 13] - expected.getpixel((0, 0))).max() <= 4


def test_lab_needs_no_profile(tmp_path):
    Image.new("LAB", (8, 8), (255, 128, 128)).save(tmp_path / "a.tif")
    assert (read_rgb(tmp_path / "a.tif") >= 254).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_one_decoder_reads_every_mode(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray(FACE).convert(mode).save(path)
    with decoded(path) as image:
        pixels, alpha = split_alpha(image)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(path).convert("RGB")))
    assert (alpha is not None) == (mode in ("LA", "RGBA"))
    np.testing.assert_array_equal(read_rgb(path), pixels)


def test_retouching_shows_the_network_srgb_and_keeps_profile_and_untouched_pixels(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", icc_profile=p3_profile())
    change = np.zeros(FACE.shape, np.int16)
    change[10:20, 10:20] = -25
    seen = []

    def find_edit(model, pixels, faces):
        seen.append(pixels)
        return Edit(change, None, None)

    monkeypatch.setattr(retoucher, "find_edit", find_edit)
    retouch = retoucher.Retoucher(SimpleNamespace(config=AutoRetouch()))
    (tmp_path / "b.png").write_bytes(retouch(path, faces="off"))
    with Image.open(path) as before, Image.open(tmp_path / "b.png") as after:
        assert after.info["icc_profile"] == p3_profile()
        pixels = np.asarray(after)
        np.testing.assert_array_equal(np.asarray(retouch(before)), pixels)
    for image in seen:
        np.testing.assert_array_equal(image, read_rgb(path))
    np.testing.assert_array_equal((pixels != FACE).any(-1), change[..., 0] != 0)
    wanted = np.clip(read_rgb(path).astype(int) + change, 0, 255)
    assert np.abs(p3_in_srgb(pixels) - wanted)[change != 0].mean() < 1


# ---- depth ------------------------------------------------------------------------------------------------------------------


def deep_png(path: Path) -> Path:
    """An RGB PNG of 16 bits a channel, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.tobytes() for row in np.full((8, 8, 3), 1000, ">u2"))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    return path


def deep_tiff(path: Path) -> Path:
    """An RGB TIFF of 16 bits a channel: 8 × 8 pixels in one strip behind the tags."""
    place = 8 + 2 + 9 * 12 + 4
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, place), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, place + 6)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, 384)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(head + struct.pack("<3H", 16, 16, 16) + np.full((8, 8, 3), 1000, "<u2").tobytes())
    return path


def grey_png(path: Path) -> Path:
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    return path


@pytest.mark.parametrize(("write", "name"), [(deep_png, "deep.png"), (deep_tiff, "deep.tif"), (grey_png, "deep.png")])
def test_more_than_eight_bits_are_refused_by_name(tmp_path, write, name):
    path = write(tmp_path / name)
    header, fault = read_header(path)
    assert header
    assert "convert it to 8 bits" in fault
    with pytest.raises(Refused, match=rf"{name}.*8 bits"):
        FaceSource(tmp_path)
    with pytest.raises(BadInput, match=rf"{name}: more than 8 bits a channel; convert it to 8 bits"):
        read_rgb(path)
    with pytest.raises(BadInput, match=f"in a tar/{name}: more than 8 bits"):
        read_rgb(io.BytesIO(path.read_bytes()), f"in a tar/{name}")


def test_ten_bits_are_seen_in_an_avif(tmp_path):
    if not images.AVIF:
        return
    path = save(tmp_path / "a.avif")
    data = bytearray(path.read_bytes())
    assert read_header(path)[1] == ""
    data[data.index(b"av1C") + 6] |= 0x40
    pixels = data.index(b"pixi") + 8  # where the file says it once more: the number of channels, then the bits of each
    data[pixels + 1 : pixels + 4] = b"\x0a\x0a\x0a"
    path.write_bytes(data)
    assert "8 bits" in read_header(path)[1]


# ---- ends and damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FORMATS, "bmp"])
@pytest.mark.parametrize("share", [0.99, 0.6])
def test_cut_files_are_named_without_decoding_them(tmp_path, kind, share):
    path = save(tmp_path / f"face.{kind}")
    assert read_header(path)[1] == ""
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    if kind != "bmp":  # BMP has no end mark
        assert read_header(path)[1]
        with pytest.raises(Refused, match=rf"face\.{kind}"):
            FaceSource(tmp_path)
    for read in (read_rgb, read_photo):
        with pytest.raises(BadInput, match=rf"face\.{kind}"):
            read(path)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": exif(1), "comment": b"\xff\xd9"}])
@pytest.mark.parametrize("side", [48, 512])  # below and above the size from which only the last bytes are looked at
def test_what_lies_behind_a_jpegs_end_does_not_matter(tmp_path, options, side):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    path = save(tmp_path / "a.jpg", noise, quality=95, **options)
    data, pixels = path.read_bytes(), read_rgb(path)
    film = b"\0\0\0\x18ftypmp42" + bytes(20_000)
    path.write_bytes(data + film)
    assert read_header(path)[1] == ""
    np.testing.assert_array_equal(read_rgb(path), pixels)
    path.write_bytes(data[: len(data) * 2 // 3] + film)
    assert "cut short" in read_header(path)[1]


def test_the_end_of_a_preview_is_not_the_end_of_a_jpeg(tmp_path):
    preview = save(tmp_path / "small.jpg").read_bytes()
    data = save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + preview).read_bytes()
    assert read_header(tmp_path / "a.jpg")[1] == ""
    (tmp_path / "a.jpg").write_bytes(data[: len(preview) + 700])
    assert "cut short" in read_header(tmp_path / "a.jpg")[1]


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "jpg"])
def test_what_lies_behind_other_ends_does_not_matter_either(tmp_path, kind):
    path = save(tmp_path / f"a.{kind}")
    pixels = read_rgb(path)
    path.write_bytes(path.read_bytes() + 40 * bytes(range(256)))
    assert read_header(path)[1] == ""
    np.testing.assert_array_equal(read_rgb(path), pixels)


def test_too_many_pixels_are_named(tmp_path, monkeypatch):
    path = save(tmp_path / "vast.png")
    monkeypatch.setattr(images, "MAX_PIXELS", FACE[..., 0].size - 1)
    assert "scale it down" in read_header(path)[1]
    with pytest.raises(BadInput, match=r"vast\.png: 48×64 pixels, more than the"):
        read_rgb(path)
    monkeypatch.setattr(images, "MAX_PIXELS", FACE[..., 0].size)
    assert read_header(path)[1] == ""


@pytest.mark.parametrize("side", [13_417, 20_000, 60_000])  # 180, 400 and 3600 million pixels
def test_a_photograph_of_any_size_gets_a_verdict(tmp_path, side):
    # The header alone: the pixels of such an image would take a gigabyte.
    data = save(tmp_path / "a.png").read_bytes()
    size = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    (tmp_path / "a.png").write_bytes(data[:12] + size + struct.pack(">I", zlib.crc32(size)) + data[33:])
    header, fault = read_header(tmp_path / "a.png")
    assert bool(fault) == (side > 15_811)
    if side == 13_417:
        assert (header.width, header.height) == (side, side)
        return
    for read in (read_rgb, read_photo):
        with pytest.raises(BadInput, match=r"a\.png: .*pixels"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("kind", [*FORMATS, "bmp"])
def test_damage_is_named_whatever_it_is(tmp_path, kind):
    path = save(tmp_path / f"a.{kind}")
    data, rng = path.read_bytes(), np.random.default_rng(0)
    messages = []
    for trial in range(60):
        damaged = bytearray(data[: int(rng.integers(len(data)))] if trial % 3 == 0 else data)
        for place in rng.integers(0, min(len(damaged), 400) + 1, 4 if trial % 3 else 0):
            damaged[min(place, len(damaged) - 1)] = rng.integers(256)
        path.write_bytes(damaged)
        read_header(path)  # returns in any case
        for read in (read_rgb, read_photo):
            # Some damage only changes pixels.
            try:
                read(path)
            except BadInput as error:
                messages.append(str(error))
    assert messages
    assert all(f"a.{kind}" in message for message in messages)


def test_a_decoder_that_runs_out_of_memory_names_the_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(BadInput, match=r"a\.png: cannot be decoded \(MemoryError\)"):
        read_rgb(path)


def test_other_formats_and_missing_files_are_named(tmp_path):
    save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    assert "PNG JPEG WEBP" in read_header(tmp_path / "a.png")[1]
    for name in ("a.png", "nowhere.png"):
        with pytest.raises(BadInput, match=name):
            read_rgb(tmp_path / name)


def test_an_opaque_alpha_is_dropped_and_any_other_refused_by_name(tmp_path):
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    image.save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "opaque.png"), np.full((8, 8, 3), (10, 20, 30)))
    image.putpixel((3, 3), (10, 20, 30, 254))
    image.save(tmp_path / "veiled.png")
    with pytest.raises(BadInput, match=r"veiled\.png"):
        read_rgb(tmp_path / "veiled.png")
    with pytest.raises(Refused, match=r"veiled\.png"):
        FaceSource(tmp_path)


# ---- listing ----------------------------------------------------------------------------------------------------------------


def test_links_are_followed_and_circles_end(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "a").mkdir(parents=True)
    elsewhere.mkdir()
    save(root / "a" / "1.png")
    save(elsewhere / "2.png")
    for link, aim in {
        "linked": elsewhere, "a/3.png": elsewhere / "2.png", "itself.png": root / "itself.png", "lost.png": root / "no.png",
        ".hidden": elsewhere, "../elsewhere/up": root,
    }.items():  # fmt: skip
        (root / link).symlink_to(aim)
    found = [path.relative_to(root).as_posix() for path in list_images(root)]
    assert found == ["a/1.png", "a/3.png", "itself.png", "linked/2.png", "lost.png"]
    assert "not a readable image" in read_header(root / "lost.png")[1]


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    (tmp_path / "set.png").mkdir()
    save(tmp_path / "set.png" / "1.JPG", format="JPEG")
    assert list_images(tmp_path) == [tmp_path / "set.png" / "1.JPG"]
