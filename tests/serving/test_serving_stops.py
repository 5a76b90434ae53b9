"""`metr serve` in a process of its own ends well at Ctrl-C and SIGTERM."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tiny import TinyRun

SCRIPT = [sys.executable, "-c", "from metr.cli.main import run; run()"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups"),
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_requests_in_progress(
    number: signal.Signals, tiny_run: TinyRun, tmp_path: Path
) -> None:
    command = [*SCRIPT, "serve", str(tiny_run.folder), "--port", "0", "--device", "cpu"]
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "METR_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": own}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        line = process.stdout.readline()
        address = re.fullmatch(r"METR answers at (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", line)
        assert address, line
        host, port = address[1].removeprefix("http://").split(":")
        body = json.dumps({"image": base64.b64encode(tiny_run.unseen[0].read_bytes()).decode()}).encode()
        head = f"POST /detect HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body[:100])
            urllib.request.urlopen(f"{address[1]}/health", timeout=60).close()  # what came before has been received
            os.killpg(process.pid, number)
            os.killpg(process.pid, number)  # `timeout` sends it twice
            time.sleep(0.3)
            client.sendall(body[100:])
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out == "stopped\n"
        assert "Traceback" not in err
