"""Of which class this machine is, and what is remembered of that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.models import device
from proteus_pipeline.models.device import device_class, remembered_class

ASK = """
import sys
from pathlib import Path
from proteus_pipeline.models.device import remembered_class
print(remembered_class("auto", Path(sys.argv[1])), "torch" in sys.modules)
"""


def asked(memory: Path) -> str:
    done = subprocess.run([sys.executable, "-c", ASK, str(memory)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def cpu_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "_GPU_NODES", ())


@pytest.mark.skipif(any(Path(n).exists() for n in device._GPU_NODES), reason="a GPU is asked each time")
def test_torch_is_imported_for_it_once(tmp_path: Path):
    here = device_class("cpu")
    assert asked(tmp_path / "device.json") == f"{here} True"
    assert asked(tmp_path / "device.json") == f"{here} False"


@pytest.mark.parametrize(
    "changed",
    [{"facts": ["2.0", None]}, {"facts": None}, {"class": 3}, {"class": None}, {"format": 2}],
)
def test_what_another_torch_or_cpu_was_is_not_taken_for_this_one(
    changed: dict[str, object], tmp_path: Path, cpu_alone: None
):
    memory = tmp_path / "device.json"
    here = remembered_class("cpu", memory)
    memory.write_text(json.dumps(json.loads(memory.read_text()) | {"class": "another"} | changed))
    assert asked(memory) == f"{here} True"
    assert json.loads(memory.read_text())["class"] == here


def test_it_is_remembered_for_what_torch_is_told(tmp_path: Path, cpu_alone: None, monkeypatch: pytest.MonkeyPatch):
    memory = tmp_path / "device.json"
    remembered_class("auto", memory)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert "/DEFAULT/" in asked(memory)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert asked(memory).startswith(device_class("cpu"))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"class": "cpu/odd"}'])
def test_a_damaged_memory_is_none(data: bytes, tmp_path: Path, cpu_alone: None):
    memory = tmp_path / "device.json"
    memory.write_bytes(data)
    assert asked(memory) == f"{device_class('cpu')} True"
    assert asked(memory) == f"{device_class('cpu')} False"


def test_where_nothing_can_be_kept_it_is_asked_each_time(tmp_path: Path, cpu_alone: None):
    (tmp_path / "file").write_text("")
    assert remembered_class("cpu", tmp_path / "file" / "device.json") == device_class("cpu")


def test_a_gpu_is_asked_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    memory = tmp_path / "device.json"
    monkeypatch.setattr(device, "_GPU_NODES", (str(tmp_path),))
    monkeypatch.setattr(device, "resolve_device", lambda _: "cuda:0")
    monkeypatch.setattr(device, "device_class", lambda _: "cuda/sm_90")
    assert remembered_class("auto", memory) == remembered_class("cuda", memory) == "cuda/sm_90"
    assert not memory.exists()


def test_what_is_no_device_is_refused_though_another_is_remembered(tmp_path: Path, cpu_alone: None):
    memory = tmp_path / "device.json"
    remembered_class("cpu", memory)
    with pytest.raises(ConfigError, match=r"runtime\.device is 'tpu'"):
        remembered_class("tpu", memory)
