"""Runs a script in two processes of one group, as a launcher would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PLACES = [str(Path(__file__).parent), str(Path(__file__).parent / "evaluation")]


def launch(script: str, folder: Path, *arguments: object) -> list[tuple[int, str]]:
    """Runs `script` with the folder and more arguments; the exit code and the standard error of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", script, str(folder), *map(str, arguments)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([*PLACES, *filter(None, [os.environ.get("PYTHONPATH")])])
    workers = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=1800)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, err) for worker, err in zip(workers, said, strict=True)]


def launched(script: str, folder: Path, *arguments: object) -> None:
    """The same where both must succeed."""
    ended = launch(script, folder, *arguments)
    assert [code for code, _ in ended] == [0, 0], ended
