"""Metadata of retouched photographs: kept to the byte, without location, or none; previews renewed; broken ones survived."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_images import p3_profile
from test_photo import DEEP, FACE, change, heic, pillow, read, tiff, with_chunk

from autoretouch_jax.data import images
from autoretouch_jax.inference.files import encoding, exif, metadata, segments
from autoretouch_jax.inference.files.metadata import Policy
from autoretouch_jax.inference.photo import encode

PLACE = struct.pack("<6I", 51, 1, 28, 1, 37, 1)  # where the photograph was taken: a latitude as three fractions
MAKER = b"a maker's note with a serial number"
PREVIEW = pillow(Image.fromarray(FACE).resize((24, 32)), "JPEG", quality=95)
XMP = b"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description
 xmlns:exif="http://ns.adobe.com/exif/1.0/" exif:GPSLatitude="51,28.6N" xmlns:ps="http://ns.adobe.com/photoshop/1.0/"
 ps:City="Greenwich" ps:Credit="A. Photographer" xmlns:drone="http://www.dji.com/drone-dji/1.0/" drone:GpsLongitude="0.0">
<Iptc4xmpCore:Location xmlns:Iptc4xmpCore="http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/">Observatory</Iptc4xmpCore:Location>
<dc:rights xmlns:dc="http://purl.org/dc/elements/1.1/">all reserved</dc:rights></rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
THUMBNAIL_XMP = XMP.replace(b"</rdf:Description>", b"<xmp:Thumbnails xmlns:xmp='x'>/9j/old</xmp:Thumbnails></rdf:Description>")
PLACES = (b"GPSLatitude", b"Greenwich", b"GpsLongitude", b"Observatory", PLACE)


def directory(entries: dict[int, tuple[int, int, bytes]], place: int, following: int = 0) -> bytes:
    """A directory at a position with the values behind it, little-endian."""
    out, behind = struct.pack("<H", len(entries)), place + 2 + 12 * len(entries) + 4
    values = b""
    for tag, (kind, count, value) in sorted(entries.items()):
        if len(value) > 4:
            out += struct.pack("<HHII", tag, kind, count, behind + len(values))
            values += value + bytes(len(value) % 2)
        else:
            out += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return out + struct.pack("<I", following) + values


def camera_exif(orientation: int = 6, preview: bytes = PREVIEW) -> bytes:
    """What a camera writes: make, orientation, maker's note, location, and a preview."""
    long = lambda value: (4, 1, struct.pack("<I", value))  # noqa: E731
    first = {0x10F: (2, 7, b"Camera\0"), 0x112: (3, 1, struct.pack("<H", orientation))}
    first |= {0x8769: long(200), 0x8825: long(300)}
    data = b"II*\0\x08\0\0\0" + directory(first, 8, 400 if preview else 0)
    data = data.ljust(200, b"\0") + directory({0x9003: (2, 5, b"noon\0"), 0x927C: (7, len(MAKER), MAKER)}, 200)
    data = data.ljust(300, b"\0") + directory({1: (2, 2, b"N\0"), 2: (5, 3, PLACE)}, 300)
    if not preview:
        return data
    return data.ljust(400, b"\0") + directory({0x201: long(500), 0x202: long(len(preview))}, 400).ljust(100, b"\0") + preview


def iptc(*sets: tuple[int, bytes]) -> bytes:
    return b"".join(struct.pack(">BBBH", 0x1C, 2, number, len(content)) + content for number, content in sets)


def resource(number: int, content: bytes) -> bytes:
    return b"8BIM" + struct.pack(">HHI", number, 0, len(content)) + content + bytes(len(content) % 2)


IPTC = iptc((80, b"A. Photographer"), (90, b"Greenwich"), (120, b"A caption"))
RESOURCES = resource(1028, IPTC) + resource(1036, b"an old preview") + resource(1005, b"density")


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def full_jpeg(own_exif: bytes | None = None) -> bytes:
    """A JPEG with every kind of metadata."""
    data = pillow(FACE, "JPEG", quality=90, icc_profile=p3_profile(), dpi=(300, 300), comment=b"a comment")
    more = segment(0xE1, b"Exif\0\0" + (camera_exif() if own_exif is None else own_exif))
    more += segment(0xE1, segments.XMP_NAME + XMP) + segment(0xED, segments.PHOTOSHOP_NAME + RESOURCES)
    return data[:20] + more + segment(0xE5, b"of another program") + data[20:]


def with_all(kind: str) -> bytes:
    """A photograph of a format with a profile, EXIF and XMP."""
    options = {"icc_profile": p3_profile(), "exif": camera_exif(), "xmp": XMP}
    if kind == "JPEG":
        return full_jpeg()
    if kind == "PNG":
        data = pillow(FACE, "PNG", icc_profile=p3_profile(), dpi=(300, 300))
        data = with_chunk(b"iTXt", b"XML:com.adobe.xmp\0" + bytes(4) + XMP, data)
        return with_chunk(b"eXIf", camera_exif(), data)
    if kind == "HEIF":
        return heic(FACE, exif=camera_exif(1))
    if kind == "AVIF":
        return pillow(FACE, kind, **options | {"exif": encoding._Verbatim(camera_exif())})
    return pillow(FACE, kind, **options, lossless=True)


KINDS = ["JPEG", "PNG", "WEBP", *(["AVIF"] if images.AVIF else [])]


def info(data: bytes) -> dict:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return {"exif": b"", "xmp": b"", "icc_profile": b"", "orientation": image.getexif().get(0x112, 1)} | image.info


def bare(data: bytes) -> bytes:
    return data.removeprefix(b"Exif\0\0")


# ---- what each choice keeps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_keep_keeps_every_byte_but_the_preview(kind):
    data = with_all(kind)
    photo = read(data)
    written = encode(photo, photo.applied(change(shape=photo.seen().shape)))
    before, after = info(data), info(written)
    assert after["icc_profile"] == before["icc_profile"] == p3_profile()
    assert after["xmp"] == before["xmp"] == XMP
    assert after["orientation"] == before["orientation"] == 6
    old, new = bare(before["exif"]), bare(after["exif"])
    assert len(old) == len(new)
    place = old.index(PREVIEW)
    length = old.index(struct.pack("<I", len(PREVIEW)), 400)
    assert [i for i in range(place) if old[i] != new[i] and not length <= i < length + 4] == []
    assert new[place:] != old[place:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", [True, False])
def test_safe_drops_location_previews_and_makers_notes(kind, changed):
    data = with_all(kind)
    photo = read(data)
    pixels = photo.applied(change(shape=photo.seen().shape)) if changed else photo.pixels
    written = encode(photo, pixels, "safe")
    for secret in (*PLACES, MAKER, PREVIEW[20:60]):
        assert secret not in written
    after = info(written)
    assert after["icc_profile"] == p3_profile()
    assert after["orientation"] == 6
    assert b"Camera" in after["exif"]
    assert b"noon" in after["exif"]
    assert b"A. Photographer" in after["xmp"]
    assert b"all reserved" in after["xmp"]
    if kind != "AVIF" or not changed:
        np.testing.assert_array_equal(read(written).pixels, pixels) if kind != "JPEG" or not changed else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", [True, False])
def test_none_keeps_what_the_pixels_need(kind, changed):
    photo = read(with_all(kind))
    pixels = photo.applied(change(shape=photo.seen().shape)) if changed else photo.pixels
    written = encode(photo, pixels, "none")
    for secret in (*PLACES, MAKER, PREVIEW[20:60], b"Camera", b"noon", b"A. Photographer", b"a comment", b"of another program"):
        assert secret not in written
    after = info(written)
    assert (after["icc_profile"], after["orientation"]) == (p3_profile(), 6)
    assert read(written).seen().shape == photo.seen().shape


def test_the_previews_face_is_the_retouched_one():
    photo = read(full_jpeg())
    pixels = photo.applied(np.full(photo.seen().shape, -60, np.int16))
    written = exif_of(encode(photo, pixels))
    tags = exif.Tags(bytearray(written))
    second = tags.directory(tags.number(tags.first().next, "I"))
    start, size = (tags.integers(second.entries[tag])[0] for tag in (0x201, 0x202))
    with Image.open(io.BytesIO(written[start : start + size])) as new, Image.open(io.BytesIO(PREVIEW)) as old:
        assert new.size == old.size == (24, 32)
        assert np.asarray(new).mean() < np.asarray(old).mean() - 20
    assert set(written[start + size :]) <= {0}
    assert written[start : start + size] != PREVIEW


def exif_of(data: bytes) -> bytes:
    return bare(info(data)["exif"])


def test_a_preview_that_cannot_be_renewed_goes():
    small = PREVIEW[:100]  # no JPEG fits into so few bytes
    photo = read(full_jpeg(camera_exif(preview=small)))
    new = exif_of(encode(photo, photo.applied(change(shape=photo.seen().shape))))
    tags = exif.Tags(bytearray(new))
    assert tags.number(tags.first().next, "I") == 0
    assert small[20:] not in new
    assert b"Camera" in new
    assert MAKER in new


def test_exif_without_a_preview_is_kept_to_the_byte():
    own = camera_exif(preview=b"")
    photo = read(full_jpeg(own))
    assert exif_of(encode(photo, photo.applied(change(shape=photo.seen().shape)))) == own


def test_other_segments_of_a_jpeg_stay_and_photoshops_preview_goes():
    photo = read(full_jpeg())
    written = encode(photo, photo.applied(change(shape=photo.seen().shape)))
    with Image.open(io.BytesIO(written)) as image:
        assert image.info["dpi"] == (300, 300)
        assert image.info["comment"] == b"a comment"
    assert b"of another program" in written
    assert resource(1028, IPTC) + resource(1005, b"density") in written
    assert b"an old preview" not in written
    safe = encode(photo, photo.pixels, "safe")
    assert resource(1028, iptc((80, b"A. Photographer"), (120, b"A caption"))) in safe
    assert b"of another program" not in safe


def tags_of(data: bytes) -> tifffile.TiffTags:
    return tifffile.TiffFile(io.BytesIO(data)).pages[0].tags


@pytest.mark.parametrize("options", [{}, {"byteorder": ">"}, {"bigtiff": True}, {"compression": "zlib", "predictor": 2}])
def test_a_tiffs_tags_are_those_of_the_photograph(options):
    extra = [(700, 1, len(XMP), XMP, True), (33723, 7, len(IPTC), IPTC, True), (34377, 7, len(RESOURCES), RESOURCES, True),
             (315, 2, 0, "A. Photographer", True), (305, 2, 0, "An editor", True)]  # fmt: skip
    data = tiff(DEEP, photometric="rgb", resolution=(300, 300), iccprofile=p3_profile(), extratags=extra, **options)
    photo = read(data)
    pixels = photo.applied(change())
    before, kept = tags_of(data), tags_of(encode(photo, pixels))
    assert set(before.keys()) == set(kept.keys())
    for tag in before:
        assert kept[tag.code].value == tag.value or tag.code in (273, 279, 34377)
    assert b"an old preview" not in kept[34377].value
    assert b"Greenwich" in kept[34377].value
    for new in (pixels, photo.pixels):
        safe, none = encode(photo, new, "safe"), encode(photo, new, "none")
        assert not [secret for secret in PLACES if secret in safe]
        assert tags_of(safe)[315].value == "A. Photographer"
        assert b"A. Photographer" not in none
        for written in (safe, none):
            assert tags_of(written)[34675].value == p3_profile()
            np.testing.assert_array_equal(read(written).pixels, new)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_location_of_a_tiff_goes(order):
    places = {34665: 0x0ABCD123, 34853: 0x0ABCD456}  # replaced by the positions of directories behind the pixels
    extra = [(tag + 1, 4, 1, mark, True) for tag, mark in places.items()]  # tifffile does not write these tags
    data = tiff(DEEP, photometric="rgb", byteorder=order, extratags=[*extra, (271, 2, 0, "Camera", True)])
    for tag in places:
        data = data.replace(struct.pack(f"{order}HHI", tag + 1, 4, 1), struct.pack(f"{order}HHI", tag, 4, 1))
    for mark, tag, content in ((0x0ABCD123, 0x927C, MAKER), (0x0ABCD456, 2, PLACE)):
        start = len(data) + len(data) % 2
        values = struct.pack(f"{order}HHHIII", 1, tag, 7, len(content), start + 18, 0) + content
        data = data.ljust(start, b"\0").replace(struct.pack(f"{order}I", mark), struct.pack(f"{order}I", start)) + values
    photo = read(data)
    kept = encode(photo, photo.applied(change()))
    assert PLACE in kept
    assert MAKER in kept
    for new in (photo.pixels, photo.applied(change())):
        safe = encode(photo, new, "safe")
        assert PLACE not in safe
        assert MAKER not in safe
        assert tags_of(safe)[271].value == "Camera"
        assert 34853 not in tags_of(safe).keys()  # noqa: SIM118


def test_none_leaves_an_upright_avif_readable():
    if not images.AVIF:
        return
    own = camera_exif(1)
    photo = read(pillow(FACE, "AVIF", exif=encoding._Verbatim(own)))
    written = encode(photo, photo.pixels, "none")
    assert len(written) == len(photo.data), "nothing is encoded again"
    assert not [secret for secret in (PLACE, MAKER, b"Camera") if secret in written]
    np.testing.assert_array_equal(read(written).pixels, photo.pixels)


def test_heic_keeps_profile_exif_and_xmp():
    photo = read(heic(FACE, p3_profile(), exif=camera_exif(1), xmp=XMP))
    assert photo.space.profile == p3_profile()
    data = encode(photo, photo.applied(change()))
    written = read(data)
    assert written.space == photo.space
    assert written.options["xmp"] == photo.options["xmp"]
    assert XMP in data
    old, new = camera_exif(1), bare(written.options["exif"])
    assert len(new) == len(old)
    assert new[:400] == old[:400]
    assert PREVIEW[20:] not in new
    for pixels in (photo.pixels, photo.applied(change())):
        assert not [secret for secret in PLACES if secret in encode(photo, pixels, "safe")]
        assert not [secret for secret in (*PLACES, b"Camera", b"Photographer") if secret in encode(photo, pixels, "none")]


# ---- parts ------------------------------------------------------------------------------------------------------------------


def test_xmp_loses_what_is_asked_and_nothing_else():
    safe = Policy("safe").xmp(THUMBNAIL_XMP)
    assert not [secret for secret in (*PLACES[:4], b"/9j/old") if secret in safe]
    assert safe.startswith(b'<?xpacket begin=""')
    assert safe.endswith(b'<?xpacket end="w"?>')
    assert b"all reserved" in safe
    renewed = Policy("keep", preview=lambda *_: b"").xmp(THUMBNAIL_XMP)
    assert b"/9j/old" not in renewed
    assert b"Greenwich" in renewed
    assert Policy("keep").xmp(THUMBNAIL_XMP) == THUMBNAIL_XMP
    assert Policy("none").xmp(XMP) == b""


@pytest.mark.parametrize(
    "xmp", [b"<open>", b"\xff\xfe\0", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', b"<a>" * 5000, XMP[:-300], b"\0" * 50]
)
def test_xmp_that_cannot_be_read_is_kept_or_dropped_whole(xmp):
    assert Policy("safe").xmp(xmp) == b""
    assert Policy("keep", preview=lambda *_: b"").xmp(xmp) == xmp


def test_packed_xmp_of_a_png_is_cleaned_too():
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)
    photo = read(with_chunk(b"iTXt", packed, pillow(FACE, "PNG")))
    written = encode(photo, photo.pixels, "safe")
    assert b"A. Photographer" in written
    assert b"Greenwich" not in written
    assert packed in encode(photo, photo.applied(change()))


def test_text_of_a_png_stays_only_under_keep():
    photo = read(with_chunk(b"tEXt", b"Location\0Greenwich", pillow(FACE, "PNG")))
    assert b"Greenwich" in encode(photo, photo.applied(change()))
    assert b"Greenwich" not in encode(photo, photo.pixels, "safe")


@pytest.mark.parametrize("data", [b"\x1c\x02\x50\xff", b"no sets", iptc((80, b"a"))[:-1], b"\x1c\x02\x50\x80\x04\0\0\0\x09a"])
def test_broken_iptc_is_kept_as_it_is_or_dropped(data):
    assert Policy("safe").iptc(data) == b""
    assert Policy("keep", preview=lambda *_: b"").iptc(data) == data
    assert Policy("safe").photoshop(b"8BIM\x04") == b""
    assert Policy("keep", preview=lambda *_: b"").photoshop(b"8BIM\x04") == b"8BIM\x04"


def test_long_iptc_is_read():
    data = b"\x1c\x02\x78\x80\x04\0\0\0\x03abc" + iptc((90, b"Greenwich"))
    assert Policy("safe").iptc(data) == data[: -len(iptc((90, b"Greenwich")))]


def damaged_exif() -> list[bytes]:
    whole, rng = camera_exif(), np.random.default_rng(0)
    out = [b"", b"II", b"II*\0\xff\xff\xff\xff", whole[:9], whole[:250], b"MM" + whole[2:]]
    # A directory that follows itself, one inside itself, and counts beyond the data.
    out += [whole[:8] + directory({0x8769: (4, 1, struct.pack("<I", 8))}, 8, 8), whole[:8] + b"\xff\xff" + whole[10:]]
    out += [whole[:8] + directory({0x10F: (2, 0xFFFFFFF0, b"long")}, 8), whole[:8] + directory({0x8825: (4, 0, b"")}, 8)]
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, 500, 5):
            data[place] = rng.integers(256)
        out.append(bytes(data))
    return out


def test_malicious_exif_raises_nothing_and_stays_or_goes():
    for number, own in enumerate(damaged_exif()):
        assert len(exif.safe(own)) in (0, len(own))
        assert len(exif.renewed(own, lambda old, limit: old[:limit])) == len(own)
        assert not exif.adobe_rgb(own)
        if number > 12:
            continue
        photo = read(full_jpeg(own))
        for choice in ("keep", "safe", "none"):
            written = encode(photo, photo.applied(change(shape=photo.seen().shape)), choice)
            assert read(written).pixels.shape == photo.pixels.shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_that_other_metadata_state_is_not_lost(kind):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    if kind == "PNG":
        data = with_chunk(b"iTXt", b"XML:com.adobe.xmp\0" + bytes(4) + xmp, pillow(FACE, "PNG"))
    else:
        data = pillow(FACE, kind, xmp=xmp)
    photo = read(data)
    for choice in ("keep", "safe", "none"):
        for pixels in (photo.pixels, photo.applied(change(shape=photo.seen().shape))):
            assert read(encode(photo, pixels, choice)).orientation == photo.orientation == 6


def test_every_choice_is_one_of_the_schema():
    from typing import get_args

    from autoretouch_jax.config.schema import Metadata

    assert get_args(Metadata) == ("keep", "safe", "none")
    assert metadata.Policy("keep").keeps
    assert not metadata.Policy("keep").drops_previews
