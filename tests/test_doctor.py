"""What `fastil doctor` says of a GPU, on a machine that has none: torch's answers are made up."""

from types import SimpleNamespace

import pytest
import torch

from fastil import doctor, machine


@pytest.fixture
def gpu(monkeypatch):
    """A torch that sees an H100, and a driver."""
    properties = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: properties.name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(doctor, "_driver", lambda: "580.10")


@pytest.mark.usefixtures("gpu")
def test_a_gpu_with_its_driver_and_what_is_chosen(monkeypatch):
    monkeypatch.setattr(machine, "lacks_for_triton", lambda: None)
    first, driver, kernels = doctor._gpu()
    assert first == "NVIDIA H100, compute capability 9.0, 80 GiB, 132 multiprocessors"
    assert driver == "driver 580.10; torch is built for CUDA 13.0"
    assert kernels == "kernels: Triton has the C compiler that it needs"
    compiled, captured = doctor._step()
    # 1.5e15 operations, of which ResNet-32's forward takes 69 million multiplications and as many sums (He et al.).
    assert compiled.startswith(
        "compile=auto compiles a run of more than about 3.6 million visits of ResNet-32 at 32x32"
    )
    assert captured.startswith("captured in a CUDA graph")
    assert doctor._precision()[0] == "NVIDIA H100: precision=auto is bf16"


@pytest.mark.usefixtures("gpu")
def test_a_missing_compiler_is_named_with_its_fix(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert doctor._gpu()[-1] == "kernels: Triton lacks a C compiler: apt-get install gcc, or set CC"
    monkeypatch.setenv("CC", "/usr/bin/cc")
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert doctor._gpu()[-1].startswith("kernels: Triton lacks Python's headers: apt-get install python3-dev")
    (tmp_path / "Python.h").touch()
    assert "has the C compiler" in doctor._gpu()[-1]


def test_without_a_gpu_it_says_what_stands_in_the_way(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor._gpu() == ["this torch is a CPU build; training runs on the CPU"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    assert doctor._gpu() == ["none visible; install the NVIDIA driver"]
    monkeypatch.setattr(doctor, "_driver", lambda: "470.1")
    assert doctor._gpu() == ["none visible; its driver is 470.1, this torch wants one for CUDA 13.0"]
