"""Help comes at once, mistyped words end in one line, and shells complete words."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from metr.cli.main import app

from tiny import CommandLine

VERBS = (
    "inspect",
    "train",
    "finetune",
    "evaluate",
    "report",
    "detect",
    "complete",
    "serve",
    "transfer",
    "export",
    "push",
    "demo",
)
ALL_HELP = """
import sys
from contextlib import suppress
from metr.cli.main import run
for arguments in [["--help"], *([verb, "--help"] for verb in sys.argv[1:])]:
    sys.argv = ["metr", *arguments]
    with suppress(SystemExit):
        run()
heavy = {"torch", "transformers", "pyarrow", "cv2", "matplotlib", "numpy", "yaml", "huggingface_hub", "pydantic"}
print("imported:", *heavy & set(sys.modules))
"""


def test_the_verbs() -> None:
    assert tuple(get_command(app).commands) == VERBS  # type: ignore[attr-defined]


def test_help_of_every_verb_imports_nothing_heavy_and_takes_little_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", ALL_HELP, *VERBS], capture_output=True, text=True, check=False, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "imported:"
    assert all(f"Usage: metr {verb} [OPTIONS]" in done.stdout for verb in VERBS)
    # 0.3 s of processor time on an idle core; torch alone would take more than two seconds
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train', 'transfer'? See metr --help"),
        (["train", "data", "-o", "run", "--stpes", "3"], "--stpes (Possible options: --set, --shots, --steps). See"),
        (["train", "data"], "Missing option '-o' / '--out'. See metr train --help"),
        (["push", "run"], "Missing argument 'NAME'. See metr push --help"),
        (
            ["finetune", "data", "--share", "0.1"],
            "No such option: --share. It is called --fraction now. See metr finetune",
        ),
        (["detect", "run", "a.jpg", "--names", "cat"], "--names. It is called --categories now. See metr detect"),
        (
            ["train", "data", "--share", "1"],
            "--share. It is called --fraction now. See metr train --help",
        ),
        (["train", "-o", "run"], "Invalid value for DATA: it is missing, and only --resume needs none; name a dataset"),
        (["finetune", "data", "-o", "run"], "Invalid value for --from: it is missing, and only --resume needs none"),
        (["--verzion"], "No such option: --verzion (Possible options: --version). See metr --help"),
    ],
)
def test_a_mistyped_word_ends_in_one_line(metr: CommandLine, arguments: list[str], told: str) -> None:
    ended = metr(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert told in ended.err


MISTAKES = {
    "a key": (["train", "nowhere", "-o", "run", "--set", "model.widht=64"], "did you mean 'width'?"),
    "a size": (["train", "nowhere", "-o", "run", "--size", "nanno"], "did you mean 'nano'?"),
    "a file": (["train", "nowhere", "-o", "run", "--config", "no.yaml"], "no.yaml: no such configuration file"),
    "two lengths": (["train", "nowhere", "-o", "run", "--steps", "5", "--epochs", "1"], "exclude each other"),
    "nothing to resume": (["train", "-o", "nowhere", "--resume"], "nowhere: there is nothing to resume"),
    "a key of fine-tuning": (
        ["finetune", "no", "--from", "no", "-o", "run", "--set", "train.freze=none"],
        "fine-tuning and --set: unknown key 'train.freze'",
    ),
    "a value of fine-tuning": (["finetune", "no", "--from", "no", "-o", "run", "--freeze", "all"], "'train.freeze'"),
    "no run of fine-tuning": (["finetune", "-o", "nowhere", "--resume"], "nowhere: there is nothing to resume"),
}
MISSING = {
    "train": (["train", "nowhere", "-o", "run"], "nowhere: no such dataset"),
    "train, named": (["train", "mine=nowhere", "-o", "run"], "nowhere: no such dataset"),
    "train, the second": (["train", "here", "nowhere", "-o", "run"], "nowhere: no such dataset"),
    "train, a dry run": (["train", "nowhere", "-o", "run", "--dry-run"], "nowhere: no such dataset"),
    "train, of a list": (["train", "list.yaml", "-o", "run"], "nowhere: no such dataset"),
    "complete": (["complete", "here", "nowhere", "--model", "detector", "-o", "out"], "nowhere: no such dataset"),
    "train --from": (["train", "here", "--from", "nowhere", "-o", "run"], "nowhere: no such checkpoint"),
    "inspect": (["inspect", "nowhere"], "nowhere: no such dataset"),
    "evaluate": (["evaluate", "detector", "nowhere"], "nowhere: no such dataset"),
    "evaluate, a checkpoint": (["evaluate", "nowhere", "here"], "nowhere: no such checkpoint"),
    "finetune": (["finetune", "nowhere", "--from", "detector", "-o", "run"], "nowhere: no such dataset"),
    "finetune, rehearsed": (
        ["finetune", "here", "--from", "detector", "-o", "run", "--rehearse", "nowhere"],
        "nowhere: no such dataset",
    ),
    "finetune, a checkpoint": (["finetune", "here", "--from", "nowhere", "-o", "run"], "nowhere: no such checkpoint"),
    "detect": (["detect", "detector", "nowhere.jpg"], "nowhere.jpg: no such image or folder"),
    "detect with ray": (
        ["detect", "detector", "nowhere.jpg", "--engine", "ray"],
        "nowhere.jpg: no such image or folder",
    ),
    "detect, a checkpoint": (["detect", "nowhere", "here"], "nowhere: no such checkpoint"),
    "transfer": (["transfer", "nowhere", "--to", "rt_detr", "-o", "out"], "nowhere: no such checkpoint"),
}
MISTAKEN = """
import atexit, sys, time
from metr.cli.main import run
atexit.register(lambda: print(time.process_time(), *{"torch", "transformers"} & set(sys.modules)))
run()
"""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_configuration_is_told_at_once(mistake: str, tmp_path: Path) -> None:
    """Before torch is imported, which takes seconds, and before data or a checkpoint are opened."""
    arguments, told = MISTAKES[mistake]
    command = [sys.executable, "-c", MISTAKEN, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    seconds, *imported = done.stdout.split()
    assert not imported
    # half a second on an idle core
    assert float(seconds) < 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", MISSING)
def test_a_missing_path_is_told_at_once(missing: str, tmp_path: Path) -> None:
    """Before torch and transformers are imported; nothing is written."""
    arguments, told = MISSING[missing]
    (tmp_path / "here").mkdir()
    (tmp_path / "list.yaml").write_text("datasets: [{path: here}, one=here, two=nowhere]")
    # a checkpoint as far as is looked at before it is loaded
    shutil.copytree(Path(__file__).parents[2] / "checkpoints" / "metr-nano", tmp_path / "detector")
    command = [sys.executable, "-c", MISTAKEN, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 2
    seconds, *imported = done.stdout.split()
    assert not imported
    # less than a second on an idle core
    assert float(seconds) < 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detector", "here", "list.yaml"]


def test_without_arguments_there_is_help(metr: CommandLine) -> None:
    ended = metr()
    assert ended.code == 2
    assert "inspect" in ended.words


def test_the_version(metr: CommandLine) -> None:
    ended = metr("--version")
    assert ended.code == 0
    assert ended.out.startswith("metr ")


def test_a_shell_completes_verbs() -> None:
    asked = {"_METR_COMPLETE": "complete_bash", "COMP_WORDS": "metr tr", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from metr.cli.main import run; run()"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.split() == ["train", "transfer"], done.stderr


def test_completion_can_be_installed(metr: CommandLine) -> None:
    assert "--install-completion" in metr("--help").out
