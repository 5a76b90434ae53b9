"""What a device offers is asked of the device."""

from types import SimpleNamespace

import pytest
import torch

from metr.devices import resolved_precision


@pytest.mark.parametrize(
    ("supported", "precision"),
    [
        (lambda including_emulation=True: including_emulation, "fp32"),  # only pretends
        (lambda including_emulation=True: True, "bf16"),
        (lambda: True, "bf16"),
        (None, "fp32"),
    ],
)
def test_bf16_is_chosen_where_the_device_has_it(
    monkeypatch: pytest.MonkeyPatch, supported: object, precision: str
) -> None:
    module = SimpleNamespace() if supported is None else SimpleNamespace(is_bf16_supported=supported)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert resolved_precision("auto", torch.device("cuda")) == precision
    assert resolved_precision("auto", torch.device("cpu")) == "fp32"
    assert resolved_precision("bf16", torch.device("cpu")) == "bf16"
