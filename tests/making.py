"""Miniature archives for the tests of data sources, and what is asked of every listing and every message."""

import io
import tarfile

import pytest
from PIL import Image

from fastil.data.formats.detect import open_source
from fastil.errors import UserError

# Runs of digits in three steps, in a second or two: each kind of network and of predictor.
THREE_STEPS = {"epochs": 2, "base_epochs": 2, "batch_size": 64, "classes": 6, "base_classes": 2, "increment": 2,
               "precision": "fp32", "loss": "softmax"}  # fmt: skip
COSINE = {"head": "cosine", "last_relu": False}
PREDICTORS = {
    "il_baseline": {},
    "lucir": COSINE | {"method": "lucir"},
    "podnet": COSINE | {"method": "podnet", "head": "proxies", "proxies": 3, "loss": "nca"},
    "bic": {"method": "bic", "exemplars_per_class": 10},
    "icarl, cnn": {"method": "icarl"},
    "icarl, nme": {"method": "icarl", "predictor": "nme"},
}


def png(number, size=8):
    """A PNG of one colour that tells it apart."""
    raw = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256, 200)).save(raw, "PNG")
    return raw.getvalue()


def tar_bytes(members, format=tarfile.GNU_FORMAT):
    """members: name to bytes, or to a type as str for what has no content. A name ending in / is a folder."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=format) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            elif isinstance(content, str):
                info.type, info.linkname = content.encode(), "elsewhere"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, **options))
    return path


def listed(source, split):
    """(name, class, content) of every sample."""
    records = getattr(source, split)
    assert len(records) == len(records.labels)
    return [(records.name(i), source.class_names[records.labels[i]], records.content(i)) for i in range(len(records))]


def refused(*parts, path, **options):
    """One line that names all parts."""
    with pytest.raises(UserError) as error:
        open_source(path, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message
