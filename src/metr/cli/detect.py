"""`metr detect`: objects in images, large images and videos."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metr.cli.output import output_console, say_names
from metr.cli.verbs import BatchSize, Device, InferenceOverrides, Offline, Source, check_source, stay_offline
from metr.errors import ConfigError

if TYPE_CHECKING:
    from metr.inference.config import InferenceConfig, TilesConfig
    from metr.inference.image_paths import ImagesToDraw
    from metr.inference.predictor import Predictor
    from metr.model import METR, Names

__all__ = ["detect"]

_ENGINES = ("plain", "ray")
_RAY_DEVICES = ("auto", "cpu", "cuda")

_Images = Annotated[
    list[str] | None,
    typer.Argument(
        help="Images, folders of images, or patterns such as '**/*.jpg'; or videos, or camera:0.",
        metavar="IMAGE",
        show_default=False,
    ),
]
_ImagesFrom = Annotated[
    list[Path] | None,
    typer.Option(help="A text file that lists images, one path a line; may be repeated.", metavar="FILE"),
]
_Engine = Annotated[str, typer.Option(help="plain: this process; ray: Ray Data, for millions of images (Parquet).")]
_Actors = Annotated[
    int | None,
    typer.Option(help="With --engine ray: detectors at a time; by default one a GPU, else one a core.", min=1),
]
_PartSize = Annotated[
    int | None, typer.Option(help="With --engine ray: images of a file; by default at most 1000.", min=1)
]
_Tiles = Annotated[
    str | None,
    typer.Option(help="Look at large images tile by tile: pixels of a tile, 640 or 640x480.", metavar="PIXELS"),
]
_Save = Annotated[
    list[str] | None,
    typer.Option(help="Write what is drawn also as crops, csv, coco or yolo; may be repeated.", metavar="FORM"),
]
_Recursive = Annotated[
    bool, typer.Option("--recursive/--no-recursive", help="Whether subfolders of a folder are looked at.")
]
_Threshold = Annotated[
    float | None,
    typer.Option(help="Least score; by default each name's own, to draw, and all for the JSON.", min=0, max=1),
]
_Track = Annotated[bool, typer.Option("--track", help="Of a video: number the objects.")]
_Frames = Annotated[int | None, typer.Option(help="Of a video or camera: at most so many frames.", min=1)]


def detect(
    source: Source,
    images: _Images = None,
    *,
    images_from: _ImagesFrom = None,
    categories: Annotated[
        str | None,
        typer.Option(
            help='Names to look for, "penguin, shark"; "all": every trained name. By default the names of the last '
            "fine-tuning, or every one."
        ),
    ] = None,
    categories_file: Annotated[
        Path | None,
        typer.Option(help="Names to look for: one a line, or YAML that gives each name its phrases.", metavar="FILE"),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where drawn images and JSON go, or Parquet.")] = Path(
        "detections"
    ),
    threshold: _Threshold = None,
    nms: Annotated[
        float | None,
        typer.Option(help="IoU over which the weaker of two boxes of one name goes; 1: none.", min=0, max=1),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="At drawn boxes: names (and scores), scores or none; by default names.", show_default=False),
    ] = None,
    recursive: _Recursive = True,
    tiles: _Tiles = None,
    save: _Save = None,
    track: _Track = False,
    frames: _Frames = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    engine: _Engine = "plain",
    actors: _Actors = None,
    part_size: _PartSize = None,
    set_: InferenceOverrides = None,
    offline: Offline = False,
) -> None:
    """Find objects in images and videos. Any names can be asked for, trained or not."""
    from metr.inference.config import inference_config
    from metr.inference.image_paths import as_videos, check_images_there, images_to_draw
    from metr.inference.request import check_forms, check_labels, names_to_find, parsed_tiles
    from metr.writable import check_folder_to_write

    # mistakes are found before torch is imported and the detector is loaded
    moving: dict[str, object] = {"--track": track or None, "--frames": frames}
    drawing = {"--labels": labels, "--tiles": tiles, "--save": save, **moving}
    _check_engine(engine, drawing, {"--actors": actors, "--part-size": part_size})
    style, names = check_labels(labels or "names"), names_to_find(categories, categories_file)
    tiling, forms = None if tiles is None else parsed_tiles(tiles), check_forms(save or (), out)
    paths = _paths(images, images_from)
    videos = None if engine == "ray" else as_videos(paths)
    _check_video(videos is not None, {"--save": save}, moving)
    # weak detections help to track
    changes = {"score_threshold": threshold if videos is None else None, "nms_iou": nms}
    config = inference_config(set_ or (), batch_size=batch_size, postprocess=changes)
    stay_offline(offline)
    check_source(source)
    check_images_there(() if videos is not None else images or ())
    check_folder_to_write(out)
    files = None if engine == "ray" or videos is not None else images_to_draw(paths, out, recursive=recursive)
    from metr.inference.calibrated_names import checked_calibrations
    from metr.model import METR

    model = METR.from_pretrained(source, device="cpu" if engine == "ray" else device)
    asked = _asked(model, categories, names)
    config = checked_calibrations(config, tuple(asked), model.names, model.meant(tuple(asked)))
    if engine == "ray":
        resources = {"device": device, "actors": actors, "part_size": part_size}
        _detect_with_ray(model, asked, config, paths, out, resources)
    else:
        predictor = model.predictor(asked, config)
        shown = {"thresholds": model.thresholds(threshold, asked), "labels": style, "console": output_console()}
        if files is None:
            _detect_in_videos(predictor, tiling, videos or (), out, {"tracked": track, "frames": frames, **shown})
        else:
            _detect_in_images(predictor, tiling, files, out, {"forms": forms, **shown})
    say_names("looked for", tuple(asked), len(model.names))


def _paths(images: Sequence[str] | None, lists: Sequence[Path] | None) -> list[str | Path]:
    """The images, folders, patterns and videos that are given and listed."""
    from metr.inference.image_paths import listed_images

    paths: list[str | Path] = [*(images or ()), *(path for file in lists or () for path in listed_images(file))]
    if not paths:
        raise ConfigError("expected images", where="IMAGE", hint="a file, a folder, or --images-from FILE")
    return paths


def _asked(model: "METR", categories: str | None, names: "Names | None") -> "Names":
    """The names to look for; `all` are those that were trained."""
    from metr.text.same_names import asked_names

    if categories is not None and categories.strip() == "all":
        return model.names
    if names is None:
        return model.default_names
    asked_names(names, model.names)  # before ray's actors are started
    return names


def _detect_in_images(
    predictor: "Predictor", tiling: "TilesConfig | None", files: "ImagesToDraw", out: Path, options: Mapping[str, Any]
) -> None:
    from metr.inference.detect_files import detect_files
    from metr.inference.tiles import TiledPredictor

    detect_files(predictor if tiling is None else TiledPredictor(predictor, tiling), files, out, **options)


def _detect_in_videos(
    predictor: "Predictor", tiling: "TilesConfig | None", videos: Sequence[str], out: Path, options: Mapping[str, Any]
) -> None:
    from metr.inference.tiles import TiledPredictor
    from metr.inference.video import detect_video

    for video in videos:
        detect_video(predictor if tiling is None else TiledPredictor(predictor, tiling), video, out, **options)


def _check_video(video: bool, images: Mapping[str, object], videos: Mapping[str, object]) -> None:
    """Refuses options that images, or videos, have no use for."""
    for option, value in (images if video else videos).items():
        if value is not None:
            kind = "images" if video else "videos and cameras"
            raise ConfigError(f"goes with {kind} only", where=option, hint="leave it out")


def _check_engine(engine: str, drawing: Mapping[str, object], ray: Mapping[str, object]) -> None:
    """Refuses an unknown engine, and options that the chosen one has no use for."""
    if engine not in _ENGINES:
        raise ConfigError(f"no engine {engine!r}", where="--engine", hint=" or ".join(_ENGINES))
    useless, why = (drawing, "ray draws nothing") if engine == "ray" else (ray, "goes with --engine ray only")
    for option, value in useless.items():
        if value is not None:
            hint = "leave it out, or take --engine " + ("plain" if engine == "ray" else "ray")
            raise ConfigError(f"{why}, so this option has no use", where=option, hint=hint)


def _detect_with_ray(
    model: "METR",
    asked: "Names",
    config: "InferenceConfig",
    images: Sequence[str | Path],
    out: Path,
    options: Mapping[str, Any],
) -> None:
    from metr.inference.detect_ray import RayConfig, detect_with_ray
    from metr.model import METR

    if options["device"] not in _RAY_DEVICES:
        what = (
            f"expected {', '.join(_RAY_DEVICES)} with --engine ray, which chooses the GPU, found {options['device']!r}"
        )
        raise ConfigError(what, where="--device", hint="CUDA_VISIBLE_DEVICES limits which GPUs it may use")
    # of a name on the hub it is the download, or the commit, so that all actors have one and the same
    same = str(model.folder) if model.source is None or model.folder is not None else model.source.pinned

    def load(device: str) -> "Predictor":
        return METR.from_pretrained(same, device=device).predictor(asked, config)

    detect_with_ray(load, images, out, config=RayConfig(**options), console=output_console())
