"""One tree of images in every container: a folder, a tar, WebDataset, parquet and a .beton give the same classes in the
same order, the same pixels and the same list of what is left out."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SOAK
from converting import run, write, zoo
from making import write_tar

from fastil.data.formats import in_memory
from fastil.data.formats.detect import open_source
from fastil.data.formats.pixels import Reading, reading_of
from fastil.data.formats.records import canonical, item_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TREES = 60 if SOAK else 3
ZOO = {name: kind for name, kind in zoo().items() if max(kind.pixels.shape) < 1000}
WORDS = ["cat", "Dog", "a b", "k\u00e4fer", "n01440764", "x.y", "zebra", "Ape", "7up", "--", "\u732b", "owl"]
UNREAD, COMPANIONS = [".svg", ".psd", ".CR2"], [".txt", ".json"]  # left out; the former count as images that are lost


def endings(name):
    """The ending of a file of the zoo, in large letters now and then."""
    return os.path.splitext(name)[1]


class Drawn:
    """A random tree. images: by split and class, (name of the file, name in the zoo); junk: by split and class, names
    of files that are left out; extra: files by their way that no container but a folder and a tar can hold."""

    def __init__(self, seed):
        self.random = random = np.random.default_rng(seed)
        if seed % 3 == 0:  # the numbers of their labels, more than ten of them
            self.classes = [str(label) for label in range(int(random.integers(11, 14)))]
        else:
            count = int(random.integers(2, len(WORDS)))
            self.classes = [str(name) for name in random.choice(WORDS, count, replace=False)]
        self.images, self.junk, self.extra = {}, {}, {}
        for split in ("train", "val"):
            for name in self.classes:
                stems = [f"{n:04d}" for n in random.choice(10_000, 12, replace=False)]
                kinds = random.choice(list(ZOO), int(random.integers(4, 6)))
                self.images[split, name] = [(stems.pop() + endings(kind), str(kind)) for kind in kinds]
                some = random.choice(UNREAD + COMPANIONS, int(random.integers(0, 3)))
                self.junk[split, name] = [stems.pop() + suffix for suffix in some]
        first, last = self.classes[0], self.classes[-1]
        self.extra = {
            f"train/{first}/.hidden.png": b"1", f"train/{last}/sub/deeper.png": b"1", f"val/{first}/.DS_Store": b"1",
            "train/README.txt": b"1", "train/.cache/x.png": b"1", "train/__MACOSX/a.png": b"1", "notes.md": b"1",
        }  # fmt: skip

    def files(self):
        """All of it by its way in a folder."""
        found = dict(self.extra)
        for (split, name), images in self.images.items():
            found |= {f"{split}/{name}/{file}": ZOO[kind].content for file, kind in images}
            found |= {f"{split}/{name}/{file}": b"junk" for file in self.junk[split, name]}
        return found

    def shuffled(self, things):
        return [things[i] for i in self.random.permutation(len(things))]

    def in_order(self):
        """The classes as they are to be numbered."""
        numbers = all(name.isdigit() for name in self.classes)
        return sorted(self.classes, key=int if numbers else None)

    def expected(self, split):
        """(label, pixels) of every image by class and name, by the zoo and not by any reader."""
        return [
            (label, ZOO[kind].pixels)
            for label, name in enumerate(self.in_order())
            for _, kind in sorted(self.images[split, name])
        ]

    def webdataset(self, root):
        """Shards; classes that are their numbers need no list of names."""
        names = self.in_order()
        for split in ("train", "val"):
            samples = []
            for label, name in enumerate(names):
                for file, content in [(file, ZOO[kind].content) for file, kind in self.images[split, name]] + [
                    (file, b"junk") for file in self.junk[split, name] if not file.endswith(tuple(COMPANIONS))
                ]:
                    stem = f"{name}/{file.partition('.')[0]}"
                    samples.append([(f"{name}/{file}", content), (f"{stem}.cls", str(label).encode())])
            samples = self.shuffled(samples)
            half = len(samples) // 2
            for number, part in enumerate((samples[:half], samples[half:])):
                members = [("__meta__.json", b"{}"), *(member for sample in part for member in sample)]
                write_tar(root / f"{split}-{number:04d}.tar", members)
        if names != [str(label) for label in range(len(names))]:
            (root / "classnames.txt").write_text("\n".join(names), encoding="utf-8")
        return root

    def parquet(self, root, seed):
        """Labels as numbers, as text, or as text in a dictionary; bytes of three types."""
        names, root = self.in_order(), Path(root)
        root.mkdir()
        numbers = names == [str(label) for label in range(len(names))]
        for split in ("train", "val"):
            rows = self.shuffled(
                [
                    (ZOO[kind].content, f"{name}/{file}", label if numbers else name)
                    for label, name in enumerate(names)
                    for file, kind in self.images[split, name]
                ]
            )
            contents, paths, labels = zip(*rows, strict=True)
            kinds = [pa.binary(), pa.large_binary()] + ([pa.binary_view()] if hasattr(pa, "binary_view") else [])
            texts = [pa.string(), pa.large_string()] + ([pa.string_view()] if hasattr(pa, "string_view") else [])
            image = pa.StructArray.from_arrays(
                [pa.array(contents, kinds[seed % len(kinds)]), pa.array(paths, texts[seed % len(texts)])],
                ["bytes", "path"],
            )
            column = pa.array(labels) if numbers else pa.array(labels, texts[(seed + 1) % len(texts)])
            if not numbers and seed % 2:
                column = pa.array(labels).dictionary_encode()
            table = pa.table({"photo": image, "what": column})
            views = any("view" in str(field.type) for field in (*image.type, table.field("what")))
            size = None if views else 7  # pyarrow cannot write parts of those
            pq.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=size)
        return root


def seen(source, split):
    """(label, pixels) of every image in canonical order."""
    records, how = getattr(source, split), reading_of(source, Reading())
    return [(int(records.labels[i]), in_memory.decode(item_of(records, int(i)), None, how)) for i in canonical(records)]


def assert_same(found, expected):
    """JPEGs decode to what Pillow makes of them, the others to what was stored."""
    assert [label for label, _ in found] == [label for label, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("seed", range(TREES))
def test_a_tree_is_the_same_in_every_container(tmp_path, seed):
    drawn = Drawn(seed)
    files = drawn.files()
    folder = write(tmp_path / "folder", files)
    lead = "pets/" if seed % 2 else ""
    archive = write_tar(
        tmp_path / "packed.tar",
        [(f"{lead}{name}", files[name]) for name in drawn.shuffled(sorted(files))],
        format=tarfile.PAX_FORMAT,
    )
    run(folder, tmp_path / "x.beton", mode="raw")
    sources = {
        "folder": open_source(folder), "tar": open_source(archive), "beton": open_source(tmp_path / "x.beton"),
        "webdataset": open_source(drawn.webdataset(tmp_path / "shards")),
        "parquet": open_source(
            drawn.parquet(tmp_path / "rows", seed), image_column="photo", label_column="what"
        ),
    }  # fmt: skip
    for kind, source in sources.items():
        assert source.class_names == drawn.in_order(), kind
        for split in ("train", "val"):
            assert_same(seen(source, split), drawn.expected(split))
    # What is left out: by class and ending the same in all that hold it. Rows of parquet are images by their column.
    notes = sources["folder"].notes
    assert sources["tar"].notes == notes
    assert set(sources["beton"].notes) == set(notes)
    deeper = f"images in folders below their class: 1 in class {drawn.classes[-1]} left out; move them up"
    stray = "1 files in no class folder are left out, such as train/README.txt"
    lines = {note for note in notes if note.startswith(tuple(COMPANIONS))}
    assert set(notes) - set(sources["webdataset"].notes) == {deeper, stray} | lines
    assert set(sources["webdataset"].notes) <= set(notes)
    numbered = [note for note in notes if note.startswith("class names are numbers")]
    assert list(sources["parquet"].notes) == numbered
    assert bool(numbered) == (seed % 3 == 0)
    for suffix in {os.path.splitext(file)[1].lower() for junk in drawn.junk.values() for file in junk}:
        (note,) = [note for note in notes if note.startswith(f"{suffix}: ")]
        for (split, name), junk in drawn.junk.items():
            count = sum(file.lower().endswith(suffix) for file in junk)
            called = f"{count} in class {name}" + (" of val" if split == "val" else "")
            assert count == 0 or called in note or note.count(" in ") > 3, (note, called)


def test_the_pixels_as_they_lie_in_the_file_are_the_same_in_every_container(tmp_path):
    """exif=ignore, for whoever compares with a toolbox that does not turn images."""
    from PIL import Image

    names = [name for name in ZOO if "turned" in name]
    files = {f"train/{'ab'[n % 2]}/{name}": ZOO[name].content for n, name in enumerate(names)}
    folder, how = write(tmp_path / "folder", files), Reading("ignore")
    run(folder, tmp_path / "x.beton", mode="raw", exif="ignore")
    run(folder, tmp_path / "kept.beton", exif="ignore")
    source = open_source(folder)
    raw, kept = open_source(tmp_path / "x.beton"), open_source(tmp_path / "kept.beton")
    assert len(source.train) == len(names) == 9
    for i in range(len(source.train)):
        with Image.open(io.BytesIO(source.train.content(i))) as image:
            expected = np.asarray(image)
            if image.format == "TIFF":  # which Pillow turns while it loads it
                expected = np.rot90(expected, -1)
        np.testing.assert_array_equal(in_memory.decode(item_of(source.train, i), None, how), expected)
        np.testing.assert_array_equal(raw.train.content(i), expected)
        stored = in_memory.decode(item_of(kept.train, i), None, reading_of(kept, Reading()))
        assert stored.shape == expected.shape
        if source.train.name(i).endswith(".jpg"):  # whose bytes are kept, tag and all; a .beton is shown as it is
            assert kept.train.content(i) == source.train.content(i)
            np.testing.assert_array_equal(stored, expected)
