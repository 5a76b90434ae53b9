"""Little shared memory, as containers have it: workers send batches another way, and training never hangs."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic_images import make_annotations, make_dataset
from test_loading import assert_same, mixed, some

from metr.data import collate as collating
from metr.data import loading


@pytest.mark.parametrize(
    ("free", "said"), [(4 << 20, "batches take a slower way: 4 MB"), (0, "no worker reads images")]
)
def test_little_shared_memory_changes_no_batch(
    free: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = mixed(tmp_path, sizes=(512, 640))
    plain = some(datasets, 4)
    for module in (collating, loading):
        monkeypatch.setattr(module, "free_shared_memory", lambda: free)
    for one, other in zip(plain, some(datasets, 4, workers=2), strict=True):
        assert_same(one, other)
        assert one.images.stride() == other.images.stride()
    assert caplog.text.count(said) == 1
    assert "--shm-size" in caplog.text


def test_enough_shared_memory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(make_annotations(tmp_path, "cells", 3), training=False)
    collated = collating.collate([dataset[index] for index in range(3)])
    assert collated.batch is not None
    need = collated.batch.pixels.nbytes
    for free, kind in [(100 << 20, collating.Collated), (need, collating.PipedBatch), (None, collating.Collated)]:
        monkeypatch.setattr(collating, "free_shared_memory", lambda free=free: free)
        assert type(collating.sent(collated, 2)) is kind


_TRAIN = """
import sys
import time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_loading import assert_same, mixed, some
if __name__ == "__main__":
    datasets = mixed(Path(sys.argv[1]), sizes=(512, 640))
    plain = some(datasets, 8)
    for one, other in zip(plain, some(datasets, 8, workers=2), strict=True):
        assert_same(one, other)
    print("all the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64k", "2m", "6m", "64m"])
def test_a_real_shared_memory_of_this_size(size: str, tmp_path: Path) -> None:
    """In a mount namespace of its own, /dev/shm is as small as that."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs the rights to mount")
    here = Path(__file__).parent
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} -c"
    command = f'{mount} "$0" "$@"'
    call = ["unshare", "-m", "sh", "-c", command, _TRAIN, str(tmp_path), str(here), str(here.parent)]
    ran = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
    if "mount:" in ran.stderr or "unshare:" in ran.stderr:
        pytest.skip("needs the rights to mount")
    assert ran.stdout.strip() == "all the same", ran.stderr


_DIES = """
import multiprocessing, os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_loading import mixed
from metr.data import collate as collating
from metr.data.config import LoaderConfig
from metr.data.loading import build_train_loader
if __name__ == "__main__":
    collating.free_shared_memory = lambda: 1 << 20
    loader = build_train_loader(mixed(Path(sys.argv[1]), sizes=(512, 640)), LoaderConfig(batch_size=4, workers=2))
    batches = iter(loader)
    next(batches)
    time.sleep(3)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
def test_workers_in_a_full_pipe_do_not_outlive_a_killed_main_process(tmp_path: Path) -> None:
    """Nobody reads what they write, so they would wait for ever; nor does their folder in /tmp stay."""
    here, own = Path(__file__).parent, tmp_path / "tmp"
    own.mkdir()
    call = [sys.executable, "-c", _DIES, str(tmp_path), str(here), str(here.parent)]
    environment = {**os.environ, "TMPDIR": str(own)}
    ran = subprocess.run(call, stdout=subprocess.PIPE, text=True, timeout=300, check=False, env=environment)
    workers = [int(number) for number in ran.stdout.split()]
    assert (len(workers), ran.returncode) == (2, -9)
    deadline = time.monotonic() + 30
    while left := [number for number in workers if is_alive(number)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert list(own.glob("pymp-*")) == []


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
