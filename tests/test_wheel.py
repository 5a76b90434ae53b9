"""The wheel: what is in it, and that it works where it alone is installed."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import metr
from metr.demo import write_demo_datasets, write_unseen

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "metr"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("build") is None or find_spec("hatchling") is None:
        pytest.skip("needs the packages build and hatchling (pip install 'metr[dev]')")
    out = tmp_path_factory.mktemp("dist")
    ran(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that has the wheel, and sees what METR needs, but no other METR."""
    home = tmp_path_factory.mktemp("new") / "venv"
    ran(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    (packages,) = [*home.glob("lib/python*/site-packages"), *home.glob("Lib/site-packages")]
    # a folder that a .pth file adds is searched last, and its own .pth files, such as an editable METR's, are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    program = home / ("Scripts" if os.name == "nt" else "bin")
    install = ["-m", "pip", "--python", program / "python", "install", "--quiet", "--no-deps", "--no-index"]
    ran(sys.executable, *install, wheel, cwd=home.parent)
    return program


def ran(*command: object, cwd: Path) -> str:
    """What a command prints; it must end well. It sees no other METR than an installed one."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_of_the_package_is_in_it_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if not name.startswith(f"metr-{metr.__version__}.dist-info/")}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert inside == {f"metr/{path.relative_to(PACKAGE).as_posix()}" for path in files}
    assert {"metr/py.typed", "metr/recipes/nano.yaml", "metr/sharing/model_card.md.jinja"} <= inside
    assert {f"metr/report/page.{ending}" for ending in ("html.jinja", "css", "js")} <= inside
    assert {"metr/serving/page.html", "metr/serving/interface.html.jinja"} <= inside
    assert f"metr-{metr.__version__}.dist-info/licenses/LICENSE" in names
    assert wheel.stat().st_size < 2e6
    assert wheel.name == f"metr-{metr.__version__}-py3-none-any.whl"


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"metr-{metr.__version__}.dist-info/METADATA").decode()
    assert "Requires-Python: >=3.11" in metadata
    for version in ("3.11", "3.12", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {version}\n" in metadata
    for extra in ("bundled", "tensorboard", "supervision"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_the_installed_command_works(programs: Path, tmp_path: Path) -> None:
    write_demo_datasets(tmp_path / "data", seed=0, train=3, val=2)
    write_unseen(tmp_path / "unseen", seed=0, count=1)
    where = ran(programs / "python", "-c", "import metr; print(metr.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(programs.parent)
    command = programs / "metr"
    assert ran(command, "--version", cwd=tmp_path) == f"metr {metr.__version__}\n"
    assert "inspect" in ran(command, "--help", cwd=tmp_path)
    inspected = ran(command, "inspect", "data/pond", "data/desk", "--draw", "sheets", cwd=tmp_path)
    assert "pond" in inspected
    assert (tmp_path / "sheets/pond.jpg").is_file()


def test_the_installed_command_detects(programs: Path, tmp_path: Path) -> None:
    write_unseen(tmp_path / "unseen", seed=0, count=1)
    checkpoint = ROOT / "checkpoints" / "metr-nano"
    ran(programs / "metr", "detect", checkpoint, "unseen", "-o", "out", cwd=tmp_path)
    assert list((tmp_path / "out").rglob("*.jpg"))
