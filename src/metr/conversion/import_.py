"""Imports a detector of transformers, DINO or the METR of its authors into METR."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from metr.conversion.class_heads import ClassHeads, SolvedHeads, class_heads, solve, stands_for_none
from metr.conversion.convert import StateTransfer, TransferReport, and_derived, giving_to_ours, receive
from metr.conversion.preprocessing import Preprocessing, read_preprocessing
from metr.conversion.published import read_restricted
from metr.conversion.published.dino import DinoFile, read_dino
from metr.conversion.published.folders import check_kind, check_size
from metr.conversion.published.timm import TimmNetwork, check_network, timm_network, without_timm
from metr.conversion.table import State, adopted_backbone
from metr.conversion.targets import NAMES, find_target
from metr.data.config import ResizeConfig
from metr.errors import CheckpointError, ModelError, counted
from metr.hub import configuration, loading, pretrained
from metr.models.backbones.efficientnet_lite import STAGE_OF_STRIDE
from metr.models.backbones.hugging_face import strides_of
from metr.models.backbones.registered import EfficientNetLiteConfig, register
from metr.models.config import BackboneConfig, DetectorConfig
from metr.models.detector import Detector, skeleton
from metr.serialization import read_json
from metr.sources import DetectorSource, has_weights, refuse_without_weights

_STRIDES = (4, 8, 16, 32)
_STRIDE_OF_STAGE = {stage: stride for stride, stage in STAGE_OF_STRIDE.items()}
# names that stand for no category in the labels of published detectors
_NO_NAMES = ("LABEL_", "N/A")
# what a detector is adopted for, and what of it depends on names
_PARTS, _CLASSES = ("backbone.", "encoder.", "decoder.", "proposals."), ("decoder.similarity", "proposals.classifier")
# a logit that differs by more is another one
_MET = 1e-3
_ASSUMED = "the file names no labels: they are taken for COCO's, as there are 91; if they are not, give 91 names"
# ridge of the text projection's whitening, as a fraction of the embeddings' mean variance; as in the recipes
_RIDGE = 0.1
# the batches that a norm has averaged over, which nothing reads
_COUNTS = "num_batches_tracked"


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedDetector:
    """What METR takes from another detector.

    Attributes:
        title: The detector's name.
        config: The METR configuration that its weights fit.
        giving: Its weights under METR's names.
        names: Its categories, as far as it names them.
        resize: How its images are resized, if that is known.
        prompts: Text embeddings that are kept with the weights, of unnamed categories.
        class_heads: Its class heads, if METR's give what they give.
        differences: Why METR will not find exactly what it finds.
    """

    title: str
    config: DetectorConfig
    giving: StateTransfer
    names: tuple[str, ...] = ()
    resize: ResizeConfig | None = None
    prompts: Float[Tensor, "v t"] | None = None
    class_heads: ClassHeads | None = None
    differences: tuple[str, ...] = ()


def read_published(source: Path | DetectorSource) -> PublishedDetector:
    """Reads a folder of transformers, or a `.pth` file of DINO or of METR's authors. Nothing in it is executed.

    What METR has no counterpart of is refused before weights are fetched from the hub.

    Raises:
        CheckpointError: a file is missing, damaged, or would have to run code; or the hub does not give it.
        ModelError: METR has no counterpart of what it is.
    """
    if isinstance(source, DetectorSource):
        if source.kind == "transformers":
            _check_before_fetching(source)
        with source.in_its_name():
            return read_published(source.fetched())
    return _from_folder(source) if source.is_dir() else _from_file(source)


def _check_before_fetching(source: DetectorSource) -> None:
    """Checks by its configuration that METR can take a detector.

    Raises:
        ModelError: it cannot.
    """
    values = source.config
    check_kind(values, source.called, _adoptable())
    with loading(source.called):
        network = timm_network(values)
    if network is not None:
        check_network(network, source.called)
    elif source.repository is not None:
        register()
        with loading(source.called):
            check_size(configuration(source.path), source.called)


def adopt(
    published: PublishedDetector, text: Float[Tensor, "v t"], labels: Float[Tensor, "n t"] | None = None, seed: int = 0
) -> tuple[Detector, TransferReport]:
    """A METR with the weights of another detector.

    Args:
        published: What the other detector has.
        text: Text embeddings of the names that METR is to know: the text projection starts where these are told apart.
        labels: Text embeddings of the detector's own labels, for which METR's class heads are to give what its class
            heads give. Without them all that has to do with names starts afresh.
        seed: Seed of the weights that start afresh.

    Raises:
        ModelError: nothing fits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Detector(published.config, text.shape[1]).eval()
        if published.prompts is None and len(text) > 1:
            network.category_extraction.whiten(text, _RIDGE)
    giving, notes, differences = published.giving, [], list(published.differences)
    if labels is not None and published.class_heads is not None:
        solved = solve(published.class_heads, labels)
        giving = and_derived(giving, solved.derived)
        notes.append(_how_well(solved, len(labels)))
        if solved.error > _MET:
            differences.append(f"the logits of its labels are met within {solved.error:.1g} only")
        if published.class_heads.assumed:
            notes.append(_ASSUMED)
    report = receive(network, giving, source=published.title, name="METR", notes=notes)
    if lost := [key for key in report.afresh if key.startswith(_PARTS) and not key.startswith(_CLASSES)]:
        differences.append(
            f"{counted(len(lost), 'tensor')} {'starts' if len(lost) == 1 else 'start'} afresh, such as {lost[0]}"
        )
    return network, replace(report, differences=tuple(differences))


def _how_well(solved: SolvedHeads, labels: int) -> str:
    """How near METR's logits are to the detector's."""
    said = f"the class heads of its {labels} labels are met within {solved.error:.1g}"
    if solved.rank < labels:
        said += f": the texts of these labels have {solved.rank} directions only, so not all can be met"
    return said


def _from_file(path: Path) -> PublishedDetector:
    found = read_dino(read_restricted(path), path)
    _check_numbers(found.state, path)
    giving = giving_to_ours(found.state, found.rows, found.adopted.derived)
    _check_rows(found, giving.state, path)
    return PublishedDetector(
        title=found.title,
        config=found.adopted.config,
        giving=giving,
        names=tuple(name for name in found.names if not stands_for_none(name)),
        resize=found.resize,
        prompts=found.prompts,
        class_heads=class_heads(found.state, found.adopted, slice(None), found.names, assumed=True),
        differences=found.assumed,
    )


def _check_rows(found: DinoFile, given: State, path: Path) -> None:
    """Checks that the file has every tensor that it should have, in the shape that the others give it.

    Raises:
        ModelError: one is missing, or has another shape.
    """
    width = 1 if found.prompts is None else found.prompts.shape[-1]
    own = skeleton(found.adopted.config, width).state_dict()
    for key, tensor in own.items():
        theirs = next((row.theirs.format(**match) for row in found.rows if (match := row.match(key))), None)
        if theirs is None or not key.startswith(_PARTS) or key.endswith(_COUNTS):
            continue
        if key not in given:
            _check_whole([theirs], path)
        elif given[key].shape != tensor.shape:
            what = f"{theirs}: expected the shape {list(tensor.shape)} by the other tensors"
            hint = "; ".join(["download or copy it again", *found.assumed])
            raise ModelError(f"{what}, found {list(given[key].shape)}", where=path, hint=hint)


def _from_folder(folder: Path) -> PublishedDetector:
    model = _loaded(folder)
    _check_numbers(model.state_dict(), folder)
    labels, dropped = _labels(model.config, folder)
    published = published_model(model, read_preprocessing(folder), str(folder), labels)
    return replace(published, differences=(*dropped, *published.differences))


def published_model(
    model: Any, preprocessing: Preprocessing, called: str, labels: Mapping[str, int]
) -> PublishedDetector:
    """What METR takes from a detector that transformers has built, whose tensors these are then.

    Args:
        model: The detector.
        preprocessing: How its images are prepared.
        called: What it is called in messages.
        labels: The label of each name.

    Raises:
        ModelError: METR has no counterpart of it.
    """
    config = model.config
    target = find_target(config.model_type)
    assert target.adopt is not None
    state: State = model.state_dict(keep_vars=True)
    # a tensor that is kept under several names stays one
    state = {key: tensor.requires_grad_(False) for key, tensor in state.items()}
    try:
        backbone = preprocessing.coloured(_backbone(config, target.single_map, called))
        adopted = target.adopt(config, backbone, state)
    except ValidationError as error:
        raise ModelError(f"METR has no counterpart of its config.json: {_first_of(error)}", where=called) from None
    return PublishedDetector(
        title=target.title,
        config=adopted.config,
        giving=giving_to_ours(state, target.table(config, adopted.config).rows(), adopted.derived),
        names=tuple(labels),
        resize=preprocessing.resize,
        class_heads=class_heads(state, adopted, [*labels.values()] or slice(config.num_labels), tuple(labels)),
        differences=(*preprocessing.differences, *adopted.differences),
    )


def _first_of(error: ValidationError) -> str:
    """The first value that METR's configuration refuses, in words."""
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # several values that do not go together
        return said
    return f"{'.'.join(map(str, first['loc']))}: {said}, found {str(first['input'])[:80]}"


def _check_numbers(state: Mapping[str, Tensor], source: Path) -> None:
    """Checks that all weights are finite numbers.

    Raises:
        CheckpointError: some are not.
    """
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{key} holds numbers that are not finite", where=source, hint="download it again")


def _loaded(folder: Path) -> Any:
    """The detector of a folder, as transformers builds it.

    Raises:
        CheckpointError: the folder holds no weights, or they are damaged.
        ModelError: it cannot be loaded, or METR has no counterpart of it.
    """
    register()  # the folder may hold METR's own backbone
    values = read_json(folder / "config.json")
    check_kind(values, folder, _adoptable())
    with loading(str(folder)):
        network = timm_network(values)
        if network is not None:
            return _loaded_without_timm(values, network, folder)
        config = configuration(folder)
        check_size(config, folder, folder)
        if not has_weights(folder):
            refuse_without_weights([path.name for path in folder.iterdir()], folder)
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        model, told = pretrained("AutoModelForObjectDetection", folder, **options, ignore_mismatched_sizes=True)
    _check_shapes(told["mismatched_keys"], folder)
    _check_whole(told["missing_keys"], folder)
    return model


def _check_shapes(misfits: Iterable[tuple[str, Sequence[int], Sequence[int]]], folder: Path) -> None:
    """Checks that all weights have the shape that the configuration gives them.

    Args:
        misfits: Of those that have not: key, shape in the file, and shape by the configuration.
        folder: Where both lie, for messages.

    Raises:
        ModelError: some have not.
    """
    for key, found, expected in sorted(misfits):
        what = f"{key}: expected the shape {list(expected)} by its config.json, found {list(found)} in its weights"
        hint = "mend config.json (where a class head differs, the labels in id2label), or copy both files again"
        raise ModelError(what, where=folder, hint=hint)


def _check_whole(missing: Iterable[str], folder: Path, part: str = "") -> None:
    """Checks that all weights were there. Norms that were trained frozen have not counted their batches.

    Raises:
        ModelError: some were not.
    """
    if lost := sorted(key for key in missing if key.startswith(part) and not key.endswith(_COUNTS)):
        what = f"{'the backbone' if part else 'the network'} is not whole: {lost[0]} is missing"
        raise ModelError(what, where=folder, hint="download or copy it again")


def _loaded_without_timm(values: Mapping[str, Any], network: TimmNetwork, folder: Path) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING

    changed, state = without_timm(values, network, folder)
    config = CONFIG_MAPPING[values["model_type"]].from_dict(changed)
    check_size(config, folder)
    kind: Any = MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)]
    options = {"config": config, "state_dict": state, "dtype": torch.float32}
    model, told = pretrained(kind, None, **options, output_loading_info=True)
    _check_whole(told["missing_keys"], folder, find_target(config.model_type).backbone)
    return model


def _adoptable() -> list[str]:
    return [name for name in NAMES if find_target(name).adopt is not None]


def _backbone(config: Any, single_map: bool, called: str) -> BackboneConfig:
    """METR's configuration of the backbone of the detector `called` so, which may read the last map only."""
    found, options = config.backbone_config, config.to_dict()
    maps = 1 if single_map else len(found.out_features)
    own = found.model_type == EfficientNetLiteConfig.model_type
    strides = tuple(_STRIDE_OF_STAGE[stage] for stage in found.out_features) if own else strides_of(found, called)
    # of a plain vision transformer RT-DETR and its successors say it
    strides = strides or tuple(options.get("feat_strides") or _STRIDES[-maps:])[:maps]
    # the others have no such option, and freeze the norms always
    return adopted_backbone(found, strides[-maps:], options.get("freeze_backbone_batch_norms", True))


def _labels(config: Any, folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """The first label of each name, without placeholders, and in words what of its labels is left out.

    Raises:
        ModelError: a label has no output.
    """
    numbered = {int(number): str(name).strip() for number, name in sorted(config.id2label.items())}
    if unknown := [number for number in numbered if not 0 <= number < config.num_labels]:
        what = f"id2label has a label {unknown[0]}, and there are outputs 0 to {config.num_labels - 1}"
        raise ModelError(what, where=folder, hint="mend id2label in its config.json")
    named = {number: name for number, name in numbered.items() if name and not name.startswith(_NO_NAMES)}
    first = dict[str, int]()
    for number, name in named.items():
        first.setdefault(name, number)
    left_out = []
    if again := len(named) - len(first):
        left_out.append(f"{again} of its labels have the name of another one, and are left out")
    if named and (placeholders := sum(name.startswith("LABEL_") for name in numbered.values())):
        left_out.append(f"{placeholders} of its labels have no name (LABEL_...), and are left out")
    return first, tuple(left_out)
