"""Datasets on the hub: what is fetched, what is read, and what is said where nothing can be."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from huggingface_hub import constants, file_download
from reader_trees import NAMES, made_up, write_text
from table_trees import CARD, encoded, repository, row, save, schema

from hub_stand_in import Hub, Repository, hub, point_to
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset, parse_data_arguments
from metr.data.formats.files import is_image
from metr.data.hub_datasets.address import HubAddress, same_dataset
from metr.errors import ConfigError, DataError, MetrError, StoreError
from metr.inspection.coverage import Coverage
from metr.inspection.datasets_file import write_datasets_file
from metr.run_directory import RunDirectory
from metr.training.resumption import DATASETS, kept_datasets, save_request

__all__ = ["hub"]

CODE = b"raise SystemExit('a loading script was run')"


@pytest.fixture(autouse=True)
def _own_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fetched"))
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shared(hub: Hub, files: dict[str, bytes], name: str = "lab/cells", **how: bool) -> Repository:
    made = hub.repositories[f"datasets/{name}"] = Repository(**how)
    made.commit({".gitattributes": b"", **files})
    return made


def tables(folder: Path) -> dict[str, bytes]:
    """Shards of three splits with a card, and what is none of METR's business."""
    repository(folder, made_up())
    other = {"cells.py": CODE, "weights.bin": b"0", "notes.txt": b"-", "preview/a.png": b"-"}
    return files_below(folder) | other


def imagefolder(folder: Path) -> dict[str, bytes]:
    for split, images in made_up().items():
        lines = [
            json.dumps({"file_name": item.name.rpartition("/")[2], "objects": row(item, words=True)["objects"]})
            for item in images
        ]
        write_text(folder / split / "metadata.jsonl", "\n".join(lines))
        for item in images:
            (folder / split / item.name.rpartition("/")[2]).write_bytes(encoded(item))
    return files_below(folder)


def opened(given: str) -> DatasetSource:
    (config,) = parse_data_arguments([given])
    return open_dataset(config)


def sizes(source: DatasetSource) -> dict[str, int]:
    return {split: len(images) for split, images in source.splits.items()}


EVERY = {split: len(images) for split, images in made_up().items()}


def test_a_repository_of_tables(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched once, without code and what else there is; then the same without a network, and by --offline."""
    files = tables(tmp_path / "made")
    made = shared(hub, files)
    first = made.refs["main"]
    source = opened("hf:lab/cells")
    assert (source.name, source.format, sizes(source)) == ("cells", "huggingface", EVERY)
    assert set(source.categories) == set(NAMES)
    assert source.issues == ()
    assert source.config.path == source.place == f"hf:lab/cells@{first}"
    assert {name for name in hub.got() if name.endswith((".py", ".bin", ".txt", ".png"))} == set()
    asked = len(hub.got())
    made.commit({**files, "data/train-00001-of-00002.parquet": b"damaged"})
    assert sizes(opened(f"hf:lab/cells@{first}")) == EVERY
    assert len(hub.got()) == asked  # nothing twice
    point_to("http://127.0.0.1:9", monkeypatch)
    assert sizes(opened("other=hf:lab/cells")) == EVERY
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sizes(opened("hf:lab/cells")) == EVERY
    with pytest.raises(StoreError, match=r"(?s)hf:lab/other: not among what was fetched before.*--offline"):
        opened("hf:lab/other")


def test_one_split_of_tables(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared(hub, tables(tmp_path / "made"))
    for address in ("hf:lab/cells/test", "hf:lab/cells/default/test", "hf:datasets/lab/cells@main/test"):
        assert sizes(opened(address)) == {"test": EVERY["test"]}
    assert {name for name in hub.got() if "parquet" in name} == {
        "test-00000-of-00002.parquet",
        "test-00001-of-00002.parquet",
    }
    with pytest.raises(DataError, match=r"(?s)hf:lab/cells@\w+/default/dev: no split 'dev'.*'test', 'train'"):
        opened("hf:lab/cells/default/dev")
    with pytest.raises(DataError, match=r"no configuration or split 'tset'.*\n.*did you mean 'test'"):
        opened("hf:lab/cells/tset")
    with pytest.raises(DataError, match="no revision 'v2'"):
        opened("hf:lab/cells@v2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="not among what was fetched before"):
        opened("hf:lab/cells/train")


def test_one_of_several_configurations(hub: Hub, tmp_path: Path) -> None:
    """Each with its own names of the numbers, whatever was fetched before; also as the hub's own copies lie."""
    truth = made_up()
    label = "- name: category\n      dtype: {{class_label: {{names: {{'0': {0} a, '1': {0} b, '2': {0} c}}}}}}\n"
    infos = "".join(
        f"- config_name: {name}\n  features:\n  - name: objects\n    sequence:\n    {label.format(name)}"
        for name in ("large", "small")
    )
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/**\n" for name in ("large", "small"))
    for name, split in (("large", "train"), ("small", "val")):
        save(tmp_path / f"made/{name}/train.parquet", list(map(row, truth[split])), schema(pa.int64()))
    copied = files_below(tmp_path / "made")
    write_text(tmp_path / "made/README.md", f"---\nlicense: mit\ndataset_info:\n{infos}configs:\n{configs}---\nCells.")
    shared(hub, files_below(tmp_path / "made"))
    with pytest.raises(DataError, match=r"several datasets \(configurations\): large, small\n.*hf:lab/cells/large"):
        opened("hf:lab/cells")
    for name, split in (("large", "train"), ("small", "val")):
        source = opened(f"hf:lab/cells/{name}")
        assert sum(sizes(source).values()) == EVERY[split]
        assert set(source.categories) == {f"{name} {letter}" for letter in "abc"}
    assert "license: mit" in (source.root / "README.md").read_text()
    renamed = {name.replace("/train.", "/train/0000."): data for name, data in copied.items()}
    shared(hub, {}).commit(renamed, "refs/convert/parquet")
    assert sum(sizes(opened("hf:lab/cells@refs/convert/parquet/small")).values()) == EVERY["val"]


def test_a_repository_of_images_with_metadata(hub: Hub, tmp_path: Path) -> None:
    shared(hub, imagefolder(tmp_path / "made") | {"cells.py": CODE, "model.bin": b""})
    source = opened("hf:lab/cells/val")
    assert (source.format, sizes(source)) == ("imagefolder", {"val": EVERY["val"]})
    assert len([name for name in hub.got() if is_image(name)]) == EVERY["val"]
    assert sizes(opened("hf:lab/cells")) == EVERY
    assert not {"cells.py", "model.bin"} & {*hub.got()}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"cells.py": CODE}, r"only a loading script \(cells.py\).*never runs.*hf:lab/cells@refs/convert/parquet"),
        ({"data/train.zip": b""}, r"its data are archives \(data/train.zip\).*hf download lab/cells"),
        ({"data/a-000.tar": b""}, r"its data are tars.*hf://datasets/lab/cells/data/\*.tar"),
        ({"README.md": b"# soon"}, "it holds no dataset that METR reads"),
        ({"train/metadata.jsonl": b'{"file_name": "a.png", "text": "a"}'}, "no boxes in its metadata"),
        ({"train.parquet": b"PAR1"}, r"train.parquet: a table that is damaged or cut off"),
    ],
)
def test_repositories_without_a_dataset(hub: Hub, tmp_path: Path, files: dict[str, bytes], told: str) -> None:
    shared(hub, files)
    with pytest.raises(DataError, match=f"(?s)hf:lab/cells.*{told}"):
        opened("hf:lab/cells")
    assert not list((tmp_path / "cache").rglob("*.parquet"))


def test_tables_without_boxes_are_told_before_all_of_them_come(hub: Hub, tmp_path: Path) -> None:
    text = pa.schema([("text", pa.string())])
    for number, rows in enumerate(([{"text": "a"}], [{"text": "b"}] * 50)):
        save(tmp_path / f"made/data/train-0000{number}-of-00002.parquet", rows, text)
    shared(hub, files_below(tmp_path / "made"))
    with pytest.raises(DataError, match=r"(?s)no images with boxes in this table \(columns: text\).*configuration"):
        opened("hf:lab/cells")
    assert len([name for name in hub.got() if name.endswith(".parquet")]) == 1


def test_a_repository_that_may_not_be_read(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared(hub, {"README.md": CARD.encode()}, "lab/gated", gated=True)
    shared(hub, {"README.md": CARD.encode()}, "lab/private", private=True)
    with pytest.raises(DataError, match=r"(?s)hf:lab/gated: its owner grants access.*HF_TOKEN"):
        opened("hf:lab/gated")
    for name in ("private", "nothing"):
        with pytest.raises(DataError, match=rf"(?s)hf:lab/{name}: no dataset of this name on the hub.*HF_TOKEN"):
            opened(f"hf:lab/{name}")
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(StoreError, match="hf:lab/cells: the hub cannot be reached"):
        opened("hf:lab/cells")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("given", ["hf:cells", "hf:", "hf:a/b/c/d/e", "hf:a/b@", "hf:/a/b", "hf:a b/c", "hf:../../x"])
def test_no_address(given: str, tmp_path: Path) -> None:
    write_text(tmp_path / "data.yaml", f"datasets:\n  - {{name: one, path: {json.dumps(given)}}}\n")
    for argument in (given, f"name={given}", str(tmp_path / "data.yaml")):
        with pytest.raises(ConfigError, match=r"(?s)no name of a dataset on the hub.*hf:user/name@revision"):
            parse_data_arguments([argument])


def test_addresses_in_a_datasets_file_and_in_a_run(hub: Hub, tmp_path: Path) -> None:
    """A run keeps the commit; the address that it was begun with, or none, goes on with it."""
    made = shared(hub, tables(tmp_path / "made"))
    write_text(
        tmp_path / "data.yaml", "datasets:\n  - path: hf:lab/cells/train\n    weight: 2\n  - a=hf:lab/cells/val\n"
    )
    specs = parse_data_arguments([str(tmp_path / "data.yaml")])
    assert [(one.name, one.path) for one in specs] == [("cells", "hf:lab/cells/train"), ("a", "hf:lab/cells/val")]
    sources = [open_dataset(one) for one in specs]
    commit = made.refs["main"]
    run = RunDirectory(tmp_path / "run")
    save_request(run, "training.json", {}, {DATASETS: sources})
    assert f"hf:lab/cells@{commit}/train" in (run.path / DATASETS).read_text()
    made.commit({"README.md": b""})
    for given in ([], [str(tmp_path / "data.yaml")]):
        (listing,) = kept_datasets(run, given)
        assert sizes(open_dataset(parse_data_arguments([listing])[1])) == {"val": EVERY["val"]}
    with pytest.raises(ConfigError, match="begun with other datasets"):
        kept_datasets(run, ["cells=hf:lab/other"])
    write_datasets_file(
        tmp_path / "written.yaml", sources, (), Coverage(datasets=("cells", "a"), names=(), cells={}, evidence="")
    )
    assert parse_data_arguments([str(tmp_path / "written.yaml")])[0].path == f"hf:lab/cells@{commit}/train"


def test_the_same_address_again() -> None:
    commit = "0123456789" * 4
    pinned = HubAddress.parsed("hf:lab/cells/train").pinned(commit)
    assert str(pinned) == f"hf:lab/cells@{commit}/train"
    assert str(HubAddress.parsed("hf:a/b@refs%2Fx/c%20d")) == "hf:a/b@refs%2Fx/c%20d"
    for given in ("hf:lab/cells/train", "hf:lab/cells@v1/train", str(pinned)):
        assert same_dataset(str(pinned), given)
    for given in ("hf:lab/cells", f"hf:lab/cells@{commit[::-1]}/train", "lab/cells", Path("lab/cells")):
        assert not same_dataset(str(pinned), given)
    assert DatasetConfig(name="cells", path="hf:lab/cells").path == "hf:lab/cells"
    assert issubclass(StoreError, MetrError)
