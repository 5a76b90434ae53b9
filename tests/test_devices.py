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
    assert resolved_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize(
    ("tiles", "most", "precision"),
    [
        (True, None, "bf16"),
        (True, "avx512_core_amx", "bf16"),
        (True, "AVX2", "fp32"),  # oneDNN was told to do without
        (False, None, "fp32"),
        (None, None, "fp32"),  # a torch that cannot say
    ],
)
def test_processors_with_amx_take_bf16(
    monkeypatch: pytest.MonkeyPatch, tiles: bool | None, most: str | None, precision: str
) -> None:
    if tiles is None:
        monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    if most is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert resolved_precision("auto", torch.device("cpu")) == precision
    assert resolved_precision("fp32", torch.device("cpu")) == "fp32"
