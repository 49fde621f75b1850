"""Where the command `autoretouch` begins: a SIGTERM while Python is still importing is answered like any later one."""

import os
import signal
import sys

from autoretouch_jax.stop import EXIT_REQUEUE


def main() -> int:
    """`cli.main`, caught from its first moment on. Nothing has been started before it, so there is nothing to save."""
    if sys.argv[1:2] in (["train"], ["sweep"]):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_REQUEUE))
    from autoretouch_jax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
