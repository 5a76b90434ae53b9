"""Shards in S3 and Google Cloud Storage, read by s3fs and gcsfs from servers on this machine that stand in for them."""

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_shards_loading as loading
from bucket_stand_ins import ENDPOINTS, FOREIGN, KEYS, SERVERS, forget_stores, make_bucket, need, refusing
from reader_trees import NAMES
from shard_trees import put, shards, simple, truth
from test_containers_huggingface import row, schema
from test_shards_reading import assert_is, opened

from metr.data.config import AugmentationConfig, LoaderConfig, ResizeConfig
from metr.data.dataset import DetectionDataset
from metr.data.datasets_file import DatasetSource
from metr.data.images import read_image
from metr.data.loading import build_train_loader
from metr.data.shards import stores
from metr.data.shards.addresses import find_files
from metr.data.transforms import build_transforms
from metr.errors import DataError, MetrError, StoreError
from metr.text.vocabulary import Vocabulary
from metr.training.trainer import Trainer
from small_runs import interrupt_at, make_config, make_parts

# building clients of botocore and google.auth, and servers, takes seconds
pytestmark = [
    pytest.mark.slow,
    # sessions of aiohttp that nobody closes end with the process; clients of stores are made for its whole length
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
numbers = count()
folder = loading.folder  # the fixture of twenty images


@pytest.fixture(autouse=True)
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    forget_stores()
    yield
    forget_stores()


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The scheme of a store, and where it stands."""
    need(request.param)
    with SERVERS[request.param]() as address:
        yield request.param, address


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own for each test, such as `s3://shards-3`."""

    scheme: str
    url: str


@pytest.fixture
def bucket(server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    scheme, address = server
    monkeypatch.setenv(ENDPOINTS[scheme], address)
    return Bucket(scheme, make_bucket(scheme, f"shards-{next(numbers)}"))


def test_tars_by_every_name(bucket: Bucket) -> None:
    """A glob, braces and a folder mean the same shards, and their images are those that were written."""
    base = put(f"{bucket.url}/deep/d", shards(truth()))
    names = ("*.tar", "{train-{000000..000002},val-{000000..000001},test-000000}.tar", "")
    for name in names:
        source = opened(f"{base}/{name}".rstrip("/"))
        assert (source.format, source.categories) == ("webdataset", tuple(sorted(NAMES)))
        assert_is(source, truth())
        forget_stores()  # and once more as another process would find it


def test_tables(bucket: Bucket) -> None:
    files = {"classes.txt": "\n".join(NAMES).encode()}
    for split, images in truth().items():
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([row(item) for item in images], schema(pa.int64())), sink)
        files[f"{split}-00000.parquet"] = sink.getvalue().to_pybytes()
    source = opened(put(f"{bucket.url}/p", files) + "/*.parquet")
    assert (source.format, source.categories) == ("huggingface", NAMES)
    assert_is(source, truth())


def test_what_a_pattern_lists(bucket: Bucket) -> None:
    put(f"{bucket.url}/many", {f"train-{number:06d}.tar": b"x" * (number + 1) for number in range(12)})
    put(f"{bucket.url}/many/below", {"train-000099.tar": b"x"})
    put(f"{bucket.url}/many", {"notes.txt": b"x"})
    listed = find_files(f"{bucket.url}/many/*.tar", (".tar",)).files
    assert [file.address for file in listed] == [f"{bucket.url}/many/train-{n:06d}.tar" for n in range(12)]
    assert [file.size for file in listed] == list(range(1, 13))
    assert len({file.mark for file in listed}) == 12
    assert find_files(f"{bucket.url}/many", (".tar",)).files == listed
    some = find_files(f"{bucket.url}/many/train-{{000009..000013}}.tar", (".tar",))
    assert some.files == listed[9:]
    assert some.missing == tuple(f"{bucket.url}/many/train-{n:06d}.tar" for n in (12, 13))


def test_the_index_is_built_shard_by_shard(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is kept where a shard cannot be reached; a changed shard is read again alone."""
    base = put(f"{bucket.url}/i", {f"train-{n}.tar": simple(range(4 * n, 4 * n + 4)) for n in range(3)})
    asked: list[str] = []
    down = {"train-1.tar"}
    real = stores.read_range

    def noted(address: str, start: int, size: int) -> bytes:
        name = address.rpartition("/")[2]
        asked.append(name)
        if name in down:
            raise StoreError("cannot be read", where=address)
        return real(address, start, size)

    monkeypatch.setattr(stores, "read_range", noted)
    read = partial(opened, f"{base}/*.tar", splits={"train": "train"})
    with pytest.raises(StoreError, match=r"train-1\.tar: cannot be read \(1 of 3 shards are done\)"):
        read()
    down.clear()
    asked.clear()
    assert len(read().split("train")) == 12
    assert set(asked[1:]) == {"train-1.tar", "train-2.tar"}  # after a look at the first
    asked.clear()
    put(base, {"train-2.tar": simple(range(30, 36))})
    assert len(read().split("train")) == 14
    assert set(asked[1:]) == {"train-2.tar"}


def uploaded(source: DatasetSource, folder: Path, bucket: Bucket) -> DatasetSource:
    tars = loading.written(source, folder / "shards")
    put(f"{bucket.url}/t", {file.name: file.read_bytes() for file in tars.iterdir()})
    return loading.opened(f"{bucket.url}/t/train-{{000000..000006}}.tar")


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_batches_with_workers_are_those_of_the_folder(folder: DatasetSource, tmp_path: Path, bucket: Bucket) -> None:
    """Workers are forked after the store was used: each has a client of its own. Resumed in the middle, too."""
    wanted = loading.batches(folder, 20)
    stored = uploaded(folder, tmp_path, bucket)
    loading.assert_equal(loading.batches(stored, 20), wanted)
    loading.assert_equal(loading.batches(stored, 20, workers=2), wanted)
    loading.assert_equal(loading.batches(stored, 7, start=26, workers=2), wanted[13:])


@pytest.mark.trains
def test_training_stops_and_goes_on_exactly(folder: DatasetSource, tmp_path: Path, bucket: Bucket) -> None:
    """Six steps from the folder; and from the bucket, stopped after three and resumed by new clients."""

    def trained(source: DatasetSource, name: str, stop: int | None = None, resume: bool = False) -> dict[str, object]:
        parts = make_parts(tmp_path)
        vocabulary = Vocabulary(names=parts.checkpoint.vocabulary.names, datasets={"made": source.categories})
        transforms = build_transforms(AugmentationConfig(resize=ResizeConfig(size=32)), training=True)
        data = [DetectionDataset(source.split("train"), vocabulary, transforms)]
        loader = partial(build_train_loader, data, LoaderConfig(batch_size=2, workers=0))
        trainer = Trainer(replace(parts, loader=loader), make_config(6), tmp_path / name)
        with pytest.MonkeyPatch.context() as patch:
            if stop is not None:
                interrupt_at(stop, patch)
            trainer.fit(resume=resume)
        assert trainer.counters.step == (stop or 6)
        return {key: value.tolist() for key, value in trainer.plain_network.state_dict().items()}

    wanted = trained(folder, "whole")
    address = uploaded(folder, tmp_path, bucket).root
    assert address is not None
    stored = partial(loading.opened, f"{bucket.url}/t/*.tar")
    trained(stored(), "parts", stop=3)
    forget_stores()
    assert trained(stored(), "parts", resume=True) == wanted


def test_a_shard_cut_in_the_middle(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    whole = simple(range(6))
    base = put(f"{bucket.url}/x", {"train-0.tar": whole, "train-1.tar": whole[: len(whole) // 2]})
    source = opened(f"{base}/*.tar", splits={"train": "train"})
    assert [issue.where for issue in source.issues if issue.kind == "damaged shard"] == ["train-1.tar"]
    assert f"{base}/train-1.tar" in caplog.text
    assert len(source.split("train")) == 9
    # and where it is cut after it was read
    last = source.split("train")[5]
    put(base, {"train-0.tar": whole[:2048]})
    with pytest.raises(StoreError, match=rf"{base}/train-0\.tar: cannot be read.*") as caught:
        read_image(last.path, last.source)
    assert len(str(caught.value).splitlines()) == 2


def refused(address: str, within: float = 10.0) -> str:
    """The message of the error that ends the opening of a dataset, which must come soon."""
    start = time.monotonic()
    with pytest.raises(MetrError) as caught:
        opened(address)
    assert time.monotonic() - start < within
    assert caught.value.hint
    return str(caught.value)


PATTERNS = ("d/*.tar", "d/train-{0..2}.tar", "d/train-0.tar", "d")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_such_bucket(bucket: Bucket, pattern: str) -> None:
    address = f"{bucket.scheme}://no-such-bucket/{pattern}"
    told = refused(address)
    assert told.startswith(f"{address}: there is no bucket 'no-such-bucket' that these credentials may see\n  try: ")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_such_file(bucket: Bucket, pattern: str) -> None:
    put(bucket.url, {"other/train-0.tar": simple(range(2))})
    told = refused(f"{bucket.url}/{pattern}")
    assert told.startswith(f"{bucket.url}/{pattern}: no file ")
    assert "try: check the address" in told


@pytest.mark.parametrize("scheme", ENDPOINTS)
@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_access_denied(scheme: str, status: int, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once, with what gives credentials; a store that refuses is not asked over and over."""
    need(scheme)
    with refusing(status) as (endpoint, asked):
        monkeypatch.setenv(ENDPOINTS[scheme], endpoint)
        told = refused(f"{scheme}://private/{pattern}")
    assert told.startswith(f"{scheme}://private/d")
    assert "attempts" not in told
    assert {"s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}[scheme] in told
    assert len(asked) < 16


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Google's library goes on without any, and is denied then."""
    need("s3")
    for name in KEYS:
        monkeypatch.delenv(name)
    with refusing(403) as (endpoint, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        told = refused("s3://private/*.tar")
    assert told.startswith("s3://private/*.tar: cannot be read: Unable to locate credentials\n  try: give credentials")
    assert not asked


@pytest.mark.parametrize("scheme", ENDPOINTS)
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:{port}", "http://no-such-host.invalid", "http://127.0.0.1:x"])
def test_a_wrong_endpoint(scheme: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(scheme)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # a port on which nobody listens
        endpoint = endpoint.format(port=taken.getsockname()[1])
        monkeypatch.setenv(ENDPOINTS[scheme], endpoint)
        told = refused(f"{scheme}://b/d/*.tar")
    assert told.startswith(f"{scheme}://b/d/*.tar: no")
    assert endpoint in told
    assert ENDPOINTS[scheme] in told


def test_reading_one_shard_needs_no_right_to_list(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in public buckets that may not be listed: braces ask for each shard."""
    base = put(f"{bucket.url}/l", {f"train-{n}.tar": simple(range(4)) for n in range(2)})
    files, _ = stores.filesystem(base)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError("not for you")

    monkeypatch.setattr(files, "ls", denied)
    source = opened(f"{base}/train-{{0..2}}.tar", splits={"train": "train"})
    assert len(source.split("train")) == 8
    with pytest.raises(StoreError, match="not for you"):
        opened(f"{base}/none-*.tar")


def test_the_command_tells_it_in_one_message(bucket: Bucket, tmp_path: Path) -> None:
    """No traceback of a library, and no word of its log."""
    address = f"{bucket.scheme}://private/*.tar"
    command = [sys.executable, "-c", "from metr.cli.main import run; run()", "inspect", address]
    with refusing(403) as (endpoint, _):
        env = {**os.environ, ENDPOINTS[bucket.scheme]: endpoint}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    first, hint = done.stderr.strip().splitlines()
    assert first.startswith(f"error: {address}: cannot be read: ")
    assert hint.startswith("  try: give credentials")


def test_a_bucket_is_read_by_fsspec_alone(bucket: Bucket) -> None:
    """The stand-ins send ranges, as the stores do."""
    put(bucket.url, {"a.bin": bytes(range(100))})
    assert stores.read_range(f"{bucket.url}/a.bin", 10, 5) == bytes(range(10, 15))
    assert io.BytesIO(stores.read_whole(f"{bucket.url}/a.bin")).read() == bytes(range(100))
    with fsspec.open(f"{bucket.url}/a.bin", "rb") as file:
        assert file.read(3) == bytes(range(3))
    with pytest.raises(DataError, match="expected shards"):
        opened(f"{bucket.url}/a.bin")
