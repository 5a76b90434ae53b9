"""Configuration: loaded from YAML, merged with overrides, checked key by key, reported once."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from metr.bounded_yaml import load_yaml, load_yaml_file, yaml_fault
from metr.errors import ConfigError, did_you_mean
from metr.union_issues import by_key

Tree = dict[str, Any]
ConfigT = TypeVar("ConfigT", bound="Config")
Calibration = tuple[Annotated[float, Field(gt=0, le=1000)], Annotated[float, Field(ge=-1000, le=1000)]]
"""Scale and shift of the logit of a score, which make of it the probability of being right."""

_RENAMED = {
    "foreign": "unannotated",
    "agreement": "similarity",
    "teacher": "pseudo_labels",
    "flat_share": "flat_fraction",
    "foreign_slots": "negative_slots",
    "names": "vocabulary_sample",
    "tensorboard": "trackers",
    "share": "fraction",
}
"""Keys that had another name once, and their names now."""
_RENAMED_VALUES = {"assume_absent": "negative", "teacher": "pseudo_label"}
"""Values of `unannotated` that had another name once, and their names now."""
_REMOVED = {
    "hardness": ("mixture", "proportional, sqrt, equal, or a weight for each dataset"),
    "related": ("similar", "the similarity from which names are reported"),
}
"""What there once was, as a key or as the value of a key: the key that is left, and what it may be."""
OTHERS_WORDS = {
    "augmentation.resize.size": "image_size img_size imgsz imgs input_size img_scale resolution size min_size",
    "augmentation.resize.longest": "max_size longest_edge",
    "augmentation.flip": "fliplr flip_prob horizontal_flip",
    "augmentation.hue": "hsv_h",
    "augmentation.mosaic.probability": "mosaic_prob mosaic_probability",
    "augmentation.mosaic.scale": "mosaic_scale scaling_range",
    "augmentation.mosaic.until": "close_mosaic no_aug_epochs no_aug_epoch stop_epoch",
    "augmentation.saturation": "hsv_s",
    "augmentation.brightness": "hsv_v",
    "loader.batch_size": "batch bs train_batch_size per_device_train_batch_size ims_per_batch samples_per_gpu",
    "loader.workers": "num_workers dataloader_num_workers workers_per_gpu",
    "inference.batch_size": "per_device_eval_batch_size eval_batch_size",
    "inference.postprocess.score_threshold": "conf confidence score_thr box_score_thresh",
    "inference.postprocess.nms_iou": "iou iou_threshold nms_thresh iou_thres",
    "inference.postprocess.max_detections": "max_det max_per_img detections_per_image",
    "model.backbone.name": "arch model_name",
    "model.queries.number": "num_queries num_query num_object_queries",
    "model.width": "hidden_dim d_model embed_dims",
    "train.freeze": "freeze_at frozen_stages",
    "train.loop.accumulation": "accumulate gradient_accumulation_steps grad_accum_steps",
    "train.loop.checkpoint_every": "save_period save_steps checkpoint_period checkpoint_interval",
    "train.loop.compile": "torch_compile",
    "train.loop.evaluate_every": "eval_steps eval_period val_interval eval_interval evaluation_interval",
    "train.loop.log_every": "logging_steps log_interval log_period print_freq",
    "train.loop.precision": "amp fp16 bf16 half mixed_precision",
    "train.loop.steps": "max_iter max_iters max_steps iterations iters num_steps train_steps",
    "train.loop.trackers": "report_to wandb logger loggers",
    "train.optimizer.backbone_multiplier": "lr_backbone backbone_lr backbone_lr_mult lr_mult",
    "train.optimizer.clip_norm": "max_grad_norm grad_clip clip_grad clip_max_norm gradient_clip_val",
    "train.optimizer.epsilon": "eps adam_epsilon",
    "train.optimizer.learning_rate": "lr lr0 base_lr learningrate",
    "train.optimizer.weight_decay": "wd",
    "train.schedule.kind": "lr_scheduler lr_scheduler_type scheduler cos_lr",
    "train.schedule.warmup_steps": "warmup warmup_iters warmup_epochs",
}
"""Keys of a training run, and what Ultralytics, Detectron2, MMDetection, transformers and DETR call the same."""
_FROM_OTHERS = {word: key for key, words in OTHERS_WORDS.items() for word in words.split()}
_OPTIONS = {
    **dict.fromkeys(("epochs", "epoch", "max_epochs", "num_train_epochs", "num_epochs"), "--epochs N"),
    **dict.fromkeys(("data", "dataset", "datasets"), "DATA, the first argument"),
    **dict.fromkeys(("output_dir", "work_dir", "project", "save_dir", "out", "output"), "-o RUN"),
    **dict.fromkeys(("weights", "checkpoint", "load_from", "pretrained_model"), "metr finetune DATA --from CHECKPOINT"),
    **dict.fromkeys(("resume", "resume_from", "resume_from_checkpoint"), "--resume"),
    **dict.fromkeys(("shots", "fraction"), "an option of its own: --shots K or --fraction F"),
}
"""What is an option of the command line and no key, by what it may be called."""
_FORMS = {"mixture": "proportional, sqrt, equal, or a weight for each dataset, as {photos: 2, cells: 1}"}
"""Keys whose values have more than one form, and these."""
# what YAML 1.1 takes for a word for want of a dot or a sign: 1e-4, 2E5
_POWER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
# characters of a faulty value that a message repeats
_LONGEST = 120


class Config(BaseModel):
    """Base of every configuration class: frozen, strict about keys that it does not know, finite in every number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def checked(cls: type[ConfigT], values: Mapping[str, Any], *, where: object = None) -> ConfigT:
        """An instance from plain values.

        Raises:
            ConfigError: a key is unknown or a value is of the wrong kind; the message names the key.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _explained(cls, error.errors(), where) from None

    @classmethod
    def check_keys(cls, values: Mapping[str, Any], *, where: object = None) -> None:
        """Checks keys and kinds of values, but not what values mean together: a part may be missing here.

        Raises:
            ConfigError: a key is unknown or a value is of the wrong kind; the message names the key.
        """
        try:
            cls.model_validate(dict(values))
        except ValidationError as error:
            if issues := [issue for issue in error.errors() if issue["type"] != "value_error"]:
                raise _explained(cls, issues, where) from None


def leave_options(config: Config, options: Sequence[str], why: str) -> None:
    """Refuses options that mean nothing beside others of the same part, unless they are as they are by default.

    Args:
        config: The part.
        options: Their names.
        why: What the message says between an option's name and its default.

    Raises:
        ValueError: one is set otherwise.
    """
    found = dict(config)
    for option in options:
        default = type(config).model_fields[option].default
        if found[option] != default:
            raise ValueError(f"{option} {why} {default!r}")


def read_yaml(path: Path, *, as_written: bool = False) -> Tree:
    """The mapping that a YAML file holds; `as_written` leaves every scalar the text that is written there.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something else than a mapping.
    """
    if not path.is_file():
        raise ConfigError("no such configuration file", where=path, hint="check the path")
    try:
        values = load_yaml_file(path, as_written=as_written)
    except (yaml.YAMLError, OSError) as error:
        raise ConfigError(f"not readable as YAML: {yaml_fault(error)}", where=path) from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"expected keys and values, found a {type(values).__name__}", where=path)
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(
                f"expected keys that are words, found {repr(key)[:_LONGEST]}", where=path, hint="put it in quotes"
            )
    return values


def as_yaml(config: Config) -> str:
    """The configuration as YAML, in the order of its fields."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def leaves(tree: Mapping[str, Any], section: str = "") -> Tree:
    """Every setting of a nested mapping by its dotted key."""
    flat: Tree = {}
    for key, value in tree.items():
        place = f"{section}{key}"
        flat |= leaves(value, f"{place}.") if isinstance(value, Mapping) and value else {place: value}
    return flat


def differences(first: Config, second: Config) -> list[tuple[str, Any, Any]]:
    """(dotted key, first value, second value) of every setting that differs; None where one of them lacks the key."""
    return list(_differences(first.model_dump(mode="json"), second.model_dump(mode="json"), ""))


def _differences(first: Mapping[str, Any], second: Mapping[str, Any], section: str) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*first, *second]):
        ours, theirs, place = first.get(key), second.get(key), f"{section}{key}"
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{place}.")
        elif ours != theirs:
            yield place, ours, theirs


def merge(base: Mapping[str, Any], *layers: Mapping[str, Any]) -> Tree:
    """`base` with later layers laid over it, mapping by mapping; lists and scalars are replaced whole."""
    result: Tree = dict(base)
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            both = isinstance(below, Mapping) and isinstance(value, Mapping)
            result[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return result


def parse_overrides(assignments: Sequence[str]) -> Tree:
    """`["optimizer.learning_rate=1e-4", ...]` as a nested mapping; values are read as YAML.

    Raises:
        ConfigError: an assignment has no `=` or no key.
    """
    tree: Tree = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            hint = "write it as section.key=value, for example optimizer.learning_rate=1e-4"
            raise ConfigError(f"expected key=value, found {assignment!r}", where="--set", hint=hint)
        tree = merge(tree, unflattened({path.strip(): _scalar(text)}))
    return tree


def unflattened(flat: Mapping[str, Any]) -> Tree:
    """The nested mapping whose `leaves` these are."""
    tree: Tree = {}
    for path, leaf in flat.items():
        value: Any = leaf
        for key in reversed(path.split(".")):
            value = {key: value}
        tree = merge(tree, value)
    return tree


def _scalar(text: str) -> Any:
    """A YAML value; numbers such as 1e-4, which YAML 1.1 takes for words, are numbers, and quoted ones are words."""
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    return float(text) if isinstance(value, str) and _POWER.fullmatch(text.strip()) else value


def _explained(cls: type[BaseModel], issues: Sequence[ErrorDetails], where: object) -> ConfigError:
    lines, hint = [], None
    for key, (issue, *others) in by_key(cls, issues):
        if issue["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}")
            hint = hint or _hint_for_key(key, issue["input"], _fields_at(cls, issue), [*_keys_of(cls)])
        else:
            what = _none_of([issue, *others]) if others else _issue(issue)
            # what a whole configuration contradicts has no key of its own
            lines.append(f"{key!r}: {what}" if key else what)
            hint = hint or _hint_for_value(issue, key)
    return ConfigError("; ".join(lines), where=where or cls.__name__, hint=hint)


def _hint_for_key(key: str, value: object, known: Sequence[str], keys: Sequence[str]) -> str:
    """What to write in place of an unknown key: its name of today or here, or the nearest that is known."""
    section, _, last = key.rpartition(".")
    prefix = f"{section}." if section else ""
    if (new := _RENAMED.get(last)) in known:
        renamed = _RENAMED_VALUES.get(value) if isinstance(value, str) else None
        more = f", and its value {value!r} is called {renamed!r}" if renamed else ""
        return f"{key!r} is called '{prefix}{new}' now{more}"
    if (left := _REMOVED.get(last)) and left[0] in known:
        return f"{key!r} was removed; '{prefix}{left[0]}' is {left[1]}"
    if elsewhere := _called_here(last, value, keys):
        return elsewhere
    return did_you_mean(last, known)


def _called_here(word: str, value: object, keys: Sequence[str]) -> str | None:
    """How METR calls what other libraries call by this word, or where a key of this name is; None if nowhere.

    Args:
        word: The last part of an unknown key.
        value: Its value.
        keys: All dotted keys of the configuration.
    """
    word = word.lower().replace("-", "_")
    same = [key for key in keys if key.rpartition(".")[2] == word]
    if word == "size" and isinstance(value, str):
        return "--size is an option: nano, small or base"
    theirs = f".{_FROM_OTHERS.get(word, '')}"
    if own := next((key for key in keys if theirs.endswith(f".{key}")), None):
        return f"{word!r} is called {own!r} here"
    if same:
        return f"{word!r} is a part of a longer key: {' or '.join(map(repr, same[:3]))}"
    if word in _OPTIONS and "train.loop.steps" in keys:
        return f"this is no key; write {_OPTIONS[word]}"
    return None


def _keys_of(cls: type[BaseModel]) -> Iterator[str]:
    """The dotted keys of a configuration class."""
    for name, field in cls.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from (f"{name}.{key}" for key in _keys_of(inner))
        else:
            yield name


def _hint_for_value(issue: ErrorDetails, key: str) -> str | None:
    """What to write in place of a value that had another name once, is gone, or has an uncommon form."""
    value = issue["input"]
    if issue["type"] != "literal_error" or not isinstance(value, str):
        return _FORMS.get(key.rpartition(".")[2])
    if (new := _RENAMED_VALUES.get(value)) and repr(new) in issue["msg"]:
        return f"{value!r} is called {new!r} now"
    if (left := _REMOVED.get(value)) and left[0] in issue["loc"]:
        return f"{value!r} was removed; {left[0]!r} is {left[1]}"
    return _FORMS.get(key.rpartition(".")[2])


# what people call kinds of values that have another name in Python
_KINDS = {
    "model_type": "expected keys and values",
    "tuple_type": "expected a list, as [this, that]",
    "list_type": "expected a list, as [this, that]",
    "dict_type": "expected keys and values",
    "string_type": "expected a text",
}
_SHOULD_BE = ("Input should be ", "expected ")


def _issue(issue: ErrorDetails) -> str:
    """What is wrong with a value, and what was found (a rule of ours says so itself)."""
    if issue["type"] == "value_error":
        return str(issue["ctx"]["error"])
    wanted = _KINDS.get(issue["type"], issue["msg"])
    return f"{wanted[0].lower()}{wanted[1:]}, found {_found(issue)}"


def _none_of(issues: Sequence[ErrorDetails]) -> str:
    """What a value may be that is none of several kinds, and what was found."""
    wanted = [_KINDS.get(issue["type"], issue["msg"]) for issue in issues]
    for begin in _SHOULD_BE:
        wanted = [text.removeprefix(begin) for text in wanted]
    return f"expected {', or '.join(dict.fromkeys(wanted))}, found {_found(issues[0])}"


def _found(issue: ErrorDetails) -> str:
    """A faulty value, shortened."""
    found = repr(issue["input"])
    return found if len(found) <= _LONGEST else f"{found[:_LONGEST]}..."


def _fields_at(cls: type[BaseModel], issue: ErrorDetails) -> list[str]:
    """The keys that are allowed where an issue lies."""
    for part in issue["loc"][:-1]:
        field = cls.model_fields.get(str(part))
        # an index or a name inside a collection leads no deeper: its configuration class was found with the field
        cls = (field and _configuration_in(field.annotation)) or cls
    return list(cls.model_fields)


def _configuration_in(annotation: Any) -> type[BaseModel] | None:
    """The configuration class that a field's type holds: itself, optional, or inside a collection."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_configuration_in(argument) for argument in get_args(annotation))
    return next((found for found in inner if found is not None), None)
