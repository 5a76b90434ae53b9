"""`metr export` on the command line: mistakes end in one message, and names for open models."""

from pathlib import Path

import numpy as np
import pytest

from metr.export import request

from tiny import CommandLine, TinyRun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--format", "onx"),
            "expected onnx, openvino, torch or names, found 'onx' try: did you mean 'onnx'?",
        ),
        (("--pixels", "uint16"), "--pixels: expected uint8 or float32, found 'uint16'"),
        (("--int8", "x"), "--int8: 8-bit numbers are OpenVINO's, found --format onnx"),
        (("--names", "open", "--most-names", "20000"), "--most-names: expected 1 to 10,000 names, found 20,000"),
        (("--format", "names"), "expected a file that ends in .npz"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(metr: CommandLine, tmp_path: Path, arguments, message) -> None:
    ended = metr("export", tmp_path / "nowhere", "-o", tmp_path / "out", *arguments)
    assert ended.code == 1
    assert message in ended.words
    assert not (tmp_path / "out").exists()


def test_a_missing_package_names_its_extra(metr: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "find_spec", lambda name: None)
    for format_, packages in (
        ("onnx", "onnx, onnxscript and onnxruntime"),
        ("openvino", "openvino, onnx and onnxscript"),
    ):
        ended = metr("export", tmp_path / "run", "-o", tmp_path / "out", "--format", format_)
        assert f"--format {format_}: needs {packages}, which the extra `{format_}` brings" in ended.words
        assert f"pip install 'metr[{format_}]'" in ended.words
    assert "no such" in metr("export", tmp_path / "run", "-o", tmp_path / "out", "--format", "torch").words


def test_what_is_no_detector_or_in_the_way(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    ended = metr("export", tmp_path, "-o", tmp_path / "out", "--format", "torch")
    assert ended.code == 1
    assert str(tmp_path) in ended.words
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    ended = metr("export", tiny_run.folder, "-o", tmp_path / "mine", "--format", "torch")
    assert "exists and is not a folder with export.json, so it is not overwritten" in ended.words
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_names_for_a_model_with_open_names(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "new.npz"
    ended = metr("export", tiny_run.folder, "-o", out, "--format", "names", "--names", "leaf, newt")
    assert ended.code == 0, ended.words
    assert "2 names" in ended.words
    with np.load(out, allow_pickle=False) as stored:
        assert stored["names"].tolist() == ["leaf", "newt"]
        assert stored["embeddings"].shape == (2, 16)
        np.testing.assert_allclose(np.linalg.norm(stored["embeddings"], axis=1), 1, atol=1e-4)
