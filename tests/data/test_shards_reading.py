"""Shards in stores and on this disk: read as what they say, one request an image, each shard indexed once."""

import gzip
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from reader_trees import NAMES, Truth, write_text
from shard_trees import CountingFileSystem, jpeg, put, shards, simple, tar, truth, write
from test_containers_huggingface import row, schema

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset, parse_data_arguments
from metr.data.images import check_image, read_image
from metr.data.shards import stores
from metr.errors import DataError, DependencyError, StoreError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "PAUSES", (0.0, 0.0, 0.0))
    CountingFileSystem.reset()
    yield tmp_path / "cache"
    CountingFileSystem.reset()
    memory = fsspec.filesystem("memory")
    if memory.exists("/d"):
        memory.rm("/d", recursive=True)


def opened(path: Path | str, **options: Any) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=path, **options))


def assert_is(source: DatasetSource, wanted: Truth) -> None:
    """The dataset has the images, boxes and names of a truth, and every image can be read."""
    assert set(source.splits) == set(wanted)
    for split, images in wanted.items():
        records = list(source.split(split))
        assert len(records) == len(images)
        for record, item in zip(records, images, strict=True):
            assert (record.width, record.height) == (item.width, item.height)
            names = [source.categories[label] for label in record.labels]
            kept = [box for box in zip(item.boxes, item.labels, strict=True) if min(box[0][2:]) > 0]
            assert names == [name for _, name in kept]
            np.testing.assert_array_equal(record.boxes.reshape(-1, 4), np.array([b for b, _ in kept]).reshape(-1, 4))
            assert check_image(record, decode=True) is None
            assert read_image(record.path, record.source).shape == (item.height, item.width, 3)


def places(folder: Path) -> dict[str, str]:
    """One dataset in many places, each written there when asked for."""
    files = shards(truth())
    return {
        "memory glob": put("memory://d/a", files) + "/*.tar",
        "memory braces": "memory://d/a/{train-{000000..000002},val-{000000..000001},test-000000}.tar",
        "memory folder": "memory://d/a",
        "file url": f"file://{write(folder / 'files', files)}/*.tar",
        "local glob": str(folder / "files" / "*-*.tar"),
        "local folder": str(folder / "files"),
        "local folders of splits": str(
            write(folder / "splits", {name.replace("-", "/", 1): content for name, content in files.items()})
        ),
        "compressed": str(
            write(folder / "gz", {f"{name}.gz": gzip.compress(content) for name, content in files.items()}) / "*.gz"
        ),
        "flaky": put("flaky://d/b", files) + "/*.tar",
    }


PLACES = (
    *("memory glob", "memory braces", "memory folder", "file url", "local glob", "local folder"),
    *("local folders of splits", "compressed", "flaky"),
)


@pytest.mark.parametrize("place", PLACES)
def test_webdataset_anywhere(place: str, tmp_path: Path) -> None:
    source = opened(places(tmp_path)[place])
    assert source.format == "webdataset"
    assert source.categories == tuple(sorted(NAMES))
    assert_is(source, truth())
    assert_is(opened(places(tmp_path)[place]), truth())  # from the index


@pytest.mark.parametrize("place", ["memory", "local"])
def test_tables_anywhere(place: str, tmp_path: Path) -> None:
    """Parquet by the rules of tables on this disk, images of several splits."""
    import pyarrow as pa

    kind, files = schema(pa.int64()), {}
    for split, images in truth().items():
        for number, start in enumerate(range(0, len(images), 2)):
            table = pa.Table.from_pylist([row(item) for item in images[start : start + 2]], kind)
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            files[f"{split}-{number:05d}.parquet"] = sink.getvalue().to_pybytes()
    files["classes.txt"] = "\n".join(NAMES).encode()
    base = put("memory://d/p", files) if place == "memory" else str(write(tmp_path / "tables", files))
    source = opened(f"{base}/*.parquet")
    assert (source.format, source.categories) == ("huggingface", NAMES)
    assert_is(source, truth())


def test_a_single_tar_of_samples_is_no_archive(tmp_path: Path) -> None:
    write(tmp_path, {"some.tar": simple(range(10))})
    source = opened(tmp_path / "some.tar")
    assert source.format == "webdataset"
    assert not (tmp_path / "cache" / "unpacked").exists()
    assert source.held_out
    assert len(source.split("train")) == 8


def test_an_image_is_one_request(tmp_path: Path) -> None:
    put("flaky://d/c", {f"train-{n}.tar": simple(range(10 * n, 10 * n + 10)) for n in range(3)})
    source = opened("flaky://d/c/train-{0..2}.tar", splits={"train": "train"})
    CountingFileSystem.reads.clear()
    for record in source.split("train"):
        read_image(record.path, record.source)
    assert len(CountingFileSystem.reads) == 30
    assert {name for name, _, _ in CountingFileSystem.reads} == {"train-0.tar", "train-1.tar", "train-2.tar"}
    assert all(end - start < 10_000 for _, start, end in CountingFileSystem.reads)


def test_opening_again_reads_nothing(tmp_path: Path) -> None:
    put("flaky://d/c", {f"train-{n}.tar": simple(range(4)) for n in range(3)})
    opened("flaky://d/c/*.tar")
    reads = len(CountingFileSystem.reads)
    opened("flaky://d/c/*.tar")
    looks = [start for _, start, _ in CountingFileSystem.reads[reads:]]
    assert len(looks) <= 2  # the look at the first shard


def test_a_changed_shard_is_read_again_alone(tmp_path: Path) -> None:
    put("flaky://d/c", {f"train-{n}.tar": simple(range(4)) for n in range(3)})
    before = opened("flaky://d/c/*.tar", splits={"train": "train"}).split("train")
    put("flaky://d/c", {"train-1.tar": simple(range(20, 26))})
    CountingFileSystem.reads.clear()
    after = opened("flaky://d/c/*.tar", splits={"train": "train"}).split("train")
    assert (len(before), len(after)) == (12, 14)
    assert {name for name, _, _ in CountingFileSystem.reads} <= {"train-0.tar", "train-1.tar"}
    assert [record.path.parent.name for record in after].count("train-1.tar") == 6
    for record in after:
        assert check_image(record, decode=True) is None


def test_new_and_lost_shards(tmp_path: Path) -> None:
    put("memory://d/n", {f"train-{n}.tar": simple(range(4)) for n in range(2)})
    assert len(opened("memory://d/n/*.tar", splits={"train": "train"}).split("train")) == 8
    put("memory://d/n", {"train-5.tar": simple(range(4))})
    assert len(opened("memory://d/n/*.tar", splits={"train": "train"}).split("train")) == 12
    source = opened("memory://d/n/train-{0..6}.tar", splits={"train": "train"})
    assert len(source.split("train")) == 12
    lost = [issue.where for issue in source.issues if issue.kind == "missing file"]
    assert lost == ["train-2.tar", "train-3.tar", "train-4.tar", "train-6.tar"]


def test_indexing_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("flaky://d/c", {f"train-{n}.tar": simple(range(4)) for n in range(4)})
    CountingFileSystem.down.add("train-2.tar")
    with pytest.raises(StoreError) as caught:
        opened("flaky://d/c/*.tar")
    message = str(caught.value)
    assert "flaky://d/c/train-2.tar" in message
    assert "after 4 attempts" in message
    assert "2 of 4 shards are done" in message
    CountingFileSystem.down.clear()
    CountingFileSystem.reads.clear()
    assert len(opened("flaky://d/c/*.tar", splits={"train": "train"}).split("train")) == 16
    assert {name for name, _, _ in CountingFileSystem.reads[1:]} == {"train-2.tar", "train-3.tar"}


@pytest.mark.parametrize("damage", ["cut in an image", "cut between members", "noise", "empty", "no tar"])
def test_a_broken_shard_is_named(damage: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """The other shards are read, and so is what stands before the damage."""
    whole = simple(range(6))
    broken = {
        "cut in an image": whole[: len(whole) // 2],
        "cut between members": whole[: whole.index(b"0003.jpg")],
        "noise": whole[:4096] + bytes(range(256)) * 16 + whole[8192:],
        "empty": b"",
        "no tar": b"<html>Not found</html>" * 100,
    }[damage]
    put("memory://d/x", {"train-0.tar": simple(range(6)), "train-1.tar": broken, "train-2.tar": simple(range(6))})
    with caplog.at_level(logging.WARNING):
        source = opened("memory://d/x/*.tar", splits={"train": "train"})
    found = [issue for issue in source.issues if issue.kind == "damaged shard"]
    assert [issue.where for issue in found] == ["train-1.tar"]
    assert "memory://d/x/train-1.tar" in caplog.text
    kept = [record for record in source.split("train") if record.path.parent.name == "train-1.tar"]
    assert len(source.split("train")) == 12 + len(kept)
    assert len(kept) == {"cut in an image": 3, "cut between members": 3}.get(damage, len(kept))
    for record in kept:
        assert check_image(record, decode=True) is None
    assert source.dropped["train"].images["damaged shard"] == 1


def test_broken_tables_are_named(tmp_path: Path) -> None:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([row(item) for item in truth()["train"]], schema(pa.int64())), sink)
    whole = sink.getvalue().to_pybytes()
    put("memory://d/t", {"train-0.parquet": whole, "train-1.parquet": whole[:-100], "train-2.parquet": b""})
    source = opened("memory://d/t/*.parquet", splits={"train": "train"})
    assert [issue.where for issue in source.issues if issue.kind == "damaged shard"] == [
        "train-1.parquet",
        "train-2.parquet",
    ]
    assert len(source.split("train")) == 5


def test_a_flaky_store_is_asked_again(tmp_path: Path) -> None:
    put("flaky://d/c", {f"train-{n}.tar": simple(range(4)) for n in range(3)})
    CountingFileSystem.fails_every = 3
    source = opened("flaky://d/c/*.tar", splits={"train": "train"})
    for record in source.split("train"):
        read_image(record.path, record.source)
    assert len(source.split("train")) == 12
    CountingFileSystem.fails_every = 1
    record = source.split("train")[0]
    with pytest.raises(StoreError, match=r"train-0\.tar: cannot be read after 4 attempts: reset by peer"):
        read_image(record.path, record.source)


def test_a_store_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("flaky://d/c", {"train-0.tar": simple(range(4))})
    source = opened("flaky://d/c/*.tar", splits={"train": "train"})
    monkeypatch.setattr(stores, "TIMEOUT", 0.05)
    CountingFileSystem.hangs.add("train-0.tar")
    with pytest.raises(StoreError, match=r"no answer in 0\.05 seconds"):
        source.split("train")[0].source.open()  # type: ignore[union-attr]


def test_a_shard_that_is_gone_or_shorter(tmp_path: Path) -> None:
    put("flaky://d/c", {"train-0.tar": simple(range(4)), "train-1.tar": simple(range(4))})
    first, *_, last = opened("flaky://d/c/*.tar", splits={"train": "train"}).split("train")
    fsspec.filesystem("flaky").rm("/d/c/train-0.tar")
    put("flaky://d/c", {"train-1.tar": simple(range(1))})
    with pytest.raises(StoreError, match="no such file"):
        read_image(first.path, first.source)
    with pytest.raises(StoreError, match="bytes in place of"):
        read_image(last.path, last.source)


def test_a_store_without_ranges(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each shard is fetched once, and read on this disk from then on."""
    put("flaky://whole/c", {f"train-{n}.tar": simple(range(10 * n, 10 * n + 10)) for n in range(2)})
    CountingFileSystem.whole = True
    source = opened("flaky://whole/c/*.tar", splits={"train": "train"})
    with caplog.at_level(logging.WARNING):
        for record in source.split("train"):
            assert check_image(record, decode=True) is None
    assert "sends whole files only" in caplog.text
    reads = len(CountingFileSystem.reads)
    for record in source.split("train"):
        read_image(record.path, record.source)
    assert len(CountingFileSystem.reads) == reads


def test_packs_are_bounded(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pack that was used longest ago goes first; what went is fetched again when it is asked for."""
    shard = simple(range(20))
    monkeypatch.setenv("METR_SHARD_CACHE", str(2.5 * len(shard) / (1 << 30)))
    put("memory://d/z", {f"train-{n}.tar.gz": gzip.compress(shard) for n in range(5)})
    source = opened("memory://d/z/*.tar.gz", splits={"train": "train"})
    assert len(list(cache.glob("packs/*/pack"))) == 2
    for index in (0, 99, 45, 3):
        record = source.split("train")[index]
        assert check_image(record, decode=True) is None
    assert len(list(cache.glob("packs/*/pack"))) == 2
    assert not list(cache.glob("packs/*/.fetched*"))


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("METR_CACHE", str(write_text(tmp_path / "file", "")))
    put("memory://d/u", {"train-0.tar": simple(range(3)), "train-1.tar.gz": gzip.compress(simple(range(3)))})
    source = opened("memory://d/u/train-*", splits={"train": "train"})
    assert all(check_image(record, decode=True) is None for record in source.split("train"))
    assert caplog.text.count("cannot be written") == 3  # catalogues, packs, indices


def test_samples_without_boxes_are_named(tmp_path: Path) -> None:
    told = json.dumps({"caption": "a dog", "url": "http://x", "key": "0", "status": "success"}).encode()
    put("memory://d/i", {"00000.tar": tar([("0.jpg", jpeg()), ("0.txt", b"a dog"), ("0.json", told)])})
    with pytest.raises(DataError) as caught:
        opened("memory://d/i/{00000..00000}.tar")
    assert "img2dataset" in str(caught.value)
    assert "caption, url, key, status" in str(caught.value)
    write(tmp_path / "local", {"00000.tar": tar([("0.jpg", jpeg()), ("0.cls", b"3")])})
    with pytest.raises(DataError, match=r"without boxes.*it has jpg, cls"):
        opened(tmp_path / "local")


def test_errors_of_addresses(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file fits"):
        opened("memory://d/none/*.tar")
    with pytest.raises(DataError, match=r"the first that was looked for: memory://d/none/train-0\.tar"):
        opened("memory://d/none/train-{0..9}.tar")
    with pytest.raises(DataError, match="more than 100,000 files"):
        opened("memory://d/none/train-{0..99999999999}.tar")
    put("memory://d/o", {"notes.md": b"x", "a.tar": simple([1])})
    with pytest.raises(DataError, match="expected shards"):
        opened("memory://d/o/*.md")
    with pytest.raises(DataError, match="no such kind of store"):
        opened("nowhere://d/o/*.tar")
    with pytest.raises(DataError, match="a command whose output would be read"):
        opened("pipe:aws s3 cp s3://b/train-{0..9}.tar -")
    with pytest.raises(DataError, match="not shards of the format coco"):
        opened("memory://d/o/*.tar", format="coco")


@pytest.mark.parametrize(
    ("address", "package", "extra"), [("s3://b/*.tar", "s3fs", "s3"), ("gs://b/*.tar", "gcsfs", "gcs")]
)
def test_a_missing_package_is_named(address: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is installed here: its import fails as if it were not."""
    monkeypatch.setitem(sys.modules, package, None)
    for scheme in ("s3", "s3a", "gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    told = f"needs the package {package}, which is not installed\n  try: pip install 'metr.{extra}.', or pip install "
    with pytest.raises(DependencyError, match=told):
        opened(address)


def test_a_package_that_cannot_be_imported_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "s3fs.py", "import a_package_that_is_nowhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "s3fs", raising=False)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    told = "s3fs, which cannot be imported: No module named 'a_package_that_is_nowhere'"
    with pytest.raises(DependencyError, match=told):
        opened("s3://b/*.tar")


def test_data_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(argument: str) -> tuple[str, Path | str]:
        (config,) = parse_data_arguments([argument])
        return config.name, config.path

    pattern = "s3://bucket/coco/train-{000000..000127}.tar"
    assert told(pattern) == ("coco", pattern)
    assert told(f"mine={pattern}") == ("mine", pattern)
    assert told("s3://bucket/a=1/train/x.tar") == ("a=1", "s3://bucket/a=1/train/x.tar")
    assert told("memory://train-0.tar") == ("train", "memory://train-0.tar")
    monkeypatch.chdir(tmp_path)
    assert told("data/train-{00..03}.tar") == ("data", Path("data/train-{00..03}.tar"))
    file = write_text(
        tmp_path / "data.yaml",
        f"datasets:\n  - {{name: far, path: '{pattern}'}}\n  - other={pattern}\n"
        "  - gs://b/p/*.parquet\n  - here/*.tar\n",
    )
    configs = parse_data_arguments([str(file)])
    assert [(config.name, config.path) for config in configs] == [
        ("far", pattern),
        ("other", pattern),
        ("p", "gs://b/p/*.parquet"),
        ("here", tmp_path / "here/*.tar"),
    ]


def test_memory_is_bounded_by_a_shard(tmp_path: Path) -> None:
    import tracemalloc

    image = jpeg(400, 400)
    told = json.dumps({"objects": [{"bbox": [1, 1, 9, 9], "category": "a"}]}).encode()
    files = [(f"{n}.{kind}", content) for n in range(40) for kind, content in (("jpg", image), ("json", told))]
    shard = tar(files)
    write(tmp_path / "many", {f"train-{n:03d}.tar": shard for n in range(6)})
    write(tmp_path / "before", {"train-0.tar": simple(range(5))})
    opened(f"file://{tmp_path}/before/*.tar")  # whatever is made once
    tracemalloc.start()
    opened(f"file://{tmp_path}/many/*.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a block of 4 MB is read to check what was written
    assert peak < 2 * len(shard), f"{peak:,} bytes for 6 shards of {len(shard):,}"
