"""Wheels that were carried: what is missing, damaged or for another Python is told with what to do about it."""

import sys
import zipfile

import pytest

from bench import wheels

VERSION = f"3.{sys.version_info[1]}"


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """Write wheels of one module each; returns the function."""
    monkeypatch.setattr(wheels, "WHEELS", tmp_path / "wheels")
    (tmp_path / "wheels").mkdir()

    def write(name, module):
        with zipfile.ZipFile(tmp_path / "wheels" / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{module}.py", f"text = {'x' * 5000!r}")
        return tmp_path / "wheels" / name

    return write


def only(monkeypatch, **groups):
    for name in ("OWN", "USUAL", "RARE", "PEERS"):
        monkeypatch.setattr(wheels, name, groups.get(name, {}))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pydantic", "isal"], []),
        (["pydantic", "scikit-learn"], ["--all"]),
        (["pytest", "liger-kernel"], ["--all"]),
    ],
)
@pytest.mark.parametrize("python", [VERSION, "3.99"])
def test_what_is_missing_names_the_command_that_brings_it(carried, monkeypatch, names, words, python):
    monkeypatch.setattr(wheels, "PYTHON", python)
    words = words + ([] if python == VERSION else [f"--python {VERSION}"])
    command = f'make wheels ARGS="{" ".join(words)}"' if words else "make wheels"
    needed = [name for name in names if name != "liger-kernel"]
    first, second = wheels.lacking(names).splitlines()
    assert first.endswith(f" lacks {', '.join(needed)}")
    assert second.startswith(f"`{command}` on a machine with a package registry fills ")


def test_torch_is_not_carried_and_a_peer_is_not_needed():
    assert wheels.lacking(["torch", "numpy"]).splitlines()[1:] == [
        "torch, numpy: cannot be carried; use a python3 that has them (make gpu PYTHON=...)"
    ]
    assert wheels.lacking(["liger-kernel"]) is None
    assert wheels.lacking([]) is None


def test_wheels_for_another_python_are_named(carried, tmp_path):
    carried("isal-1.9.1-cp39-cp39-manylinux2014_x86_64.whl", "isal")
    carried("typing_extensions-4.16.0-py3-none-any.whl", "typing_extensions")
    assert wheels.lacking(["isal"]).splitlines()[1] == f"the wheels in {tmp_path}/wheels are for Python 3.9"


def test_missing_is_what_cannot_be_imported(monkeypatch, tmp_path):
    (tmp_path / "isal.py").write_text("raise ImportError('built for another Python')")
    (tmp_path / "sklearn.py").write_text("raise ValueError('numpy.dtype size changed')")
    (tmp_path / "torch.py").write_text("raise OSError('takes long and is tried by the first stage')")
    only(
        monkeypatch, OWN={"torch": "torch", "triton_": "triton"}, USUAL={"sklearn": "scikit-learn", "json": "json"},
        RARE={"isal": "isal", "string": "string"},
    )  # fmt: skip
    assert wheels.missing(str(tmp_path)) == ["triton", "scikit-learn", "isal"]


def test_what_was_carried_completes_this_python(carried, monkeypatch, tmp_path):
    only(monkeypatch, RARE={"no_such_module": "no-such-package"})
    site = tmp_path / "site"
    with pytest.raises(ValueError, match="lacks no-such-package"):
        wheels.complete(site)
    carried("no_such_package-1-py3-none-any.whl", "no_such_module")
    carried("another-1-py3-none-any.whl", "another")
    assert wheels.complete(site) == f"{site}:{wheels.ROOT}"
    assert {path.name for path in site.iterdir()} == {"no_such_module.py", "another.py"}


def test_a_machine_that_lacks_only_a_peer_keeps_its_own_packages(carried, monkeypatch, tmp_path):
    only(monkeypatch, USUAL={"json": "json"}, PEERS={"no_such_module": "liger-kernel"})
    site = tmp_path / "site"
    assert wheels.complete(site) == str(wheels.ROOT)
    carried("liger_kernel-1-py3-none-any.whl", "no_such_module")
    carried("json-1-cp39-cp39-manylinux2014_x86_64.whl", "json")
    assert wheels.complete(site) == f"{site}:{wheels.ROOT}"
    assert [path.name for path in site.iterdir()] == ["no_such_module.py"]


@pytest.mark.parametrize("damage", ["cut", "empty", "a bit"])
def test_a_damaged_wheel_is_one_line(carried, monkeypatch, tmp_path, damage):
    only(monkeypatch, RARE={"no_such_module": "no-such-package"})
    carried("good-1-py3-none-any.whl", "good")
    for name in ("a", "b"):
        path = carried(f"{name}-1-py3-none-any.whl", "no_such_module")
        content = bytearray(path.read_bytes())
        content[60] ^= 4
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "a bit": content}[damage])
    with pytest.raises(ValueError, match="damaged") as found:
        wheels.complete(tmp_path / "site")
    lines = [f"{tmp_path}/wheels/{name}-1-py3-none-any.whl: damaged; carry it again" for name in ("a", "b")]
    assert str(found.value).splitlines() == lines


def test_where_the_checkout_cannot_be_written_the_results_take_it(monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "ROOT", tmp_path / "checkout")
    assert wheels.scratch(tmp_path / "out") == tmp_path / "out"  # no such folder
    (tmp_path / "checkout").mkdir()
    assert wheels.scratch(tmp_path / "out") == tmp_path / "checkout/build"
    monkeypatch.setattr(wheels.os, "access", lambda path, mode: False)
    assert wheels.scratch(tmp_path / "out") == tmp_path / "out"
