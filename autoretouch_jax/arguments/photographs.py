"""The arguments of the verbs that use a trained model: on pairs, on photographs, on a page, in other software."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff, Positional

from autoretouch_jax.config.schema import Faces, Metadata


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure models on pairs, beside doing nothing (the identity row), and on photographs that should not change.

    autoretouch evaluate pretrained runs/a --source BEFORE --target AFTER --leave-alone PHOTOS

    On several hosts, give the same command on each of them; each measures its share. See launch/.
    """

    # Texts and not Paths: they may be in gs:// or s3://.
    models: Positional[tuple[str, ...]]
    """Runs, or their model/ folders, or `pretrained`, the model in the box: a row each."""
    source: Path | None = None
    """Folder of images before retouching."""
    target: Path | None = None
    """Folder of images after retouching, paired by name."""
    leave_alone: Path | None = None
    """Folder of photographs in which nothing is to be retouched. Every change of a model there is harm."""
    edit_threshold: float | None = None
    """Levels of 255 from which a change counts as an edit, as --data.edit-threshold. Left out, it is measured for each pair."""
    faces: Faces = "auto"
    """`auto` edits the faces, at the size that the model was trained at. `off` edits the whole image as it is. `all` as in
    `retouch`."""
    json: Path | None = None
    """Also write every number to this file."""
    csv: Path | None = None
    """Also write the metrics of every image to this file, a row for the identity and one for each model."""
    pictures: Path | None = None
    """Also write source, output, target and amplified difference of each pair to this folder."""
    lpips: Literal["none", "squeeze", "alex", "vgg16"] = "none"
    """Also measure the perceptual distance LPIPS 0.1 to the target, with this backbone."""
    lpips_weights: str = "download"
    """The backbone's ImageNet weights as torchvision names them (.pth, .npz), or `download`."""
    lpips_heads: str = "download"
    """LPIPS' linear heads (.pth, .npz), or `download`."""


@dataclass(frozen=True)
class RetouchArguments:
    """Retouch the faces in photographs of any size. Format, depth, colour profile and metadata are kept.

    With the model in the box:  autoretouch retouch PHOTO.jpg --out retouched

    With your own, a folder with its tree:  autoretouch retouch PHOTOS --out retouched --model runs/a

    Go on after a stop:  autoretouch retouch PHOTOS --out retouched --skip-existing
    """

    photos: Positional[tuple[Path, ...]]
    """Photos, or folders of photos. What lies in OUT is no photo of the job."""
    out: Path
    """Folder for the results. A folder keeps its tree there; of several folders, each does below its own name."""
    # A text and not a Path: it may be in gs:// or s3://.
    model: str = "pretrained"
    """A run, its model/ folder, or `pretrained`, the model in the box."""
    strength: float = 1.0
    """From 0, which leaves the photo as it is, to 1.5. 1 applies all of the model's retouch."""
    faces: Faces = "auto"
    """`auto` finds the faces and retouches them and the skin around; without a face the photo stays as it is. `all` includes
    faces of which the detector is less sure. `off` retouches the whole photo as it is, and so does any model that was trained
    without faces."""
    face_size: float | None = None
    """Bring faces to this size, from brows to chin in pixels, instead of the one that the model was trained at."""
    mask: Path | None = None
    """A grey image of the photo's size: white may be edited, black stays. Or a folder of such masks, named as the results."""
    metadata: Metadata = "keep"
    """`keep` keeps all metadata and renews the preview. `safe` drops location and preview. `none` drops all but the colour
    profile and the orientation."""
    compare: Path | None = None
    """Also write a picture of each photo to this folder: before, after, and the change × 8, side by side."""
    report: Path | None = None
    """Also write a line of JSON for each photo to this file: status, faces, share of the pixels edited, seconds."""
    skip_existing: FlagCreatePairsOff[bool] = False
    """Leave out photos whose result is there already: the same command completes a job that was stopped."""
    shard: str | None = None
    """Retouch one part of the photos: 3/64 is the third of 64 parts. Give every task of a job array another part."""


@dataclass(frozen=True)
class ExportArguments:
    """Write a model as one file for other software: ONNX, or StableHLO as `jax.export` writes it. It takes images of any size.

    autoretouch export pretrained --to onnx --out retouch.onnx

    The file's outputs are compared with JAX' before it is written. It holds the gate; faces are found outside of it.
    """

    # A text and not a Path: it may be in gs:// or s3://.
    model: Positional[str]
    """A run, its model/ folder, or `pretrained`, the model in the box."""
    to: Literal["onnx", "stablehlo"]
    """`onnx` (extra `onnx`) for onnxruntime, browsers and telephones. `stablehlo` (extra `stablehlo`) for JAX without this
    package."""
    out: Path
    """The file to write."""
    precision: Literal["float32", "float16"] = "float32"
    """What the layers compute in. float16 halves the file, and its output may be up to 4 levels of 255 from JAX'."""


@dataclass(frozen=True)
class ServeArguments:
    """Retouch photographs on a page in your browser, and over HTTP (extra `serve`). Only this computer reaches it.

    With the model in the box:  autoretouch serve

    With your own:  autoretouch serve runs/a --port 8800

    Then open the address that it prints, or send photographs to /retouch there: docs/serving.md.
    """

    # A text and not a Path: it may be in gs:// or s3://.
    model: Positional[str] = "pretrained"
    """A run, its model/ folder, or `pretrained`, the model in the box."""
    host: str = "127.0.0.1"
    """The address at which it answers. 0.0.0.0 lets every computer in the network use it, without a password."""
    port: int = 8765
    """The port. 0 takes any free one."""
    max_megabytes: float = 250.0
    """The largest file, in millions of bytes."""
    max_megapixels: float = 100.0
    """The largest photograph, in millions of pixels."""
    timeout: float = 300.0
    """Seconds for the upload, and again for the answer."""
    at_once: int = 2
    """Number of photographs that are worked on at the same time."""
    waiting: int = 16
    """Number of photographs that wait for their turn. More are turned away until then."""


@dataclass(frozen=True)
class ModelsArguments:
    """List the networks: parameters, receptive field, multiply-accumulates at 512² and 1024², source."""


@dataclass(frozen=True)
class AverageArguments:
    """Average models that were trained from the same weights on: often better than each of them (a model soup)."""

    models: Positional[tuple[str, ...]]
    """MODEL MODEL…: runs or their model/ folders, or `pretrained`. Gates are those of the first one."""
    out: Path
    """The model folder to write. evaluate, retouch and --train.start-from take it."""


@dataclass(frozen=True)
class ConvertArguments:
    """Convert a trained PyTorch generator of pix2pix or pix2pixHD: its state dict becomes a model/ folder."""

    weights: Positional[Path]
    """A .pth state dict (read without executing it) or .npz: pix2pix' U-Net, pix2pixHD's global generator or local enhancer."""
    out: Path
    """The model folder to write. evaluate and retouch take it."""
    test_mode: Literal["eval", "train"] = "eval"
    """For pix2pix: how the model retouches. `eval` uses the moving averages and no dropout, as the authors' code does with
    --eval. `train` uses the photograph's own statistics and dropout, as it does by default. model.json states it."""
