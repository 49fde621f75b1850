"""`autoretouch serve`: a page and an HTTP endpoint that retouch photographs. `service.py` does the work of one upload.

An upload is held in memory, or in a temporary file without a name, until it is answered. It is never logged.
"""

import asyncio
import ipaddress
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from autoretouch_jax.config.schema import Faces, Metadata
from autoretouch_jax.errors import EXIT_DONE, BadInput, Refused, did_you_mean
from autoretouch_jax.inference.retoucher import STRONGEST, Retoucher
from autoretouch_jax.inference.service import Answer, Options, Service, TooLarge, WrongKind
from autoretouch_jax.runtime.failures import explain

PAGE = Path(__file__).with_name("serve.html")
IN_MEMORY = 1 << 20  # bytes of an upload that wait in memory; the rest waits in a temporary file
RETRY_SECONDS = "5"  # after which a client that was turned away may ask again
FORGET_EVERY = 30.0  # seconds between two looks for edits that are no longer asked for
CLIENT_LEFT = 499  # nginx's number for it; nobody reads this answer

FLAGS = {
    "bytes": "--max-megabytes",
    "pixels": "--max-megapixels",
    "seconds": "--timeout",
    "at_once": "--at-once",
    "waiting": "--waiting",
}

# The page is one file with its own script and style. It may load pictures that it made itself, and ask this server only.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Photographs are private: no browser or proxy may store them, and no other site may embed them.
PRIVATE = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Limits:
    """What the server accepts. Bytes and pixels are those of one upload, seconds those of one answer."""

    bytes: int
    pixels: int
    seconds: float
    at_once: int
    """Photographs that are worked on at the same time."""
    waiting: int
    """Photographs that wait their turn; more are turned away."""


class Desk:
    """Takes uploads, lets a bounded number of them wait, works on few at once, and answers in time or says why not."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.taken = 0  # uploads that are being received, wait or are worked on; read and written in the event loop only
        self._pool = ThreadPoolExecutor(limits.at_once, "retouch")

    async def answer(self, request: Request, work: Callable[[BinaryIO], Answer]) -> Answer:
        """Receives the upload, and returns what `work` makes of it in another thread.

        Raises HTTPException when there are too many uploads, or this one is too large, too slow, or takes too long.
        """
        # Before the body is read: uploads that nobody will work on must not fill the memory.
        if self.taken >= self.limits.at_once + self.limits.waiting:
            await self._skip(request)
            reason = f"{self.taken} photographs are waiting already; try again in {RETRY_SECONDS} s"
            raise HTTPException(429, reason, {"Retry-After": RETRY_SECONDS})
        self.taken += 1
        upload = cast(BinaryIO, tempfile.SpooledTemporaryFile(IN_MEMORY))  # noqa: SIM115
        try:
            await self._receive(request, upload)
            future = self._pool.submit(work, upload)
        except BaseException:
            self._leave(upload)
            raise
        # Not when the answer is sent: a photograph that takes too long still needs its thread and its memory.
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._leave, upload))
        return await self._wait(request, future)

    def close(self) -> None:
        """Ends the threads. What waits is not begun, and what has begun is finished."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _leave(self, upload: BinaryIO) -> None:
        self.taken -= 1
        upload.close()

    async def _receive(self, request: Request, upload: BinaryIO) -> None:
        try:
            async with asyncio.timeout(self.limits.seconds):
                if int(request.headers.get("content-length", "0")) > self.limits.bytes:
                    await self._refuse_size(request)
                size = 0
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > self.limits.bytes:
                        await self._refuse_size(request)
                    upload.write(chunk)
        except TimeoutError:
            reason = f"the upload took longer than {self.limits.seconds:g} s"
            raise HTTPException(408, reason, {"Connection": "close"}) from None
        if not size:
            raise HTTPException(422, "the request has no body; send the photograph's bytes as its body")
        upload.seek(0)

    async def _refuse_size(self, request: Request) -> None:
        await self._skip(request)
        limit = f"{self.limits.bytes / 1e6:g} MB"
        raise HTTPException(413, f"the upload is larger than the {limit} that are accepted", {"Connection": "close"})

    async def _skip(self, request: Request) -> None:
        """Reads the rest of the upload and drops it: many clients read no answer before they have sent everything."""
        if request.headers.get("expect", "").lower() == "100-continue":  # this client asks before it sends
            return
        try:
            async with asyncio.timeout(self.limits.seconds):
                size = 0
                # A client that goes on for ever is cut off.
                while size <= 4 * self.limits.bytes:
                    message = await request.receive()
                    size += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return
        except TimeoutError:
            return

    async def _wait(self, request: Request, future: Future[Answer]) -> Answer:
        work = asyncio.wrap_future(future)
        # The body is read, so the next message says that the client has left.
        left = asyncio.ensure_future(request.receive())
        try:
            either: list[asyncio.Future[Any]] = [work, left]
            await asyncio.wait(either, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if left.done():
                raise ClientDisconnect
            raise HTTPException(504, f"it took longer than {self.limits.seconds:g} s; send a smaller photograph")
        finally:
            # An upload whose turn has not come is then never begun. A thread cannot be stopped.
            work.cancel()
            left.cancel()


# ---- requests and answers ---------------------------------------------------------------------------------------------------


def read_options(query: QueryParams) -> Options:
    """Returns the options that a query string states. Raises HTTPException, status 400, for what is not known."""
    choices = {"faces": get_args(Faces), "metadata": get_args(Metadata)}
    found: dict[str, Any] = {}
    for key, value in query.multi_items():
        if key not in ("strength", *choices):
            known = ["strength", *choices]
            raise HTTPException(400, f"no such option: {key}; there are {', '.join(known)}{did_you_mean(key, known)}")
        if key in choices and value not in choices[key]:
            raise HTTPException(400, f"{key}={value}: must be one of {', '.join(choices[key])}")
        found[key] = value
    if "strength" in found:
        try:
            found["strength"] = float(found["strength"])
        except ValueError:
            found["strength"] = float("nan")
        if not 0 <= found["strength"] <= STRONGEST:
            raise HTTPException(400, f"strength={query['strength']}: must be a number from 0 to {STRONGEST}")
    return Options(**found)


def check_sender(request: Request, loopback: bool) -> None:
    """Raises HTTPException, status 403, for a request that a page of another site has sent through this user's browser.

    A server on the loopback address has no name but that: another one is a foreign site's, which was pointed here (DNS
    rebinding).
    """
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise HTTPException(403, "another site sent this request; only this server's own page and programs may")
    if loopback and not is_loopback(urlsplit(f"//{request.headers.get('host', '')}").hostname or ""):
        raise HTTPException(403, "this server answers at localhost only; --host makes it answer elsewhere")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this computer's own, which no other one reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _as_file(answer: Answer) -> Response:
    headers = PRIVATE | {"Photograph-Size": "x".join(map(str, answer.size))}
    # Without them, where nothing was looked for.
    if answer.faces is not None:
        headers["Faces-Found"] = str(answer.faces)
    if answer.changed is not None:
        headers["Share-Changed"] = f"{answer.changed:.6f}"
    return Response(answer.data, media_type=answer.media_type, headers=headers)


def _fault(status: int, reason: str, headers: Any = None) -> Response:
    return JSONResponse({"error": reason}, status, PRIVATE | dict(headers or {}))


async def _on_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _fault(error.status_code, error.detail, error.headers)


async def _on_bad_input(_request: Request, error: Exception) -> Response:
    statuses: dict[type[Exception], int] = {TooLarge: 413, WrongKind: 415}
    return _fault(statuses.get(type(error), 422), str(error))


async def _on_memory(_request: Request, error: Exception) -> Response:
    reason = explain(error, training=False) if isinstance(error, RuntimeError) else "too little memory for this photograph"
    if reason is None:  # a bug, whose traceback belongs into the log
        raise error
    return _fault(503, reason, {"Retry-After": RETRY_SECONDS})


async def _on_left(_request: Request, _error: Exception) -> Response:
    return _fault(CLIENT_LEFT, "the client has left")


async def _on_bug(_request: Request, error: Exception) -> Response:
    return _fault(500, f"the server has a bug ({type(error).__name__}); its log says where")


# ---- the server -------------------------------------------------------------------------------------------------------------


def make_app(service: Service, limits: Limits, model: str, loopback: bool = True) -> Starlette:
    """Returns the web application: the page at `/`, `POST /retouch`, `POST /preview` and `GET /health`.

    `loopback` says that it is reached from this computer only: requests under another name are then refused.
    """
    desk = Desk(limits)

    async def page(_request: Request) -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html", headers=PRIVATE | {"Content-Security-Policy": POLICY})

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": model, "uploads": desk.taken, "limits": asdict(limits)}, headers=PRIVATE)

    def endpoint(work: Callable[[BinaryIO, Options], Answer]) -> Callable:
        async def handle(request: Request) -> Response:
            check_sender(request, loopback)
            options = read_options(request.query_params)
            return _as_file(await desk.answer(request, lambda upload: work(upload, options)))

        return handle

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        forgetting = asyncio.create_task(_forget(service))
        yield
        forgetting.cancel()
        desk.close()

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/retouch", endpoint(service.retouch), methods=["POST"]),
        Route("/preview", endpoint(service.preview), methods=["POST"]),
    ]
    # A class's handler also serves the classes below it.
    handlers = {HTTPException: _on_http, BadInput: _on_bad_input, ClientDisconnect: _on_left}
    handlers |= {RuntimeError: _on_memory, MemoryError: _on_memory, Exception: _on_bug}
    return Starlette(routes=routes, exception_handlers=cast(Any, handlers), lifespan=lifespan)


async def _forget(service: Service) -> None:
    """Drops old edits also when no request comes."""
    while True:
        await asyncio.sleep(FORGET_EVERY)
        service.kept.forget_old()


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that accepts connections. Raises Refused where the address is not this computer's or is in use."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise Refused(
            f"--host {host} --port {port}: cannot listen there ({error}); choose another port, or 0 for any"
        ) from error


def server(app: Starlette) -> uvicorn.Server:
    """Returns uvicorn around the application. It logs no requests, because their senders and options are nobody's business."""
    quiet: dict[str, Any] = {"access_log": False, "log_level": "warning", "server_header": False, "proxy_headers": False}
    # The slow parsers and loops of the standard library: one upload takes seconds of a network, and they work everywhere.
    return uvicorn.Server(uvicorn.Config(app, loop="asyncio", http="h11", ws="none", lifespan="on", **quiet))


def run(model: str, host: str, port: int, limits: Limits) -> int:
    """Serves until Ctrl-C, and returns the exit status."""
    for name, value in asdict(limits).items():
        if not (value > 0 or (name == "waiting" and value == 0)):
            raise Refused(f"{FLAGS[name]} {value:g}: must be positive")
    # Before the model is loaded: a port that is in use is refused at once.
    listener = listen(host, port)
    address, loopback = listener.getsockname(), is_loopback(host)
    app = make_app(Service(Retoucher.load(model), limits.pixels), limits, model, loopback)
    shown = f"[{host}]" if ":" in host else host
    if not loopback:
        print(f"Everyone who reaches {host} can use this server, without a password and unencrypted.", file=sys.stderr)
    print(f"{model} is served at http://{shown}:{address[1]}/ until Ctrl-C", flush=True)
    try:
        server(app).run([listener])
    except KeyboardInterrupt:  # uvicorn raises it again when it has closed everything: the only way to stop a server
        pass
    finally:
        listener.close()
    return EXIT_DONE
