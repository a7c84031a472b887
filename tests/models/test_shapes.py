"""In which shapes an encoder computes follows from its device class."""

from __future__ import annotations

import pytest

from proteus_pipeline.models import device, shapes


@pytest.mark.parametrize(
    ("device_class", "tiles", "columns", "keys"),
    [
        ("cpu/x86_64/AVX2/AuthenticAMD", (48, 96, 256), 320, 1),
        ("cpu/x86_64/AVX512/GenuineIntel", (48, 96, 256), 320, 16),
        ("cpu/x86_64/AVX512+BF16/AuthenticAMD", (48, 96, 256), 320, 16),
        ("cpu/x86_64/AVX512+AMX/GenuineIntel", (48, 96, 192, 256, 384), 960, 16),
        ("cpu/aarch64/DEFAULT+BF16/0x41", (48, 96, 256), 320, 1),
        ("cuda/sm_90", (4096,), 0, 1),
    ],
)
def test_shapes_are_a_device_classes(
    monkeypatch: pytest.MonkeyPatch, device_class: str, tiles: tuple[int, ...], columns: int, keys: int
):
    monkeypatch.setattr(shapes, "device_class", lambda _: device_class)
    found = shapes.shapes_of("cpu")
    assert (found.tiles, found.columns, found.key_multiple) == (tiles, columns, keys)
    assert found.packed in found.tiles
    assert found.tiles[-1] <= shapes.LARGEST_CPU_TILES[-1] or found.tiles == (shapes.GPU_TILE,)


@pytest.mark.parametrize(
    ("capability", "flags", "expected"),
    [
        ("AVX512", "flags : avx512f avx512_bf16 amx_bf16", "AMX"),
        ("AVX512", "flags : avx512f avx512_bf16", "BF16"),
        ("AVX512", "flags : avx512f", ""),
        ("AVX2", "flags : avx512f avx512_bf16 amx_bf16", ""),
        ("DEFAULT", "Features : fp asimd bf16", "BF16"),
    ],
)
def test_what_multiplies_bf16_is_of_the_class(
    monkeypatch: pytest.MonkeyPatch, capability: str, flags: str, expected: str
):
    monkeypatch.setattr(device, "_cpuinfo", lambda: [flags, "vendor_id : Maker"])
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert device.has_bf16() == bool(expected)
    middle = capability + (f"+{expected}" if expected else "")
    assert device.device_class("cpu").endswith(f"/{middle}/Maker")
