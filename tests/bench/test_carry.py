"""Files carried in parts: whole again at the other end, or one line that names what to carry again."""

import hashlib
import json

import numpy as np
import pytest

from bench.carry import main, pack, unpack

PART = 1000


def made(path, size, seed=0):
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return path


@pytest.fixture
def carried(tmp_path):
    """Two files in parts of PART bytes: 3 parts and 1."""
    files = [made(tmp_path / "a.beton", 2 * PART + 17), made(tmp_path / "b.beton", 5, seed=1)]
    pack(files, tmp_path / "parts", PART)
    return tmp_path / "parts"


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 3 * PART + 7])
def test_a_file_of_any_size_arrives_whole(tmp_path, size):
    file = made(tmp_path / "x.beton", size)
    parts = pack([file], tmp_path / "parts", PART)
    assert len(parts) == -(-size // PART)
    assert all(part.stat().st_size <= PART for part in parts)
    (arrived,) = unpack(tmp_path / "parts", tmp_path / "there")
    assert arrived == tmp_path / "there/x.beton"
    assert arrived.read_bytes() == file.read_bytes()
    assert [path.name for path in arrived.parent.iterdir()] == ["x.beton"]


def test_the_manifest_holds_the_hashes_that_sha256sum_prints(carried):
    (entry, _) = json.loads((carried / "manifest.json").read_text())["files"]
    content = b"".join((carried / part["name"]).read_bytes() for part in entry["parts"])
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_what_is_missing_or_damaged_is_named_and_nothing_is_written(carried, tmp_path, capsys):
    (carried / "a.beton.001").unlink()
    content = bytearray((carried / "b.beton.000").read_bytes())
    content[2] ^= 1
    (carried / "b.beton.000").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["unpack", str(carried), str(tmp_path / "there")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error == f"{carried}: a.beton.001 is missing, b.beton.000 is damaged; carry them again\n"
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    "text", [None, "", "{}", '{"files": 3}', '{"files": [{"name": "../x", "sha256": "", "parts": []}]}']
)
def test_a_manifest_that_is_none_is_one_line(carried, tmp_path, text):
    (carried / "manifest.json").unlink()
    if text is not None:
        (carried / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json: (missing|damaged); carry it"):
        unpack(carried, tmp_path / "there")


def test_parts_in_another_order_are_noticed(carried, tmp_path):
    path = carried / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["parts"].reverse()
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"its parts do not make up a\.beton"):
        unpack(carried, tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())


def test_packing_says_what_it_cannot_do(carried, tmp_path):
    file = made(tmp_path / "x", 3)
    with pytest.raises(ValueError, match="not empty"):
        pack([file], carried)
    with pytest.raises(ValueError, match="no such file"):
        pack([tmp_path / "none"], tmp_path / "new")
    with pytest.raises(ValueError, match="two files have one name"):
        pack([file, file], tmp_path / "new")
    assert not (tmp_path / "new").exists()
