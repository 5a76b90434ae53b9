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
    ("tiles", "products", "most", "precision"),
    [
        (True, True, None, "bf16"),
        (False, True, None, "bf16"),
        (True, True, "avx512_core_amx", "bf16"),
        (True, True, "avx512_core_bf16", "bf16"),
        (True, True, "avx512_core_fp16", "bf16"),
        (False, True, "AVX512_CORE_AMX", "bf16"),  # more than this processor has
        (True, True, "AVX2", "fp32"),  # oneDNN was told to do without
        (True, True, "AVX512_CORE_VNNI", "fp32"),
        (True, None, None, "bf16"),  # a torch that cannot say of both
        (False, False, None, "fp32"),
        (None, None, None, "fp32"),
    ],
)
def test_processors_that_multiply_bf16_take_it(
    monkeypatch: pytest.MonkeyPatch, tiles: bool | None, products: bool | None, most: str | None, precision: str
) -> None:
    for question, answer in (("_is_amx_tile_supported", tiles), ("_is_avx512_bf16_supported", products)):
        if answer is None:
            monkeypatch.delattr(torch.cpu, question, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, question, lambda answer=answer: answer, raising=False)
    if most is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert resolved_precision("auto", torch.device("cpu")) == precision
    assert resolved_precision("fp32", torch.device("cpu")) == "fp32"
