"""The verbs of `metr` that use a detector, and the demo. What a verb needs is imported when it runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metr.cli.output import output_console, say_names
from metr.errors import ConfigError
from metr.processes import in_main_process

if TYPE_CHECKING:
    from metr.inference.config import InferenceConfig
    from metr.inference.predictor import Predictor
    from metr.model import METR, Names

__all__ = [
    "AllowEmpty",
    "Data",
    "Offline",
    "Overrides",
    "Prompts",
    "check_source",
    "demo",
    "detect",
    "evaluate",
    "push",
    "stay_offline",
    "transfer",
]

_TARGETS = "deformable_detr, dab_detr, conditional_detr, detr, rt_detr, rt_detr_v2, d_fine, deimv2, lw_detr or rf_detr"

_ENGINES = ("plain", "ray")
_RAY_DEVICES = ("auto", "cpu", "cuda")

Data = Annotated[
    list[str],
    typer.Argument(help="Datasets: a folder, name=folder, or a YAML file that lists some.", metavar="DATA"),
]
_Run = Annotated[str, typer.Argument(help="A run folder, a checkpoint folder, or a name on the hub.", metavar="RUN")]
_Source = Annotated[
    str,
    typer.Argument(
        help="A METR (run, checkpoint), a folder of transformers, a .pth of DINO, or a name on the hub: user/name, "
        "user/name@revision.",
        metavar="SOURCE",
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Ask the hub for nothing: take what was downloaded before.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="One value of the recipe: section.key=value; may be repeated."),
]
_InferenceOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="One value of how it detects: inference.section.key=value; may be repeated."),
]
_BatchSize = Annotated[int, typer.Option(help="Images a step.", min=1)]
Prompts = Annotated[
    str,
    typer.Option(help="The prompt of a dataset for a name trained without it: trained (left out) or given (used)."),
]
AllowEmpty = Annotated[
    bool, typer.Option("--allow-empty", help="Use splits without a box, or of which most was lost while reading.")
]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]


_Images = Annotated[
    list[str] | None,
    typer.Argument(
        help="Images, folders of images, or patterns such as '**/*.jpg'.", metavar="IMAGE", show_default=False
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


def evaluate(
    source: _Source,
    data: Data,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Where results go; by default evaluation or evaluation-SPLIT, in SOURCE if it is a run."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="The split, or all for every image; by default val (test where there is nothing to train on)."
        ),
    ] = None,
    prompts: Prompts = "trained",
    batch_size: _BatchSize = 8,
    device: _Device = "auto",
    set_: _InferenceOverrides = None,
    store: Annotated[
        bool, typer.Option("--store", help="Keep each name's best threshold in the checkpoint, for detect.")
    ] = False,
    allow_empty: AllowEmpty = False,
    offline: Offline = False,
) -> None:
    """Measure average precision on datasets. Own names, the joint vocabulary, confusion between datasets."""
    from metr.inference.config import inference_config

    stay_offline(offline)
    check_source(source)
    run, metr = Path(source), _is_metr_here(source)
    if store and not metr:
        what = "thresholds are kept in a METR on this machine, and this is none"
        hint = "keep one first: metr transfer --from SOURCE -o OUT; or download it"
        raise ConfigError(what, where="--store", hint=hint)
    values = {"prompts": prompts, "inference": inference_config(set_ or (), batch_size=batch_size)}
    from metr.evaluation.results import EvaluationConfig, store_thresholds
    from metr.evaluation.runner import evaluate as run_evaluation

    config = EvaluationConfig.checked(values, where="evaluate")
    # what is no run is not written into
    folder = "evaluation" if split is None else f"evaluation-{split}"
    out = out or (run / folder if metr else Path(folder))
    console = output_console()
    report = run_evaluation(
        source, data, out, split=split, device=device, config=config, allow_empty=allow_empty, console=console
    )
    if store and in_main_process():
        store_thresholds(report, run, console)
        if split == "test":
            note = "these thresholds were chosen on test: precision and recall there now look better than they are"
            console.print(note, highlight=False, soft_wrap=True)


def detect(
    source: _Source,
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
    threshold: Annotated[
        float | None,
        typer.Option(help="Least score; by default each name's own, to draw, and all for the JSON.", min=0, max=1),
    ] = None,
    nms: Annotated[
        float | None,
        typer.Option(help="IoU over which the weaker of two boxes of one name goes; 1: none.", min=0, max=1),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="At drawn boxes: names (and scores), scores or none; by default names.", show_default=False),
    ] = None,
    batch_size: _BatchSize = 8,
    device: _Device = "auto",
    engine: _Engine = "plain",
    actors: _Actors = None,
    part_size: _PartSize = None,
    set_: _InferenceOverrides = None,
    offline: Offline = False,
) -> None:
    """Find objects in images. Any names can be asked for, trained or not."""
    from metr.inference.config import inference_config
    from metr.inference.image_paths import images_to_draw, listed_images
    from metr.inference.request import check_labels, names_to_find

    # mistakes are found before torch is imported and the detector is loaded
    _check_engine(engine, {"--labels": labels}, {"--actors": actors, "--part-size": part_size})
    style, names = check_labels(labels or "names"), names_to_find(categories, categories_file)
    changes = {"score_threshold": threshold, "nms_iou": nms}
    config = inference_config(set_ or (), batch_size=batch_size, postprocess=changes)
    paths: list[str | Path] = [*(images or ()), *(path for file in images_from or () for path in listed_images(file))]
    if not paths:
        raise ConfigError("expected images", where="IMAGE", hint="a file, a folder, or --images-from FILE")
    stay_offline(offline)
    check_source(source)
    files = None if engine == "ray" else images_to_draw(paths, out)
    from metr.inference.detect_files import detect_files
    from metr.model import METR

    model = METR.from_pretrained(source, device="cpu" if files is None else device)
    every = categories is not None and categories.strip() == "all"
    asked = model.names if every else model.default_names if names is None else names
    if files is None:
        options = {"device": device, "actors": actors, "part_size": part_size}
        _detect_with_ray(model, asked, config, paths, out, options)
    else:
        thresholds, console = model.thresholds(threshold, asked), output_console()
        detect_files(model.predictor(asked, config), files, out, thresholds=thresholds, labels=style, console=console)
    say_names("looked for", tuple(asked), len(model.names))


def check_source(source: str) -> None:
    """Checks that a detector is there, before torch is imported to load it. What may be on the hub is not asked for.

    Raises:
        CheckpointError: there is none.
    """
    from metr.sources import look_here

    look_here(source)


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


def transfer(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the detector goes.")],
    run: Annotated[
        str | None, typer.Argument(help="A run folder, a checkpoint folder, or a name on the hub.", metavar="RUN")
    ] = None,
    to: Annotated[str | None, typer.Option(help=f"A detector of transformers: {_TARGETS}.")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Make a METR of this: a folder of transformers, a name on the hub (user/name, user/name@revision), "
            "or a .pth of DINO or METR.",
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(help='What it is to find: "penguin, shark", or a dataset; by default what it knows.'),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="With --from: the text encoder's folder or hub name; by default the bundled one."),
    ] = None,
    offline: Offline = False,
) -> None:
    """Move weights to a detector of transformers, or from other detectors. Reports what becomes of every weight."""
    stay_offline(offline)
    if source is not None:
        if run is not None or to is not None:
            hint = "metr transfer --from SOURCE -o OUT"
            raise ConfigError("expected --from alone, without RUN and --to", where="--from", hint=hint)
        from metr.conversion.transfer import adopt_file

        adopt_file(source, out, names=names, text=text, console=output_console())
        return
    if run is None or to is None:
        hint = "metr transfer RUN --to rt_detr -o OUT, or metr transfer --from SOURCE -o OUT"
        raise ConfigError("expected RUN and --to", where="transfer", hint=hint)
    if text is not None:
        raise ConfigError("goes with --from only: a METR has its text encoder", where="--text", hint="leave it out")
    check_source(run)
    from metr.conversion.transfer import transfer as transfer_run

    transfer_run(run, to, out, names=names, console=output_console())


def stay_offline(offline: bool) -> None:
    """Keeps the command from asking the hub, if that is asked for."""
    if offline:
        from metr.hub import go_offline

        go_offline()


def _is_metr_here(source: str) -> bool:
    """Whether this is a METR on this machine: a run or a checkpoint, into which may be written."""
    from metr.sources import find_source

    return Path(source).is_dir() and find_source(source).kind == "metr"


def push(
    run: _Run,
    name: Annotated[str, typer.Argument(help="The repository: user/name; made if it is missing.", metavar="NAME")],
    half: Annotated[bool, typer.Option("--half", help="Send float16 weights: half the size.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="The model's, as the hub calls it: apache-2.0, ...")
    ] = None,
    branch: Annotated[
        str | None, typer.Option(help="Of the repository, made if it is missing; by default main.")
    ] = None,
) -> None:
    """Share a detector on the Hugging Face hub. Sends weights and a model card; log in with `hf auth login` first."""
    check_source(run)
    import torch

    from metr.sharing.push import push as push_run

    dtype = torch.float16 if half else None
    place = push_run(run, name, dtype=dtype, licence=licence, private=private or None, branch=branch)
    output_console().print(f"{name} is shared: {place}", markup=False, highlight=False, soft_wrap=True)


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where everything goes.")] = Path("demo"),
    set_: Overrides = None,
) -> None:
    """Try it all on synthetic images. Draws three small datasets, trains on them jointly, evaluates, detects."""
    from metr.demo.run import run_demo

    run_demo(out, output_console(), tuple(set_ or ()))
