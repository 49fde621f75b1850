"""A headless Chromium for tests, driven over a pipe by the DevTools protocol: no port, and no library."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
PATIENCE = 90.0  # seconds for any one thing to happen


class Browser:
    """One page. `with Browser(folder) as page: page.open(url)`; downloads go to `folder/downloads`."""

    def __init__(self, folder: Path, width: int = 1200, height: int = 800, dark: bool = False) -> None:
        self.downloads = folder / "downloads"
        self.events: list[dict] = []
        self._number, self._buffer, self._session = 0, b"", ""
        (theirs, self._out), (self._in, back) = os.pipe(), os.pipe()
        # Chromium reads commands from file descriptor 3 and answers on 4. High numbers, so that none is taken yet.
        fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (theirs, back)]
        command = ["bash", "-c", f'exec "$@" 3<&{fds[0]} 4>&{fds[1]}', "bash", str(CHROMIUM), *FLAGS]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.DEVNULL)
        for fd in (theirs, back, *fds):
            os.close(fd)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **params: Any) -> dict:
        """Sends a command and returns its result. Events that come before it are kept in `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | (
            {"sessionId": self._session} if self._session else {}
        )
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(PATIENCE)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer.get('error')}"
                return answer["result"]
            self.events.append(answer)

    def _next(self, seconds: float) -> dict:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], seconds)[0], "Chromium does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, url: str) -> None:
        """Goes to an address and waits until the page is there."""
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """Returns what JavaScript makes of an expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Waits until an expression is true, and returns its value."""
        end = time.monotonic() + PATIENCE
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"{expression} has not come true; {self.faults()}"
            time.sleep(0.05)
        return value

    def centre(self, selector: str) -> tuple[float, float]:
        """Returns where the middle of an element is."""
        rectangle = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        box = self.value(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({rectangle})")
        return box[0], box[1]

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Presses the mouse at one place, moves it to another, and lets go."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def click(self, selector: str) -> None:
        """Clicks the middle of an element."""
        self.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'nearest'}})")
        place = self.centre(selector)
        self.drag(place, place)

    def press(self, selector: str, key: str, times: int = 1) -> None:
        """Gives the focus to an element and presses a key."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
        for kind in ("rawKeyDown", "keyUp") * times:
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def drop(self, selector: str, path: Path) -> None:
        """Drops a file on an element."""
        x, y = self.centre(selector)
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def downloaded(self, name: str) -> bytes:
        """Waits for a download and returns its bytes."""
        path, end = self.downloads / name, time.monotonic() + PATIENCE
        while not path.is_file() or list(self.downloads.glob("*.crdownload")):
            assert time.monotonic() < end, f"{name} was not downloaded; {self.faults()}"
            time.sleep(0.05)
        return path.read_bytes()

    def requests(self) -> list[str]:
        """Returns every address that the page has asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def faults(self) -> list[str]:
        """Returns uncaught errors, and what the browser complains about: blocked requests for example."""
        found = [e["params"]["exceptionDetails"]["text"] for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        entries = [e["params"]["entry"] for e in self.events if e.get("method") == "Log.entryAdded"]
        # A status that is no success is logged too, and may be what a test is about.
        return found + [e["text"] for e in entries if e["level"] == "error" and e["source"] != "network"]

    def screenshot(self, path: Path) -> None:
        """Writes a PNG of what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
