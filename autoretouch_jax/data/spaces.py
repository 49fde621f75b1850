"""The colours of a photograph: stored pixels to the sRGB that the network sees, and changes of sRGB back to stored pixels.

A photograph is grey, RGB or CMYK, of 8 or 16 bits a channel, with or without a colour profile. It is converted forwards and
backwards only where something changes, so that the rest stays bit-identical, and by the difference of two conversions: what
the conversion itself changes (rounding, colours that sRGB lacks) then cancels out.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from autoretouch_jax.data import colour, libvips
from autoretouch_jax.data.edits import LUMA

CHANNELS = {"L": 1, "RGB": 3, "CMYK": 4}


@dataclass(frozen=True)
class Space:
    """`mode` is Pillow's: L, RGB or CMYK. A profile of another kind of colours is ignored, as viewers do."""

    mode: str
    profile: bytes = b""

    @property
    def channels(self) -> int:
        """The number of channels that are colours. Alpha follows them."""
        return CHANNELS[self.mode]

    @property
    def is_srgb(self) -> bool:
        """Whether RGB pixels are taken as they are."""
        return self.mode == "RGB" and colour.is_srgb(self.profile)

    def to_srgb(self, pixels: np.ndarray) -> np.ndarray:
        """Converts uint8 or uint16 `[h, w, channels]` to `uint8[h, w, 3]`."""
        if pixels.dtype == np.uint8:
            # As in training: the same photograph is to look the same to the network.
            image = Image.frombytes(self.mode, pixels.shape[1::-1], np.ascontiguousarray(pixels).tobytes())
            image.info["icc_profile"] = self.profile
            return np.asarray(colour.srgb(image))
        deep = libvips.to_srgb(pixels, self.profile) if self._has_profile() else _without_profile(pixels, self.mode)
        levels = (deep.astype(np.uint32) * 255 + 32767) // 65535
        return np.broadcast_to(levels, (*pixels.shape[:2], 3)).astype(np.uint8)

    def changed(self, pixels: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Adds a change of sRGB, `[N, 3]` in levels of 255, to uint8 or uint16 `[N, channels]`. Returns the same type."""
        step = change.astype(np.float32)
        if self.mode == "L":  # whatever the network says, grey stays grey
            step = np.repeat(step @ LUMA[:, None].astype(np.float32), 3, -1)
        white = 255 if pixels.dtype == np.uint8 else 65535
        if self.is_srgb:
            added = step * np.float32(white / 255)
        else:
            # In 16 bits, so that rounding is a matter of the last line alone.
            own = pixels if white == 65535 else pixels.astype(np.uint16) * np.uint16(257)
            added = self._step(own, step) * np.float32(white / 65535)
        return np.clip(np.rint(pixels + added), 0, white).astype(pixels.dtype)

    def _step(self, own: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The change of `uint16[N, channels]`, float32 in levels of 65535."""
        if self._has_profile(both_ways=True):
            before = libvips.to_srgb(own[None], self.profile)
            after = np.clip(np.rint(before + 257 * step), 0, 65535).astype(np.uint16)
            there = libvips.from_srgb(after, self.profile)[0].astype(np.float32)
            return there - libvips.from_srgb(before, self.profile)[0]
        if self.mode != "CMYK":
            return 257 * step[:, : self.channels]
        # Black stays, and the other inks let as much more or less light through as the change asks for.
        light = (65535 - own[:, 3:].astype(np.float32)) / 65535
        inks = np.divide(-257 * step, light, out=np.zeros_like(step), where=light > 0)
        return np.concatenate([inks, np.zeros_like(light)], -1)

    def _has_profile(self, both_ways: bool = False) -> bool:
        """Whether the profile can be used, and where it is asked for, also backwards: those of cameras only work forwards."""
        return colour.converts(self.profile, self.mode, both_ways)


def _without_profile(pixels: np.ndarray, mode: str) -> np.ndarray:
    """uint16 pixels that have no profile, as sRGB or grey."""
    if mode != "CMYK":
        return pixels
    light = 65535 - pixels.astype(np.float32)
    return np.rint(light[..., :3] * light[..., 3:] / 65535).astype(np.uint16)
