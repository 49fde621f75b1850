"""Published files, fetched once with a checksum.

The library `pooch` does not fit: it compares whole digests, and torchvision publishes only the first eight digits, as part of
the file's name.
"""

import urllib.request
from pathlib import Path

from tqdm import tqdm

from autoretouch_jax.errors import Refused
from autoretouch_jax.runtime.storage import cache_folder, replacing, sha256

TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20  # bytes read at a time


def download(url: str, digest: str, folder: Path | None = None, prefix: str = "") -> Path:
    """Fetches `url` into the cache and returns its path there; a file that is there already is checked and kept.

    The file, named `prefix` and its own name, appears only after its SHA-256 has been found to start with `digest`. Raises
    Refused when the server cannot be reached, the connection is cut, or the checksum is wrong. Nothing is left behind then.
    """
    folder = folder or cache_folder()
    path = folder / (prefix + url.rsplit("/", 1)[-1])
    if path.is_file() and sha256(path).startswith(digest):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as part:
            _fetch(url, part)
            actual = sha256(part)
            if not actual.startswith(digest):
                message = f"{url}: wrong checksum (SHA-256 {actual[:16]}…, expected {digest}…); try again, or give a local file"
                raise Refused(message)
    except OSError as error:
        raise Refused(f"{url}: cannot download ({error}); fetch the file elsewhere and give its path instead") from error
    return path


def _fetch(url: str, path: Path) -> None:
    with path.open("wb") as out, urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        expected = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=expected or None, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as bar:
            while block := response.read(BLOCK):
                out.write(block)
                bar.update(len(block))
    size = path.stat().st_size
    # urllib does not tell a cut connection from the end of the file.
    if expected and size != expected:
        raise Refused(f"{url}: the connection was cut after {size} of {expected} bytes; try again")
