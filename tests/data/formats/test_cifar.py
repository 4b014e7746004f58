"""CIFAR-10 and CIFAR-100: both versions decode to the same pixels, and no file can do more than be refused."""

import contextlib
import dataclasses
import faulthandler
import gc
import hashlib
import os
import pickle
import resource
import shlex
import struct

import numpy as np
import pytest

from fastil.data import DataConfig, load_dataset
from fastil.data.formats import cifar
from fastil.errors import UserError

VARIANTS = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}
CLASSES = {"cifar10": 10, "cifar100": 100}


# Pickles by hand. Python 2 wrote the originals: its strings are bytes here, and numpy has its old name.


class Raw(bytes):
    """Opcodes that push one value."""


def opcodes(value):
    """The protocol 2 opcodes of a value as Python 2 wrote it."""
    match value:
        case Raw():
            return bytes(value)
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case str():
            return b"X" + struct.pack("<i", len(value.encode())) + value.encode()
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            return b"L%dL\n" % value
        case float():
            return b"G" + struct.pack(">d", value)
        case None:
            return b"N"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case dict():
            return b"}(" + b"".join(opcodes(part) for pair in value.items() for part in pair) + b"u"
        case np.ndarray():
            return array(call(DTYPE, value.dtype.str[1:].encode(), 0, 1), value.shape, value.tobytes())
    raise TypeError(type(value))


def name_of(module, name):
    return Raw(f"c{module}\n{name}\n".encode())


def call(function, *arguments):
    return Raw(function + opcodes(arguments) + b"R")


def build(value, state):
    return Raw(opcodes(value) + opcodes(state) + b"b")


def put(value, index):
    return Raw(opcodes(value) + b"q" + bytes([index]))


def get(index):
    return Raw(b"h" + bytes([index]))


NDARRAY, DTYPE = name_of("numpy", "ndarray"), name_of("numpy", "dtype")
RECONSTRUCT = name_of("numpy.core.multiarray", "_reconstruct")


def array(dtype, shape, content, fortran=False):
    return build(call(RECONSTRUCT, NDARRAY, (0,), b"b"), (1, tuple(shape), dtype, fortran, content))


def by_python2(value, protocol=2):
    return b"\x80" + bytes([protocol]) + opcodes(value) + b"."


def by_python3(value):
    return pickle.dumps(value, protocol=2)


# Small data sets


def samples(name, count, seed):
    """Rows of planes, and labels that name every class in an order of their own."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return rows, random.permutation(np.arange(count) % CLASSES[name])


def class_names(name):
    return [f"class-{number}" for number in range(CLASSES[name])]


def parts_of(name):
    """{file: (rows, labels)} of a small data set with every class in train and test."""
    variant = VARIANTS[name]
    total = CLASSES[name]
    rows, labels = samples(name, total, 1)
    split = len(variant.train)
    parts = {
        file.name: (rows[i::split], labels[i::split]) for i, file in enumerate(variant.train)
    }  # every split-th image to each file
    parts[variant.test.name] = samples(name, total, 2)
    return parts


def content_of(name, rows, labels):
    content = {b"data": rows, VARIANTS[name].label_key: labels.tolist(), b"batch_label": b"one of some"}
    if name == "cifar100":
        content[b"coarse_labels"] = [(label * 7 + 1) % 20 for label in labels.tolist()]
    return content


def write_python(folder, name, dump=by_python2, **replaced):
    """The python version; replaced: other bytes for `train`, `test` or `meta`."""
    variant = VARIANTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file, (rows, labels) in parts_of(name).items():
        (folder / file).write_bytes(dump(content_of(name, rows, labels)))
    names = [text.encode() for text in class_names(name)]
    (folder / variant.meta.name).write_bytes(dump({variant.names_key: names, b"num_vis": 3072}))
    for role, raw in replaced.items():
        (folder / name_in(variant, role)).write_bytes(raw)
    return folder


def name_in(variant, role):
    return {"train": variant.train[0], "test": variant.test, "meta": variant.meta}[role].name


def write_binary(folder, name):
    variant = VARIANTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file, (rows, labels) in parts_of(name).items():
        fine = labels.astype(np.uint8)[:, None]
        columns = [fine, rows] if name == "cifar10" else [(fine * 7 + 1) % 20, fine, rows]
        target = {"train": "train.bin", "test": "test.bin"}.get(file, f"{file}.bin")
        (folder / target).write_bytes(np.concatenate(columns, axis=1).tobytes())
    (folder / variant.names_file).write_text("\n".join(class_names(name)) + "\n\n")
    return folder


def load(folder, name, verify=False):
    return load_dataset(DataConfig(dataset=name, data=str(folder), verify=verify))


def check(dataset, name):
    parts = parts_of(name)
    *train, test = parts.values()
    for split, files in ((dataset.train, train), (dataset.val, [test])):
        rows = np.concatenate([rows for rows, _ in files])
        n, y, x, c = np.indices((len(rows), 32, 32, 3))
        np.testing.assert_array_equal(split.images, rows[n, c * 1024 + y * 32 + x])
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)
        assert split.labels.tolist() == [label for _, labels in files for label in labels.tolist()]
    assert dataset.class_names == class_names(name)
    assert dataset.name == name


# What is read


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dump", [by_python2, by_python3])
@pytest.mark.parametrize("above", [True, False])
def test_the_python_version_is_read_from_its_folder_or_the_one_above(tmp_path, name, dump, above):
    folder = write_python(tmp_path / VARIANTS[name].python_folder, name, dump)
    check(load(tmp_path if above else folder, name), name)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("fortran", [False, True])
def test_files_that_python_3_has_written_are_read_with_text_for_keys_and_names(tmp_path, name, protocol, fortran):
    def dump(content):
        def text(value):
            if isinstance(value, list) and isinstance(value[0], bytes):
                return [part.decode() for part in value]
            return np.asfortranarray(value) if fortran and isinstance(value, np.ndarray) else value

        return pickle.dumps({key.decode(): text(value) for key, value in content.items()}, protocol=protocol)

    check(load(write_python(tmp_path, name, dump), name), name)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("above", [True, False])
def test_the_binary_version_is_read_from_its_folder_or_the_one_above(tmp_path, name, above):
    folder = write_binary(tmp_path / VARIANTS[name].binary_folder, name)
    check(load(tmp_path if above else folder, name), name)


def test_a_damaged_list_of_names_is_one_line_and_no_class_is_there_twice(tmp_path):
    names = write_binary(tmp_path, "cifar100") / cifar.CIFAR100.names_file
    there = names.read_bytes()
    names.write_bytes(there.replace(b"class-7\n", b"cl\xe4ss-7\n"))
    with pytest.raises(UserError, match="not UTF-8"):
        load(tmp_path, "cifar100")
    names.write_bytes(there.replace(b"class-7\n", b"class-8\n"))
    with pytest.raises(UserError, match="two classes are called 'class-8'"):
        load(tmp_path, "cifar100")


@pytest.mark.parametrize("name", VARIANTS)
def test_val_same_is_the_training_images_and_another_val_is_refused(tmp_path, name):
    write_python(tmp_path / "x", name)
    dataset = load_dataset(DataConfig(dataset=name, data=str(tmp_path / "x"), val="same", verify=False))
    assert dataset.val.sha256 == dataset.train.sha256
    assert any("smoke test" in note for note in dataset.notes)
    with pytest.raises(UserError, match="brings its own validation images"):
        load_dataset(DataConfig(dataset=name, data=str(tmp_path / "x"), val=str(tmp_path), verify=False))


@pytest.mark.parametrize("name", VARIANTS)
def test_other_images_in_the_binary_version_are_refused_by_default(tmp_path, name):
    write_binary(tmp_path, name)  # no sums of its files are published, but classes and counts are
    with pytest.raises(UserError, match=rf"{tmp_path}: not CIFAR-\d+ as published: classes are renamed.*verify=false"):
        load_dataset(DataConfig(dataset=name, data=str(tmp_path)))


def test_an_array_in_fortran_order_keeps_its_pixels(tmp_path):
    rows, labels = parts_of("cifar100")["train"]
    data = array(call(DTYPE, b"u1", 0, 1), rows.shape, np.asfortranarray(rows).tobytes(order="F"), fortran=True)
    raw = by_python2({b"data": data, b"fine_labels": labels.tolist()})
    check(load(write_python(tmp_path, "cifar100", train=raw), "cifar100"), "cifar100")


# Checksums


@pytest.fixture
def variant_with_sums(tmp_path, monkeypatch):
    """CIFAR-10 whose published sums are those of the small files in tmp_path."""
    write_python(tmp_path, "cifar10")

    def summed(file):
        raw = (tmp_path / file.name).read_bytes()
        images = len(parts_of("cifar10")[file.name][0]) if file.images else 0
        return file._replace(md5=hashlib.md5(raw, usedforsecurity=False).hexdigest(), images=images)

    small = dataclasses.replace(
        cifar.CIFAR10,
        train=tuple(map(summed, cifar.CIFAR10.train)),
        test=summed(cifar.CIFAR10.test),
        meta=summed(cifar.CIFAR10.meta),
    )
    monkeypatch.setattr(cifar, "CIFAR10", small)
    return small


FILES = ["data_batch_1", "data_batch_4", "test_batch", "batches.meta"]


def test_files_with_the_published_sums_are_accepted(tmp_path, variant_with_sums):
    check(load(tmp_path, "cifar10", verify=True), "cifar10")


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_is_named_and_read_only_with_verify_false(tmp_path, variant_with_sums, file):
    path = tmp_path / file
    raw = bytearray(path.read_bytes())
    place = raw.index(b"class-9") if file == "batches.meta" else raw.index(parts_of("cifar10")[file][0].tobytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"{path}.*verify=false"):
        load(tmp_path, "cifar10", verify=True)
    changed = load(tmp_path, "cifar10", verify=False)
    with pytest.raises(AssertionError):
        check(changed, "cifar10")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_shipped_sums_refuse_other_files_by_default(tmp_path, name):
    write_python(tmp_path, name)
    with pytest.raises(UserError, match=f"{tmp_path}/.*md5"):
        load_dataset(DataConfig(dataset=name, data=str(tmp_path)))


def test_a_file_with_the_right_sum_but_another_number_of_images_is_refused(tmp_path, variant_with_sums, monkeypatch):
    test = variant_with_sums.test._replace(images=9)
    monkeypatch.setattr(cifar, "CIFAR10", dataclasses.replace(variant_with_sums, test=test))
    with pytest.raises(UserError, match="test_batch: 10 images instead of 9"):
        load(tmp_path, "cifar10", verify=True)


# What is missing or cut short


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_without_the_data_set_names_the_command_that_fetches_it(tmp_path, name):
    with pytest.raises(UserError, match=f"fastil download {name} {tmp_path}"):
        load(tmp_path, name)


@pytest.mark.parametrize("name", VARIANTS)
def test_without_a_path_the_command_that_fetches_it_is_named(name):
    with pytest.raises(UserError, match=f"fastil download {name}.*--data"):
        load_dataset(DataConfig(dataset=name))


@pytest.mark.parametrize("file", FILES[1:])
def test_a_missing_file_of_the_python_version_is_named(tmp_path, file):
    write_python(tmp_path, "cifar10")
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=str(tmp_path / file)):
        load(tmp_path, "cifar10")


@pytest.mark.parametrize("file", ["data_batch_3.bin", "test_batch.bin", "batches.meta.txt"])
def test_a_missing_file_of_the_binary_version_is_named(tmp_path, file):
    write_binary(tmp_path, "cifar10")
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=str(tmp_path / file)):
        load(tmp_path, "cifar10")


@pytest.mark.parametrize("dump", [by_python2, by_python3])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99, 0.99999])
def test_a_truncated_pickle_is_named(tmp_path, dump, share):
    path = write_python(tmp_path, "cifar100", dump) / "train"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError, match=str(path)) as error:
        load(tmp_path, "cifar100")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("left", [0, 1, -1, -3000])
def test_a_truncated_binary_file_is_named(tmp_path, name, left):
    variant = VARIANTS[name]
    path = write_binary(tmp_path, name) / variant.binary_test
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=str(path)):
        load(tmp_path, name)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_binary_label_beyond_the_names_is_refused(tmp_path, name):
    variant = VARIANTS[name]
    path = write_binary(tmp_path, name) / variant.binary_train[-1]
    raw = bytearray(path.read_bytes())
    raw[0 if name == "cifar10" else 1] = CLASSES[name]
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"{path}: label {CLASSES[name]}"):
        load(tmp_path, name)


def test_the_coarse_label_of_the_binary_version_is_not_checked_against_the_fine_names(tmp_path):
    path = write_binary(tmp_path, "cifar100") / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[0] = 255
    path.write_bytes(raw)
    check(load(tmp_path, "cifar100"), "cifar100")


# Pickles that would run code


def shell(canary):
    return f"touch {shlex.quote(str(canary))}"


class Touch:
    """Pickles to a call of os.system."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (shell(self.path),)


def load_of_a_poisoned_file(canary):
    poisoned = canary.with_name("poisoned.npy")
    np.save(poisoned, np.array([Touch(canary)], dtype=object), allow_pickle=True)
    return call(name_of("numpy", "load"), str(poisoned), None, True)


def through_a_dotted_name(canary):
    function = Raw(opcodes("numpy") + opcodes("ndarray.tofile") + b"\x93")  # "numpy" is allowed, ndarray is too
    return call(function, np.zeros(1, dtype=np.uint8), str(canary))


PAYLOADS = {
    "os.system": lambda canary: call(name_of("os", "system"), shell(canary)),
    "posix.system": lambda canary: call(name_of("posix", "system"), shell(canary)),
    "subprocess.call": lambda canary: call(name_of("subprocess", "call"), ["touch", str(canary)]),
    "builtins.eval": lambda canary: call(name_of("builtins", "eval"), f"open({str(canary)!r}, 'w').close()"),
    "builtins.exec": lambda canary: call(name_of("builtins", "exec"), f"open({str(canary)!r}, 'w').close()"),
    "builtins.open": lambda canary: call(name_of("builtins", "open"), str(canary), "w"),
    "python 2's name of eval": lambda c: call(name_of("__builtin__", "eval"), f"open({str(c)!r}, 'w').close()"),
    "numpy.memmap": lambda canary: call(name_of("numpy", "memmap"), str(canary), "u1", "w+", 0, (1,)),
    "numpy.savetxt": lambda canary: call(name_of("numpy", "savetxt"), str(canary), [1]),
    "numpy.load": load_of_a_poisoned_file,
    "a dotted name": through_a_dotted_name,
    "opcode INST": lambda canary: Raw(b"(" + opcodes(shell(canary)) + b"ios\nsystem\n"),
    "opcode OBJ": lambda canary: Raw(b"(" + name_of("os", "system") + opcodes(shell(canary)) + b"o"),
    "an object with __reduce__": lambda canary: Raw(pickle.dumps(Touch(canary), 2)[2:-1]),
}
PLACES = {
    "alone": lambda payload: payload,
    "as the images": lambda payload: {b"data": payload, b"fine_labels": [0]},
    "nested": lambda payload: {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [0], b"x": [{b"y": (payload,)}]},
    "as a state": lambda payload: {b"data": array(payload, (1,), b"x"), b"fine_labels": [0]},
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, payload, place):
    canary = tmp_path / "canary"
    raw = by_python2(place(payload(canary)), protocol=4 if payload is through_a_dotted_name else 2)
    with contextlib.suppress(Exception):  # first prove that an ordinary unpickler falls for it
        pickle.loads(raw, encoding="bytes")
    assert canary.exists()
    canary.unlink()
    path = write_python(tmp_path / "data", "cifar100", train=raw) / "train"
    with pytest.raises(UserError, match=f"{path}: refused"):
        load(tmp_path / "data", "cifar100")
    assert not canary.exists()


@pytest.mark.parametrize("role", ["train", "test", "meta"])
def test_every_pickle_of_the_data_set_is_read_with_care(tmp_path, role):
    canary = tmp_path / "canary"
    raw = by_python2({b"data": PAYLOADS["os.system"](canary)})
    write_python(tmp_path, "cifar100", **{role: raw})
    with pytest.raises(UserError, match=r"\.system"):
        load(tmp_path, "cifar100")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy", "fromfile"),
        ("numpy", "load"),
        ("numpy", "frompyfunc"),
        ("numpy", "DataSource"),
        ("_codecs", "lookup"),
        ("codecs", "encode"),
        ("builtins", "getattr"),
        ("copyreg", "_reconstructor"),
        ("collections", "OrderedDict"),
        ("fastil.data.formats.cifar", "read"),
    ],
)
def test_a_global_that_no_cifar_file_needs_is_refused_by_name(tmp_path, module, name):
    raw = by_python2({b"data": name_of(module, name), b"fine_labels": [0]})
    write_python(tmp_path, "cifar100", train=raw)
    with pytest.raises(UserError, match=f"{module}.{name}"):
        load(tmp_path, "cifar100")


# Pickles that use what is allowed to build nonsense


def outcome(folder, name):
    """What reading does, seen from outside: a crash of the reader must not be one of the test run."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        gc.freeze()  # the collection below is to look at what this child makes only
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        text = "read without complaint"
        try:
            load(folder, name)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        gc.collect()  # a damaged object may crash only when it is freed
        os.write(writing, text.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return text if status == 0 else f"ended by signal {-status}"


ROW = np.zeros((1, 3072), dtype=np.uint8)
RAW_POINTERS = b"A" * 32


def dtype(code, *state):
    new = call(DTYPE, code, 0, 1)
    return build(new, state) if state else new


def dtype_that_forgets_its_objects():
    return dtype(b"O8", 3, b"|", None, None, None, -1, -1, 0)


def dtype_with_a_field(offset):
    return dtype(b"V8", 3, b"|", None, (b"a",), {b"a": (dtype(b"O8"), offset)}, 8, 1, 0)


IMAGES = {
    "an array of objects": array(dtype(b"O8"), (1,), [b"x"]),
    "an array of objects of the right shape": array(dtype(b"O8"), (1, 3072), [b"x"] * 3072),
    "floats": np.zeros((1, 3072)),
    "signed bytes": np.zeros((1, 3072), dtype=np.int8),
    "one dimension": ROW[0],
    "three dimensions": ROW[None],
    "too few columns": ROW[:, :-1],
    "two rows for one label": np.repeat(ROW, 2, axis=0),
    "bytes": ROW.tobytes(),
    "a list": [0] * 3072,
    "None": None,
    "a type": NDARRAY,
    "more memory than there is": call(NDARRAY, (2**30, 2**20), b"u1"),
    "fewer bytes than the shape": array(dtype(b"u1"), (1, 3072), b"x" * 10),
    "a negative shape": array(dtype(b"u1"), (-1, -3072), b"x" * 3072),
    "strides outside its buffer": call(NDARRAY, (1, 3072), b"u1", b"x" * 10, 0, (0, 2**20)),
    "a state that is none": build(call(RECONSTRUCT, NDARRAY, (0,), b"b"), {b"a": 1}),
    "the state of a dtype": build(call(RECONSTRUCT, NDARRAY, (0,), b"b"), (3, b"|", None, None, None, -1, -1, 0)),
    "a state for a type": build(NDARRAY, {b"a": 1}),
    "a reconstruction of no array": call(RECONSTRUCT, DTYPE, (0,), b"b"),
    "bytes as pointers": array(dtype_that_forgets_its_objects(), (4,), RAW_POINTERS),
    "bytes that become pointers": [
        array(put(dtype_that_forgets_its_objects(), 7), (4,), RAW_POINTERS),
        build(get(7), (3, b"|", None, None, None, -1, -1, 63)),
    ],
    "a field with objects": array(dtype_with_a_field(0), (4,), RAW_POINTERS),
    "a field far outside": array(dtype_with_a_field(2**30), (4,), RAW_POINTERS),
    "an item size of its own": array(dtype(b"S1", 3, b"|", None, None, None, 10**5, 1, 0), (1, 3072), ROW.tobytes()),
    "dates without units": array(dtype(b"M8", 3, b"<", None, None, None, -1, -1, 0), (1,), b"A" * 8),
    "dates with nonsense for units": array(dtype(b"M8", 4, b"<", None, None, None, -1, -1, 0, b"x"), (1,), b"A" * 8),
}  # fmt: skip


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_images_that_are_none_are_the_users_mistake_and_no_crash(tmp_path, images):
    path = write_python(tmp_path, "cifar100", test=by_python2({b"data": images, b"fine_labels": [0]})) / "test"
    found = outcome(tmp_path, "cifar100")
    assert found.startswith(f"UserError: {path}: "), found


def test_bytes_that_claim_to_be_objects_are_bytes_or_refused(tmp_path):
    data = array(dtype(b"u1", 3, b"|", None, None, None, 1, 1, 63), (100, 3072), bytes(100 * 3072))
    write_python(tmp_path, "cifar100", test=by_python2({b"data": data, b"fine_labels": list(range(100))}))
    found = outcome(tmp_path, "cifar100")
    assert found.startswith(("UserError: ", "read without complaint")), found


GOOD = list(range(100))
LABELS = {
    "missing": None,
    "a number": 5,
    "text": [*GOOD[:-1], b"x"],
    "bytes": bytes(GOOD),
    "None among them": [*GOOD[:-1], None],
    "fractions": [*GOOD[:-1], 99.5],
    "lists": [[label, label] for label in GOOD],
    "lists of several lengths": [[0, 1], *[[0]] * 99],
    "too few": GOOD[:-1],
    "negative": [*GOOD[:-1], -1],
    "beyond the classes": [*GOOD[:-1], 100],
    "beyond memory": [*GOOD[:-1], 2**40],
    "beyond int64": [*GOOD[:-1], 2**70],
    "a dictionary": {label: label for label in GOOD},
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_that_are_none_are_the_users_mistake_and_no_crash(tmp_path, labels):
    content = {b"data": np.zeros((100, 3072), dtype=np.uint8), b"fine_labels": labels}
    write_python(tmp_path, "cifar100", test=by_python2(content))
    found = outcome(tmp_path, "cifar100")
    assert found.startswith("UserError: "), found


def test_the_labels_of_the_tests_above_would_be_accepted_without_their_fault(tmp_path):
    content = {b"data": np.zeros((100, 3072), dtype=np.uint8), b"fine_labels": GOOD}
    write_python(tmp_path, "cifar100", test=by_python2(content))
    assert load(tmp_path, "cifar100").val.labels.tolist() == GOOD


NAMES = {
    "missing": {},
    "a number": {b"fine_label_names": 100},
    "numbers": {b"fine_label_names": GOOD},
    "one string": {b"fine_label_names": b"x" * 100},
    "no UTF-8": {b"fine_label_names": [b"\xff"] * 100},
    "too few": {b"fine_label_names": [b"x"] * 99},
    "too many": {b"fine_label_names": [b"x"] * 101},
    "no dictionary": [b"x"] * 100,
}


@pytest.mark.parametrize("meta", NAMES.values(), ids=NAMES)
def test_class_names_that_are_none_are_the_users_mistake_and_no_crash(tmp_path, meta):
    write_python(tmp_path, "cifar100", meta=by_python2(meta))
    found = outcome(tmp_path, "cifar100")
    assert found.startswith("UserError: "), found


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_without_a_single_image_is_the_users_mistake(tmp_path, split):
    content = {b"data": np.zeros((0, 3072), dtype=np.uint8), b"fine_labels": []}
    write_python(tmp_path, "cifar100", **{split: by_python2(content)})
    with pytest.raises(UserError):
        load(tmp_path, "cifar100")


def test_reading_a_hostile_file_leaves_numpy_as_it_was(tmp_path):
    before = (np.dtype("u1").itemsize, np.dtype("u1").flags, np.dtype("i8").flags)
    hostile = [build(call(DTYPE, code), (3, b">", None, None, None, 9, 9, 63)) for code in (b"u1", b"i8")]
    write_python(tmp_path, "cifar100", train=by_python2({b"data": hostile, b"fine_labels": [0]}))
    with pytest.raises(UserError):
        load(tmp_path, "cifar100")
    assert (np.dtype("u1").itemsize, np.dtype("u1").flags, np.dtype("i8").flags) == before
    assert np.arange(3).sum() == 3
