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

pytestmark = pytest.mark.skipif(device._facts("cpu") is None, reason="here torch is asked each time")
ASK = """
import sys
from pathlib import Path
from proteus_pipeline.models import device
from proteus_pipeline.models.device import remembered_class
device._GPU_SIGNS = tuple(sys.argv[2:])
print(remembered_class("auto", Path(sys.argv[1])), "torch" in sys.modules)
"""


def asked(memory: Path, *signs: str) -> str:
    done = subprocess.run([sys.executable, "-c", ASK, str(memory), *signs], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def cpu_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "_GPU_SIGNS", ())


def test_torch_is_imported_for_it_once(tmp_path: Path):
    here = device_class("cpu")
    assert asked(tmp_path / "device.json") == f"{here} True"
    assert asked(tmp_path / "device.json") == f"{here} False"


@pytest.mark.parametrize("fact", ["wanted", "torch", "told", "vendor", "flags"])
def test_what_another_torch_or_cpu_was_is_not_taken_for_this_one(fact: str, tmp_path: Path):
    memory = tmp_path / "device.json"
    first = asked(memory)
    value = json.loads(memory.read_text())
    memory.write_text(json.dumps(value | {"class": "another", "facts": value["facts"] | {fact: "another"}}))
    assert asked(memory) == first
    assert json.loads(memory.read_text()) == value


@pytest.mark.parametrize("changed", [{"class": 3}, {"class": None}, {"format": 1}, {"facts": None}])
def test_another_format_is_not_read(changed: dict[str, object], tmp_path: Path):
    memory = tmp_path / "device.json"
    first = asked(memory)
    memory.write_text(json.dumps(json.loads(memory.read_text()) | changed))
    assert asked(memory) == first


@pytest.mark.parametrize("cpuinfo", [[], ["Features : sve"]])
def test_where_a_system_does_not_list_instructions_nothing_is_kept(
    cpuinfo: list[str], tmp_path: Path, cpu_alone: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(device, "_cpuinfo", lambda: cpuinfo)
    assert remembered_class("cpu", tmp_path / "device.json") == device_class("cpu")
    assert not (tmp_path / "device.json").exists()


def test_it_is_remembered_for_what_torch_is_told(tmp_path: Path, cpu_alone: None, monkeypatch: pytest.MonkeyPatch):
    memory = tmp_path / "device.json"
    remembered_class("auto", memory)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert "/DEFAULT/" in asked(memory)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert asked(memory).startswith(device_class("cpu"))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"class": "cpu/odd"}', b"[" * 100_000])
def test_a_damaged_memory_is_none(data: bytes, tmp_path: Path):
    memory = tmp_path / "device.json"
    memory.write_bytes(data)
    assert asked(memory) == f"{device_class('cpu')} True"
    assert asked(memory) == f"{device_class('cpu')} False"


def test_where_nothing_can_be_kept_it_is_asked_each_time(tmp_path: Path, cpu_alone: None):
    (tmp_path / "file").write_text("")
    assert remembered_class("cpu", tmp_path / "file" / "device.json") == device_class("cpu")


def test_where_there_is_a_sign_of_a_gpu_it_is_asked_each_time(tmp_path: Path):
    memory = tmp_path / "device.json"
    first = asked(memory)
    assert asked(memory, str(tmp_path / "none")) == first.replace("True", "False")
    assert asked(memory, str(tmp_path)) == first


def test_a_gpu_is_not_remembered(tmp_path: Path, cpu_alone: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "resolve_device", lambda _: "cuda:0")
    monkeypatch.setattr(device, "device_class", lambda _: "cuda/sm_90")
    assert remembered_class("auto", tmp_path / "device.json") == "cuda/sm_90"
    assert not (tmp_path / "device.json").exists()


def test_what_is_no_device_is_refused_though_another_is_remembered(tmp_path: Path, cpu_alone: None):
    memory = tmp_path / "device.json"
    remembered_class("cpu", memory)
    with pytest.raises(ConfigError, match=r"runtime\.device is 'tpu'"):
        remembered_class("tpu", memory)
