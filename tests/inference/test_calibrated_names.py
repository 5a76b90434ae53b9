"""Calibrations that a user gives hold for names as detection takes them, and a name that nothing knows is told."""

import pytest

from metr.config import Calibration
from metr.errors import ConfigError
from metr.inference.calibrated_names import checked_calibrations, with_names_in_their_case
from metr.inference.config import inference_config

TRAINED = ("RBC", "WBC", "a", "A", "cup")


def taken(given: str, asked: tuple[str, ...], **meant: str) -> dict[str, Calibration]:
    config = inference_config([f"inference.postprocess.calibration.{given}=[1,5]"])
    for way in (with_names_in_their_case, checked_calibrations):
        found = way(config, asked, TRAINED, meant).postprocess.calibration
    return found


@pytest.mark.parametrize(
    ("given", "asked", "meant", "holds"),
    [
        ("RBC", ("RBC",), {}, "RBC"),
        ("rbc", ("RBC", "WBC"), {}, "RBC"),
        ("RBC", ("rbc",), {"rbc": "RBC"}, "rbc"),
        ("Rbc", ("rbc",), {"rbc": "RBC"}, "rbc"),
        ("Unicorn", ("unicorn",), {}, "unicorn"),
        ("mug", ("cup",), {"mug": "cup"}, "cup"),
        ("cup", ("mug",), {"mug": "cup"}, "mug"),
        ("a", ("a", "A"), {}, "a"),
    ],
)
def test_a_name_is_taken_as_detection_takes_it(
    given: str, asked: tuple[str, ...], meant: dict[str, str], holds: str
) -> None:
    found = taken(given, asked, **meant)
    assert found[holds] == (1, 5)
    assert "A" not in found


def test_a_name_that_nothing_knows_is_told() -> None:
    what = r"inference\.postprocess\.calibration: expected names that are looked for or trained, found 'unicorn'"
    with pytest.raises(ConfigError, match=what):
        taken("unicorn", ("RBC",))
    with pytest.raises(ConfigError, match=r"found 'RBD'\n  try: did you mean 'RBC'"):
        taken("RBD", ("RBC",))


def test_a_trained_name_that_is_not_looked_for_is_told(caplog: pytest.LogCaptureFixture) -> None:
    taken("wbc", ("RBC",))
    assert "inference.postprocess.calibration: without effect, as they are not looked for: WBC" in caplog.text
    caplog.clear()
    taken("rbc", ("rbc",), rbc="RBC")
    taken("RBC", ("rbc",), rbc="RBC")
    assert not caplog.text
