"""The page and the HTTP endpoint: the command's bytes, limits on everything, reasons for every refusal, nothing left behind."""

import gc
import http.client
import io
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from test_use import random_model

from autoretouch_jax import cli
from autoretouch_jax.demo import faces
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.inference import serve
from autoretouch_jax.inference.edit import Edit
from autoretouch_jax.inference.photo import Photo
from autoretouch_jax.inference.retoucher import Retoucher
from autoretouch_jax.inference.service import Answer, KeptEdits, Service
from autoretouch_jax.models.folder import load_model, save_model

LIMITS = {"bytes": 2_000_000, "pixels": 1_000_000, "seconds": 60.0, "at_once": 2, "waiting": 40}


@contextmanager
def serving(service, **limits):
    """Yields the port of a server that runs in a thread, and its application's desk."""
    limits = serve.Limits(**LIMITS | limits)
    listener = serve.listen("127.0.0.1", 0)
    desks: list[serve.Desk] = []
    real = serve.Desk
    serve.Desk = lambda limits: desks.append(real(limits)) or desks[0]
    try:
        server = serve.server(serve.make_app(service, limits, "tiny"))
    finally:
        serve.Desk = real
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield SimpleNamespace(port=listener.getsockname()[1], desk=desks[0], limits=limits)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


def ask(port, path, body=None, **headers):
    """Returns the status, the headers and the body of an answer. With a body it posts."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers, encode_chunked=not isinstance(body, bytes))
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def reason(answer, status):
    """Returns the reason that an answer of this status gives."""
    assert answer[0] == status, answer
    assert answer[1]["content-type"] == "application/json"
    return json.loads(answer[2])["error"]


def eventually(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, random_model(), 3)
    return folder


@pytest.fixture(scope="module")
def tiny(model_folder):
    service = Service(Retoucher(load_model(model_folder)), LIMITS["pixels"])
    with serving(service) as server:
        server.service = service
        yield server


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A JPEG with a comment of its camera in the EXIF."""
    path = tmp_path_factory.mktemp("photo") / "portrait.jpg"
    exif = Image.Exif()
    exif[0x010E] = "a portrait"
    Image.fromarray(faces.draw_face(3, 96)).save(path, quality=93, exif=exif)
    return path


def command(photo, model, out, *flags):
    """Returns what `autoretouch retouch` writes for a photograph."""
    assert cli.main(["retouch", str(photo), "--out", str(out), "--model", str(model), *flags]) == 0
    return (out / photo.name).read_bytes()


# ---- the same as the command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "metadata"), [("1", "keep"), ("0.35", "keep"), ("1.5", "safe"), ("1", "none")])
def test_the_answer_is_what_the_command_writes(tiny, photo, model_folder, tmp_path, strength, metadata):
    status, headers, file = ask(tiny.port, f"/retouch?strength={strength}&faces=off&metadata={metadata}", photo.read_bytes())
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert headers["photograph-size"] == "96x96"
    assert float(headers["share-changed"]) > 0.5
    assert headers["cache-control"] == "no-store"
    flags = ("--strength", strength, "--faces", "off", "--metadata", metadata)
    assert file == command(photo, model_folder, tmp_path, *flags)
    assert file != photo.read_bytes()


def test_where_nothing_changes_the_same_bytes_come_back(tiny, photo):
    status, headers, file = ask(tiny.port, "/retouch?strength=0", photo.read_bytes())
    assert (status, float(headers["share-changed"])) == (200, 0)
    assert file == photo.read_bytes()


def test_a_png_stays_one(tiny, model_folder, tmp_path):
    path = tmp_path / "face.png"
    Image.fromarray(faces.draw_face(4, 64)).save(path)
    _, headers, file = ask(tiny.port, "/retouch", path.read_bytes())
    assert headers["content-type"] == "image/png"
    assert file == command(path, model_folder, tmp_path / "out")


# ---- previews ---------------------------------------------------------------------------------------------------------------


def test_another_strength_and_the_file_need_no_network(tiny, photo, model_folder, tmp_path, monkeypatch):
    calls = []
    find = Retoucher.edit
    monkeypatch.setattr(Retoucher, "edit", lambda self, *args: calls.append(args[1:]) or find(self, *args))
    data = photo.read_bytes() + b"this test's own"
    pictures = [ask(tiny.port, f"/preview?strength={s}", data)[2] for s in (0, 0.5, 1)]
    shown = [np.asarray(Image.open(io.BytesIO(picture))).astype(float) for picture in pictures]
    half, whole = np.abs(shown[1] - shown[0]).mean(), np.abs(shown[2] - shown[0]).mean()
    assert 0.3 * whole < half < 0.7 * whole
    photo = tmp_path / photo.name
    photo.write_bytes(data)
    file = ask(tiny.port, "/retouch?strength=0.5", data)[2]
    assert calls == [("auto",)]
    assert file == command(photo, model_folder, tmp_path / "out", "--strength", "0.5")
    ask(tiny.port, "/preview?faces=off", data)  # other faces are another edit
    assert len(calls) == 3  # the command's own is the second


def edit_of(size: int) -> Edit:
    return Edit(np.zeros((size, 1, 3), np.int16), np.zeros((size, 1), np.float32), None)  # 10 bytes a pixel


def test_kept_edits_are_bounded_in_bytes_and_in_time():
    now = [0.0]
    kept = KeptEdits(room=100, seconds=60, clock=lambda: now[0])
    kept.put("too large", edit_of(11))
    assert len(kept) == 0
    for name in "abc":
        kept.put(name, edit_of(4))
    assert [kept.get(name) is None for name in "abc"] == [True, False, False]  # the oldest made room
    now[0] = 50
    assert kept.get("b") is not None  # and stays for another minute
    now[0] = 61
    kept.forget_old()
    assert len(kept) == 1
    assert kept.get("c") is None
    now[0] = 111
    assert kept.get("b") is None
    assert len(kept) == 0


# ---- refusals ---------------------------------------------------------------------------------------------------------------


def png_of_size(width, height):
    """A PNG that states a size and has hardly any pixels."""
    header, data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


BAD = {
    "empty": (b"", 422, "no body"),
    "text": (b"Dear Sir or Madam, " * 9, 415, "PNG JPEG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 415, "is an SVG drawing"),
    "cut": (None, 422, "the photograph: "),
    "large picture": (png_of_size(2_000, 1_000), 413, "2000×1000 pixels, more than the 1 million"),
    "huge picture": (png_of_size(30_000, 30_000), 413, "900000000 pixels"),
    "huge file": (bytes(2_000_001), 413, "larger than the 2 MB"),
}


def upload(kind, photo):
    return BAD[kind][0] if BAD[kind][0] is not None else photo.read_bytes()[:-700]


@pytest.mark.parametrize("path", ["/retouch", "/preview?strength=0"])
@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_upload_is_refused_with_the_reason(tiny, photo, kind, path):
    text = reason(ask(tiny.port, path, upload(kind, photo)), BAD[kind][1])
    assert BAD[kind][2] in text
    assert "BytesIO" not in text
    eventually(lambda: tiny.desk.taken == 0)


def test_an_upload_of_unstated_length_is_cut_off_at_the_limit(tiny):
    chunks = iter([bytes(100_000)] * 30)
    text = reason(ask(tiny.port, "/retouch", chunks, **{"Transfer-Encoding": "chunked"}), 413)
    assert "2 MB" in text


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("strenth=1", "did you mean strength?"),
        ("strength=2", "from 0 to 1.5"),
        ("strength=nan", "from 0 to 1.5"),
        ("strength=much", "from 0 to 1.5"),
        ("faces=some", "auto, all, off"),
        ("metadata=lose", "keep, safe, none"),
    ],
)
def test_an_option_that_is_not_known_is_refused(tiny, photo, query, text):
    assert text in reason(ask(tiny.port, f"/retouch?{query}", photo.read_bytes()), 400)


def test_other_sites_are_refused(tiny, photo):
    data = photo.read_bytes()
    assert "another site" in reason(ask(tiny.port, "/retouch", data, **{"Sec-Fetch-Site": "cross-site"}), 403)
    assert "localhost only" in reason(ask(tiny.port, "/retouch", data, Host="retouch.example.com"), 403)
    for host in ("localhost:9000", "[::1]:9000"):  # a tunnel's other end
        assert ask(tiny.port, "/retouch", data, Host=host, **{"Sec-Fetch-Site": "same-origin"})[0] == 200


def test_other_paths_and_methods_are_refused(tiny):
    assert reason(ask(tiny.port, "/nothing"), 404)
    assert reason(ask(tiny.port, "/retouch"), 405)


def test_a_bug_is_no_crash(photo, capfd):
    def retouch(upload, options):
        raise ZeroDivisionError

    with serving(SimpleNamespace(retouch=retouch, preview=None, kept=KeptEdits())) as server:
        assert "ZeroDivisionError" in reason(ask(server.port, "/retouch", photo.read_bytes()), 500)
        assert ask(server.port, "/health")[0] == 200
        assert server.desk.taken == 0
    assert "Traceback" in capfd.readouterr().err


def test_too_little_memory_is_said(photo):
    def retouch(upload, options):
        raise MemoryError

    with serving(SimpleNamespace(retouch=retouch, preview=None, kept=KeptEdits())) as server:
        answer = ask(server.port, "/retouch", photo.read_bytes())
    assert "too little memory" in reason(answer, 503)
    assert answer[1]["retry-after"]


# ---- many, slow, and gone ---------------------------------------------------------------------------------------------------


class Slow:
    """A service that answers when `go` is set."""

    def __init__(self):
        self.go, self.begun, self.kept = threading.Event(), [], KeptEdits()

    def retouch(self, upload, options):
        self.begun.append(upload.read())
        assert self.go.wait(60)
        return Answer(b"done", "image/png", (1, 1), 0, 0.0)

    preview = retouch


def test_more_than_can_wait_are_turned_away(capfd):
    slow = Slow()
    with serving(slow, at_once=1, waiting=1) as server, ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(ask, server.port, "/retouch", b"x") for _ in range(2)]
        eventually(lambda: server.desk.taken == 2 and len(slow.begun) == 1)
        turned_away = ask(server.port, "/retouch", bytes(1_000_000))
        assert "try again" in reason(turned_away, 429)
        assert int(turned_away[1]["retry-after"]) > 0
        assert json.loads(ask(server.port, "/health")[2])["uploads"] == 2
        slow.go.set()
        assert [answer.result()[::2] for answer in answers] == [(200, b"done")] * 2
        eventually(lambda: server.desk.taken == 0)
    assert capfd.readouterr() == ("", "")  # nothing of a request is logged


def test_an_answer_that_takes_too_long_keeps_its_place_until_it_is_done():
    slow = Slow()
    with serving(slow, at_once=1, waiting=2, seconds=0.3) as server:
        assert "longer than 0.3 s" in reason(ask(server.port, "/retouch", b"1"), 504)
        assert server.desk.taken == 1  # its thread and its memory are still in use
        assert "longer" in reason(ask(server.port, "/retouch", b"2"), 504)
        slow.go.set()
        eventually(lambda: server.desk.taken == 0)
    assert slow.begun == [b"1"]  # the second one's turn had not come


def test_a_slow_upload_is_given_up():
    with serving(Slow(), seconds=0.3) as server, socket.create_connection(("127.0.0.1", server.port), 20) as sender:
        sender.sendall(b"POST /retouch HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc")
        assert b" 408 " in sender.recv(4096).split(b"\r\n")[0]
        eventually(lambda: server.desk.taken == 0)


def test_who_has_left_is_not_worked_for():
    slow = Slow()
    with serving(slow, at_once=1) as server, ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask, server.port, "/retouch", b"1")
        eventually(lambda: slow.begun)
        with socket.create_connection(("127.0.0.1", server.port)) as sender:
            sender.sendall(b"POST /retouch HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n2")
            eventually(lambda: server.desk.taken == 2)
        eventually(lambda: server.desk.taken == 1)
        with socket.create_connection(("127.0.0.1", server.port)) as sender:  # and in the middle of an upload
            sender.sendall(b"POST /retouch HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n3")
            eventually(lambda: server.desk.taken == 2)
        eventually(lambda: server.desk.taken == 1)
        slow.go.set()
        assert first.result()[0] == 200
    assert slow.begun == [b"1"]


def test_twenty_at_once_with_bad_ones_among_them(tiny, photo, model_folder, tmp_path):
    kinds = [*BAD, *["good"] * 13]
    expected = command(photo, model_folder, tmp_path)
    ask(tiny.port, "/retouch", photo.read_bytes())  # the network is compiled
    eventually(lambda: tiny.desk.taken == 0)
    before = left_behind(tiny)
    with ThreadPoolExecutor(20) as clients:
        data = [photo.read_bytes() if kind == "good" else upload(kind, photo) for kind in kinds]
        answers = list(clients.map(lambda upload: ask(tiny.port, "/retouch", upload), data))
    for kind, answer in zip(kinds, answers, strict=True):
        if kind == "good":
            assert answer[0] == 200
            assert answer[2] == expected
        else:
            assert BAD[kind][2] in reason(answer, BAD[kind][1])
    eventually(lambda: tiny.desk.taken == 0)
    # No photograph, open file or edit is left of any of them.
    eventually(lambda: all(number <= before[thing] for thing, number in left_behind(tiny).items()))


def left_behind(server) -> dict[str, int]:
    gc.collect()
    photographs = sum(isinstance(thing, Photo) for thing in gc.get_objects())
    return {"open files": len(os.listdir("/dev/fd")), "edits": len(server.service.kept), "photographs": photographs}


# ---- the page ---------------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_asks_nobody_else(tiny):
    status, headers, page = ask(tiny.port, "/")
    text = page.decode()
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"""https?:|//cdn|@import|url\(|<script src|<link rel="stylesheet""", text)
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "connect-src 'self'" in headers["content-security-policy"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser(tiny, photo, model_folder, tmp_path, width):
    with Browser(tmp_path, width) as page:
        page.open(f"http://127.0.0.1:{tiny.port}/")
        page.wait_for("document.querySelector('#model').textContent.includes('tiny')")
        page.drop("#drop", photo)
        page.wait_for("document.querySelector('#status').textContent.includes('changed.')")
        assert page.value("document.querySelector('#title').textContent") == "portrait.jpg, 96 × 96 pixels"
        # The wipe follows the mouse.
        x, y = page.centre("#stack")
        page.drag((x, y), (x + 24, y))
        assert page.value("getComputedStyle(document.querySelector('#after')).clipPath") == "inset(0px 0px 0px 75%)"
        # Strength: the picture fades at once, and the server's own takes its place.
        before = page.value("document.querySelector('#after').src")
        page.press("#strength", "ArrowLeft", 12)
        assert page.value("document.querySelector('#amount').value") == "0.40"
        page.wait_for(f"document.querySelector('#after').src !== {before!r} && !document.querySelector('.busy')")
        assert page.value("shown") == 0.4
        assert page.value("document.querySelector('#after').style.opacity") == "1"
        page.click("[name=metadata][value=safe]")
        page.click("#download")
        flags = ("--strength", "0.4", "--metadata", "safe")
        assert page.downloaded("portrait.jpg") == command(photo, model_folder, tmp_path / "out", *flags)
        # Half of what is shown, without the server.
        fade = "$('strength').value = 0.2, $('strength').dispatchEvent(new Event('input')), $('after').style.opacity"
        assert page.value(fade) == "0.5"
        # What is no photograph is named, and the photograph before it stays.
        page.drop("#frame", Path(__file__))
        page.wait_for("!document.querySelector('#fault').hidden")
        assert "test_serve.py: cannot be decoded" in page.value("document.querySelector('#fault').textContent")
        assert page.value("file.name") == "portrait.jpg"
        page.press("#strength", "Home")
        page.wait_for("document.querySelector('#status').textContent.startsWith('Strength 0')")
        assert page.value("document.documentElement.scrollWidth") <= width
        assert page.faults() == []
        assert {re.sub(r"^blob:", "", address).split("/")[2] for address in page.requests()} == {f"127.0.0.1:{tiny.port}"}


# ---- the command ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_the_command_says_where_and_warns_of_other_computers(model_folder, monkeypatch, capsys, host, warned):
    def interrupted(sockets):
        with socket.create_connection(("127.0.0.1", sockets[0].getsockname()[1])):
            raise KeyboardInterrupt

    monkeypatch.setattr(serve, "server", lambda app: SimpleNamespace(run=interrupted))
    assert cli.main(["serve", str(model_folder), "--host", host, "--port", "0"]) == 0
    out, err = capsys.readouterr()
    assert re.search(rf"is served at http://{re.escape(host)}:\d+/ until Ctrl-C\n$", out)
    assert ("without a password" in err) == warned


def test_what_cannot_be_served_is_refused(model_folder, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(model_folder), "--port", port]) == 2
        assert "choose another port" in capsys.readouterr().err
    for flag in ("--max-megabytes", "--max-megapixels", "--timeout", "--at-once"):
        assert cli.main(["serve", str(model_folder), flag, "0"]) == 2
        assert f"{flag} 0: must be positive" in capsys.readouterr().err
    assert cli.main(["serve", "no/such/model", "--port", "0"]) == 2
    assert "no model here" in capsys.readouterr().err
    for name in ("uvicorn", "autoretouch_jax.inference.serve"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("autoretouch_jax.inference.serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve"]) == 2
    assert "autoretouch-jax[serve]" in capsys.readouterr().err


def test_faults_of_the_upload_are_the_users(tiny):
    with pytest.raises(BadInput, match="cannot be decoded"):
        tiny.service.retouch(io.BytesIO(b"no photograph"), serve.Options())
    with pytest.raises(Refused, match="--port 99999"):
        serve.listen("127.0.0.1", 99999)
