"""Recipes: what may be written, what is said when it is not, and what survives the way to a run directory and back."""

import re
from dataclasses import fields
from importlib import resources

import pytest
import yaml
from conftest import ROOT, SOAK

from fastil import advice, recipe
from fastil.errors import UserError
from fastil.methods import configs_of
from fastil.protocol import build_protocol
from fastil.recipe_file import differences, file_names, load, read_effective

SHIPPED = file_names()  # those without a file: tests/test_from_scratch.py


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def text_of(name):
    return (resources.files("fastil.recipes") / f"{name}.yaml").read_text()


# Shipped recipes


def test_the_recipes_that_the_commands_name_are_shipped():
    assert {"digits", "fashion-mnist", "folder", "cifar100_il_baseline_5", "cifar100_balanced_5"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_as_it_is_and_says_what_it_is(name):
    loaded = load(name)
    assert loaded.name == name
    assert loaded.description
    assert loaded.fidelity
    assert differences(loaded) == {}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_first_line_of_a_shipped_recipe_is_its_command(name):
    words = text_of(name).splitlines()[0].split()
    assert words[:4] == ["#", "fastil", "run", name]


@pytest.mark.parametrize("name", SHIPPED)
def test_what_a_shipped_recipe_says_is_what_it_sets(name):
    """The file and its parents, merged here by hand, against the typed recipe."""
    chain = [yaml.safe_load(text_of(name))]
    while "base" in chain[0]:
        chain.insert(0, yaml.safe_load(text_of(chain[0]["base"])))
    merged = {key: value for values in chain for key, value in values.items() if key != "base"}
    loaded = load(name)
    for key in ("description", "fidelity"):
        assert getattr(loaded, key) == merged.pop(key)
    assert loaded.published == chain[-1].get("published")
    merged.pop("published", None)
    assert {key: loaded.keys()[key] for key in merged} == merged


@pytest.mark.parametrize(
    ("name", "published", "loss", "steps"),
    [
        ("cifar100_il_baseline_5", 43.80, "softmax", [50] + 5 * [10]),
        ("cifar100_il_baseline_10", 37.00, "softmax", [50] + 10 * [5]),
        ("cifar100_balanced_5", 62.22, "balanced", [50] + 5 * [10]),
        ("cifar100_balanced_10", 58.32, "balanced", [50] + 10 * [5]),
    ],
)
def test_the_cifar_recipes_carry_table_1_and_the_settings_of_the_paper(name, published, loss, steps):
    loaded = load(name)
    assert (loaded.published, loaded.loss.loss) == (published, loss)
    assert f"{published:.2f}" in text_of(name)
    assert [len(step) for step in build_protocol(loaded.protocol, 100).steps] == steps
    # Section 4.1.3: 250 epochs, divided by 10 after 100, 150 and 200, batches of 128, weight decay 0.0002, T = 2,
    # alpha = 1, 20 exemplars per class.
    train = loaded.train
    assert (train.epochs, train.batch_size, train.weight_decay) == (250, 128, 2e-4)
    drops = {epoch: train.learning_rate(epoch, 250) for epoch in (0, 99, 100, 149, 150, 199, 200, 249)}
    expected = {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 1e-3, 199: 1e-3, 200: 1e-4, 249: 1e-4}
    assert drops == pytest.approx(expected)
    assert (loaded.method.temperature, loaded.loss.alpha, loaded.memory.exemplars_per_class) == (2.0, 1.0, 20)
    assert (loaded.model.model, loaded.data.flip, loaded.data.pad) == ("resnet32", True, 4)


def test_only_the_recipes_of_the_paper_carry_a_published_number():
    assert {name for name in SHIPPED if load(name).published is not None} == {
        f"{dataset}_{method}_{steps}"
        for dataset in ("cifar100", "subimagenet", "imagenet")
        for method in (
            "il_baseline", "balanced", "meta", "icarl", "bic", "lucir", "lucir_balanced", "mnemonics", "podnet",
            "podnet_balanced", "tpcil",
        )
        for steps in (5, 10)
    }  # fmt: skip


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("lr=1e-3", 0.001),  # YAML 1.1 reads a string here
        ("lr=2", 2.0),
        ("weight_decay=5e-04", 0.0005),
        ("epochs=7", 7),
        ("base_epochs=null", None),
        ("milestones=[0.5, 0.75]", [0.5, 0.75]),
        ("mean=[0, 5e-1, 1]", [0.0, 0.5, 1.0]),
        ("flip=false", False),
        ("last_relu=false", False),
        ("compile=true", True),
        ("compile=false", False),
        ("compile=auto", "auto"),
        ("order=icarl", "icarl"),
        ("order=[2, 0, 1]", [2, 0, 1]),
        ("order=[dog, cat]", ["dog", "cat"]),
        ("order=['2', 0]", ["2", 0]),
        ("increment=[3, 3, 1]", [3, 3, 1]),
        ("data='2024'", "2024"),
        ("data=/a/path=with signs", "/a/path=with signs"),
        ("device=cuda:1", "cuda:1"),
        ("loss=softmax", "softmax"),
    ],
)
def test_an_override_gets_the_type_of_its_key(override, value):
    key = override.partition("=")[0]
    found = load("cifar100_balanced_5", [override]).keys()[key]
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, list):
        assert [type(part) for part in found] == [type(part) for part in value]


def test_only_the_key_of_an_override_changes_and_the_last_one_wins():
    before, after = load("digits").keys(), load("digits", ["epochs=3", "lr=0.5", "epochs=4"]).keys()
    assert after == before | {"epochs": 4, "lr": 0.5}


def test_paths_are_taken_as_they_are_written():
    loaded = load("folder", ["data=elsewhere"], data="2024", val="null")
    assert (loaded.data.data, loaded.data.val) == ("2024", "null")
    assert load("folder", ["data=elsewhere"], data=None, val=None).data.data == "elsewhere"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("exemplars", "exemplars_per_class"),
        ("exemplar_per_class", "exemplars_per_class"),
        ("budget", "memory_budget"),
        ("epoch", "epochs"),
        ("batchsize", "batch_size"),
        ("weight-decay", "weight_decay"),
        ("batch-size", "batch_size"),
        ("mode", "model"),
        ("los", "loss"),
        ("alfa", "alpha"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(key, nearest):
    with pytest.raises(UserError) as error:
        load("digits", [f"{key}=5"])
    assert re.search(rf"unknown key {key}: did you mean .*\b{nearest}\b", str(error.value))


def test_a_key_that_is_near_to_none_names_the_command_that_prints_them_all():
    with pytest.raises(UserError, match="unknown key zzzzzz: `fastil recipes RECIPE` prints every key"):
        load("digits", ["zzzzzz=5"])


@pytest.mark.parametrize("key", ["description", "published", "fidelity", "base", "recipe", "name", "0"])
def test_what_belongs_to_a_recipe_file_is_no_key_to_override(key):
    with pytest.raises(UserError, match=f"unknown key {key}"):
        load("digits", [f"{key}=5"])


@pytest.mark.parametrize("override", ["lr", "epochs: 3", "--seed", ""])
def test_an_override_without_a_sign_says_how_they_are_written(override):
    with pytest.raises(UserError, match="KEY=VALUE"):
        load("digits", [override])


def test_an_override_without_a_key_is_told_so_in_few_words():
    with pytest.raises(UserError) as error:
        load("digits", ["=3"])
    assert "KEY=VALUE" in str(error.value)


@pytest.mark.parametrize("override", ["order=[1, 2", "data={", "device='cpu", "data=@home"])
def test_a_value_that_is_no_yaml_is_quoted_back(override):
    with pytest.raises(UserError, match="not valid YAML") as error:
        load("digits", [override])
    assert str(error.value).startswith(override)


WRONG = [
    "dataset=cifar", "dataset=5", "size=7", "size=big", "pad=-1", "pad=40", "on_corrupt=ignore", "verify=perhaps",
    "flip=2", "flip=no", "flip=yes", "flip=1", "compile=1", "seed=1_000", "seed=0o7", "seed=007", "lr=12:30:45",
    "lr=1_0", "lr=2020-13-45", "lr=1e39", "lr=1e-46", "lucir_lambda=1e39", "lucir_rivals=1e30", "lucir_rivals=101",
    "proxies=1001", "epochs=1000000000000000000", "lr=!!float 3", "epochs=3 # three", "epochs= 3", "data=", "data=''",
    "val=a #b", 'data="a\\0b"', "increment=[]0", "increment=[2, 0]", "increment=[a]", "meta_bounds=[0.1]",
    "meta_bounds=[2, 3]", "temperature=1e30", "alpha=1e-50",
    "mean=[1, 2]", "mean=0.5", "mean=[a, b, c]", "std=[1, 1, 0]", "std=[1, 1, -1]", "data=5", "data=[a]",
    "order=5", "order=[true]", "order=[[1]]", "order={a: 1}", "base_classes=half", "increment=2.5",
    "exemplars_per_class=-1", "exemplars_per_class=many", "exemplar_selection=best", "memory_budget=-5",
    "model=resnet50", "last_relu=3", "method=lucir2", "loss=balansed", "loss=[softmax,\n balanced]",
    "alpha=0", "alpha=-1", "alpha=big", "temperature=0", "epochs=0", "epochs=-1", "epochs=2.5", "epochs=1e1",
    "epochs=[3]", "epochs=", "base_epochs=0", "batch_size=1", "batch_size=0", "lr=0", "lr=-0.1", "lr=fast", "lr=",
    "schedule=linear", "milestones=0.5", "milestones=[0.8, 0.4]", "milestones=[0, 0.5]", "milestones=[0.5, 1]",
    "milestones=[a]", "momentum=1", "momentum=-0.1", "momentum=.nan", "weight_decay=-1", "seed=-1", "seed=x",
    "device=0", "precision=fp16", "compile=maybe", "compile=2", "checkpoint_every=0",
    "checkpoint_minutes=0", "checkpoint_minutes=-1", "checkpoint_minutes=.inf", "checkpoint_minutes=",
]  # fmt: skip


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_one_line_that_names_its_key(override):
    others = ["exemplars_per_class=null"] if override.startswith("memory_budget") else []
    with pytest.raises(UserError) as error:
        load("digits", [*others, override])
    assert re.search(rf"\b{override.partition('=')[0]}\b", str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", ".inf"])
@pytest.mark.parametrize("key", ["lr", "weight_decay", "alpha", "temperature"])
def test_a_number_that_is_not_finite_is_refused(key, value):
    with pytest.raises(UserError, match=key):
        load("digits", [f"{key}={value}"])


@pytest.mark.parametrize("override", ["mean=[.nan, 0, 0]", "mean=[.inf, 0, 0]", "std=[.nan, 1, 1]", "std=[1, 1, .inf]"])
def test_a_mean_or_deviation_that_is_not_finite_is_refused(override):
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load("digits", [override])


@pytest.mark.parametrize("key", ["epochs", "lr", "seed", "batch_size", "size", "base_classes", "exemplars_per_class"])
def test_yes_and_no_are_not_numbers(key):
    with pytest.raises(UserError, match=key):
        load("digits", [f"{key}=true"])


def test_a_seed_that_the_generators_cannot_take_is_refused():
    assert load("digits", [f"seed={2**32 - 1}"]).train.seed == 2**32 - 1
    with pytest.raises(UserError, match="seed"):
        load("digits", [f"seed={2**64}"])


def test_the_choices_of_a_key_are_named():
    with pytest.raises(UserError, match=r"loss=balansed: .*'softmax', 'balanced', .* or 'nca'"):
        load("digits", ["loss=balansed"])


@pytest.mark.parametrize("overrides", [["memory_budget=100"], ["exemplars_per_class=null"]])
def test_exactly_one_size_of_the_memory_is_given(overrides):
    with pytest.raises(UserError, match="exemplars_per_class and memory_budget"):
        load("digits", overrides)


def test_a_fixed_memory_takes_the_place_of_the_growing_one():
    memory = load("digits", ["memory_budget=100", "exemplars_per_class=null"]).memory
    assert (memory.memory_budget, memory.exemplars_per_class) == (100, None)


# Names and files


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("digit", "digits"), ("fashion", "fashion-mnist"), ("cifar100_balanced5", "cifar100_balanced_5")],
)
def test_an_unknown_recipe_suggests_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"unknown recipe {name}: did you mean {nearest}"):
        load(name)


@pytest.mark.parametrize("name", ["medical", "", "/"])
def test_a_recipe_that_is_near_to_none_names_the_command_that_lists_them(name):
    with pytest.raises(UserError, match="fastil recipes lists them"):
        load(name)


def test_a_chain_of_parents_is_read_from_the_root_down(tmp_path):
    parent = write(tmp_path, "parent.yaml", "base: digits\nlr: 0.5\nepochs: 7\nfidelity: from the parent\n")
    child = write(tmp_path, "child.yml", f"base: {parent}\nepochs: 9\ndescription: the child\n")
    loaded = load(child, ["seed=3"])
    assert loaded.keys() == load("digits").keys() | {"lr": 0.5, "epochs": 9, "seed": 3}
    assert (loaded.name, loaded.description, loaded.fidelity) == ("child", "the child", "from the parent")


def test_a_parent_is_found_beside_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "recipes", "parent.yaml", "base: digits\nepochs: 7\n")
    child = write(tmp_path / "recipes", "child.yaml", "base: parent.yaml\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(child).train.epochs == 7


def test_published_belongs_to_the_recipe_that_says_so_alone(tmp_path):
    derived = write(tmp_path, "mine.yaml", "base: cifar100_balanced_5\n")
    further = write(tmp_path, "further.yaml", f"base: {derived}\n")
    own = write(tmp_path, "own.yaml", "base: cifar100_balanced_5\npublished: 12.5\n")
    assert [load(name).published for name in (derived, further, own)] == [None, None, 12.5]


@pytest.mark.parametrize("text", ["base: {0}\n", "base: {0}\nepochs: 3\n"])
def test_a_recipe_that_is_its_own_parent_is_refused(tmp_path, text):
    path = tmp_path / "loop.yaml"
    with pytest.raises(UserError, match=re.escape(str(path))):
        load(write(tmp_path, "loop.yaml", text.format(path)))


def test_recipes_that_are_parents_of_each_other_are_refused(tmp_path):
    write(tmp_path, "a.yaml", f"base: {tmp_path}/b.yaml\n")
    write(tmp_path, "b.yaml", f"base: {tmp_path}/a.yaml\n")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "mapping"),
        ("- lr\n- epochs\n", "mapping"),
        ("just words", "mapping"),
        ("lr: [1, 2", "not valid YAML"),
        ("a:\tb\n\t- c", "not valid YAML"),
        ("base: digits\nexemplars: 5\n", "unknown key exemplars: did you mean exemplars_per_class"),
        ("base: digits\n5: 5\n", "unknown key 5"),
        ("base: digitss\n", "unknown recipe digitss: did you mean digits"),
        ("base: [digits]\n", "unknown recipe"),
        ("base: nowhere.yaml\n", "nowhere.yaml"),
        ("base: digits\nepochs: many\n", "epochs=many"),
        ("base: digits\npublished: about sixty\n", "published"),
    ],
)
def test_a_recipe_file_with_a_mistake_says_which(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        load(write(tmp_path, "mine.yaml", text))
    assert "\n" not in str(error.value)


def test_a_recipe_file_that_is_missing_a_folder_or_no_text_is_named(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\x93NUMPY\xff\xfe")
    for name in ("missing.yaml", "folder.yaml", "bytes.yaml"):
        path = str(tmp_path / name)
        with pytest.raises(UserError, match=re.escape(path)):
            load(path)


# To a run directory and back


OVERRIDES = [
    ["lr=1e-5", "weight_decay=0", "seed=4294967295", "compile=true", "device=cuda:0"],
    [
        "order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]",
        "schedule=multistep",
        "milestones=[]",
        "mean=[0.1, 0.30000000000000004, 1e-9]",
    ],
    ["exemplars_per_class=null", "memory_budget=50", "base_epochs=null", "data='no'", "compile=false"],
]


DIFFERENT = ("digits", "cifar100_balanced_5", "imagenet_podnet_5")  # in data, method and schedule


@pytest.mark.parametrize(
    ("name", "overrides"),
    [(name, []) for name in SHIPPED] + [(name, o) for name in (SHIPPED if SOAK else DIFFERENT) for o in OVERRIDES],
)
def test_an_effective_recipe_is_read_back_as_it_was_written(tmp_path, name, overrides):
    loaded = load(name, overrides, val="a folder: with # signs").in_precision("bf16")
    path = tmp_path / "recipe.yaml"
    path.write_text(loaded.dump())
    back = read_effective(path)
    assert back == loaded
    assert [type(value) for value in back.keys().values()] == [type(value) for value in loaded.keys().values()]
    assert differences(back) == differences(loaded)


def test_a_dump_holds_every_key_so_that_later_defaults_cannot_change_it():
    values = yaml.safe_load(load("digits").dump())
    assert set(values) == {"recipe", "description", "published", "fidelity", *load("digits").keys()}


def test_an_effective_recipe_from_before_checkpoints_by_time_is_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    loaded = load("digits").in_precision("fp32")
    path.write_text(re.sub(r"^checkpoint_minutes: .*\n", "", loaded.dump(), flags=re.MULTILINE))
    assert "checkpoint_minutes" not in path.read_text()
    assert read_effective(path) == loaded


@pytest.mark.parametrize("name", ["mine.yaml", "1e3.yaml", "no.yaml", "ä ö.yaml"])
def test_a_recipe_of_the_users_own_keeps_its_name(tmp_path, name):
    loaded = load(write(tmp_path, name, "base: digits\ndescription: 'yes: # no'\n")).in_precision("fp32")
    path = tmp_path / "effective"
    path.write_text(loaded.dump())
    assert read_effective(path) == loaded
    assert loaded.name == name.removesuffix(".yaml")


@pytest.mark.parametrize(
    "raw",
    [None, b"", b"words", b"- a\n- b\n", b"lr: 0.1\n", b"recipe: [", b"recipe: digits\nlr: \xff\n", b"\x93NUMPY"],
    ids=["missing", "empty", "words", "a list", "no name", "no YAML", "no UTF-8", "binary"],
)
def test_a_damaged_effective_recipe_is_named(tmp_path, raw):
    path = tmp_path / "recipe.yaml"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_effective(path)


def test_a_wrong_value_in_an_effective_recipe_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(re.sub(r"^epochs: .*", "epochs: forty", load("digits").dump(), flags=re.MULTILINE))
    with pytest.raises(UserError, match="epochs=forty"):
        read_effective(path)


# Whether the published number may stand next to a result


@pytest.mark.parametrize(
    "overrides",
    [["seed=5"], ["device=cpu"], ["data=/somewhere"], ["val=/else"], ["compile=false"], ["checkpoint_every=1"],
     ["checkpoint_minutes=0.5"], ["verify=false"], ["precision=bf16"], ["loader=resident"], ["on_corrupt=skip"],
     ["seed=1", "device=cuda", "data=x"],
     ["epochs=250", "lr=1e-1", "loss=balanced"]],
)  # fmt: skip
def test_where_and_how_fast_it_runs_leave_a_recipe_as_shipped(overrides):
    assert differences(load("cifar100_balanced_5", overrides)) == {}


@pytest.mark.parametrize(
    "override",
    ["loss=softmax", "alpha=0.5", "temperature=1", "epochs=249", "base_epochs=10", "batch_size=64", "lr=0.2",
     "schedule=cosine", "milestones=[0.5]", "momentum=0", "weight_decay=0", "order=icarl",
     "base_classes=60", "increment=5", "exemplars_per_class=10", "exemplar_selection=random", "model=resnet20",
     "last_relu=false", "dataset=cifar10", "pad=0", "flip=false", "mean=[0, 0, 0]", "std=[1, 1, 1]"],
)  # fmt: skip
def test_what_changes_the_training_makes_it_another_experiment(override):
    assert differences(load("cifar100_balanced_5", [override])) != {}


def test_a_recipe_of_the_users_own_is_not_as_shipped(tmp_path):
    assert differences(load(write(tmp_path, "mine.yaml", "base: digits\n"))) != {}
    assert differences(load(write(tmp_path, "digits.yaml", "base: digits\nepochs: 2\n"))) != {}


def test_identity_with_the_seed_tells_two_seeds_apart():
    one, other = load("digits", ["seed=1"]), load("digits", ["seed=2", "device=cpu"])
    assert one.identity() != other.identity()
    assert one.identity(seed=False) == other.identity(seed=False)
    assert one.identity() == load("digits", ["seed=1", "device=cpu", "compile=false"]).identity()


@pytest.mark.parametrize("quota", [2, 3, 10, 20])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_never_all_exemplars_of_a_class_are_held_out(quota, share):
    held = load("digits", ["loss=meta_balanced", f"meta_share={share}"]).held_out(quota)
    assert 1 <= held < quota
    assert load("digits", ["method=bic", "loss=softmax", f"bic_share={share}"]).held_out(quota) == held


def test_what_nothing_reads_makes_no_other_experiment(tmp_path):
    plain = load("digits", ["loss=balanced"])
    unread = {"meta_lr": 3, "finetune_lr": 0.5, "lucir_lambda": 7, "proxies": 3, "pod_flat": 2, "bic_epochs": 5}
    name = write(tmp_path, "mine.yaml", yaml.safe_dump({"base": "digits", "loss": "balanced"} | unread))
    assert load(name).identity() == plain.identity()
    for read, key in (
        ("loss=meta_balanced", "meta_lr"),
        ("correction=balanced_finetuning", "finetune_lr"),
        ("method=bic", "bic_epochs"),
    ):
        assert load(name, [read]).identity() != load("digits", [read]).identity()
        assert load("digits", [read, f"{key}={unread[key]}"]).keys()[key] == unread[key]
        with pytest.raises(UserError, match=f"{key}={unread[key]}: nothing reads it here; set {read} as well"):
            load("digits", [f"{key}={unread[key]}"])


COSINE = ["head=cosine", "last_relu=false"]
LUCIR, TPCIL = (["loss=softmax", f"method={m}", *COSINE] for m in ("lucir", "tpcil"))
RELEASED, BILEVEL = (["loss=softmax", "method=mnemonics", f"mnemonics={m}", *COSINE] for m in ("released", "bilevel"))
NCA = ["loss=nca", "head=proxies"]
UNREAD, READ_FROM_FILES = [["dataset=digits"], ["dataset=imagenet"]], [["dataset=folder"], ["dataset=cifar100"]]
# For each key: settings with which nothing reads it, and with which something does.
READ = {
    "last_relu=false": ([[f"model={ROOT}/examples/your_own_network.py:backbone"]], [["model=resnet8"]]),
    "size=24": ([["dataset=cifar100"], ["dataset=idx"]], [["dataset=folder"], ["dataset=imagenet"]]),
    "exif=ignore": (UNREAD, READ_FROM_FILES),
    "max_pixels=9": (UNREAD, READ_FROM_FILES),
    "image_column=x": (UNREAD, READ_FROM_FILES),
    "label_column=x": (UNREAD, READ_FROM_FILES),
    "nca_margin=0.5": ([["loss=softmax"], NCA], [[*NCA, "nca_variant=paper"]]),
    "nca_variant=released": ([["loss=balanced"]], [NCA]),
    "meta_lr=0.5": ([["loss=balanced"]], [["loss=meta_balanced"]]),
    "finetune_epochs=3": ([["correction=none"]], [["correction=balanced_finetuning"]]),
    "exemplar_selection=random": (
        [["loss=softmax", "exemplars_per_class=0"]],
        [["exemplars_per_class=1"], ["exemplars_per_class=null", "memory_budget=10"]],
    ),
    "nme_mirrored=false": ([["predictor=cnn"]], [["predictor=nme"]]),
    "proxies=3": ([["head=linear"], COSINE], [["head=proxies"]]),
    "milestones=[0.5]": ([["schedule=cosine"]], [["schedule=multistep"]]),
    "lr_drop=0.2": ([["schedule=cosine"]], [["schedule=multistep"]]),
    "temperature=3": (
        [LUCIR, TPCIL, BILEVEL, ["method=podnet", *NCA], ["loss=softmax", "method=icarl_bce"]],
        [["method=il_baseline"], ["method=icarl"], ["method=bic"], RELEASED],
    ),
    "icarl_beta=1": ([BILEVEL, LUCIR, ["loss=softmax", "method=icarl_bce"]], [["method=icarl"], RELEASED]),
    "bic_lr=1": ([["method=icarl"]], [["method=bic"]]),
    "lucir_lambda=3": ([TPCIL, RELEASED, ["method=icarl"]], [LUCIR, BILEVEL]),
    "lucir_margin=0.3": ([RELEASED, ["method=podnet", *NCA]], [LUCIR, BILEVEL, TPCIL]),
    "mnemonics_inner_lr=0.2": ([RELEASED, LUCIR], [BILEVEL]),
    "mnemonics_lr=0.2": ([LUCIR], [BILEVEL, RELEASED]),
    "pod_flat=2": ([LUCIR], [["method=podnet", *NCA]]),
    "tpcil_age=9": ([LUCIR], [TPCIL]),
}


def test_every_condition_is_tried_here():
    found = {next((p for p in recipe.READERS if key.startswith(p)), key.partition("_")[0]) for key in READ}
    methods = {field.name.partition("_")[0] for config in configs_of("icarl").values() for field in fields(config)}
    assert found == {*recipe.READERS, *methods, "temperature=3"}
    assert {"lucir_lambda=3", "mnemonics_inner_lr=0.2"} <= set(READ)  # read with other keys than the others of theirs


@pytest.mark.parametrize(("key", "settings"), [(key, s) for key, (refused, _) in READ.items() for s in refused])
def test_a_key_that_nothing_reads_is_refused_and_left_out_of_the_identity(key, settings):
    name = key.partition("=")[0]
    with pytest.raises(UserError, match=f"^{re.escape(key)}: nothing reads it here; set .* as well, or leave it out$"):
        load("digits", [*settings, key])
    plain = load("digits", settings)
    assert plain.identity().get(name) is None
    assert {setting.partition("=")[0] for setting in plain.reader(name).split()} <= set(plain.keys())


@pytest.mark.parametrize(("key", "settings"), [(key, s) for key, (_, read) in READ.items() for s in read])
def test_a_key_that_something_reads_is_taken_in_any_order(key, settings):
    name, _, text = key.partition("=")
    for overrides in ([*settings, key], [key, *settings]):
        loaded = load("digits", overrides)
        assert loaded.keys()[name] == yaml.safe_load(text)
        assert name in recipe.RUNTIME_KEYS or loaded.identity()[name] == yaml.safe_load(text)
        assert loaded.reader(name) is None


@pytest.mark.parametrize("model", ["resnet8", "resnet32", "resnet32_rebuffi"])
def test_a_stem_that_a_model_does_not_have_is_refused(model):
    for stem in ("3x3", "7x7"):
        with pytest.raises(UserError, match=f"stem={stem}: model={model} has another"):
            load("digits", [f"model={model}", f"stem={stem}"])
        assert load("digits", ["model=resnet18", f"stem={stem}"]).model.stem == stem
    assert load("digits", [f"model={model}", "stem=own"]).model.stem == "own"


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("resume=True", "--resume"),
        ("use_wandb=1", "track="),
        ("n_tasks=5", "increment=N"),
        ("label_smoothing=0.1", "docs/extending.md"),
        ("seeds=3", "--seeds"),
        ("MEMORY_SIZE=200", "memory_budget=N exemplars_per_class=null"),
        ("method=coil", "not in fastil; .*docs/extending.md"),
        ("method=er_ace", "not in fastil"),
        ("method=er", "method=finetune .*exemplars"),
        ("method=sgd", "method=finetune exemplars_per_class=0 loss=softmax"),
        ("method=DER", "docs/extending.md"),
        ("method=lucir,podnet", "fastil sweep RECIPE method=lucir,podnet"),
        ("loss=softmax,balanced", "fastil sweep RECIPE loss=softmax,balanced"),
        ("lr=0.1,0.01", "must be a number above 0; .*fastil sweep RECIPE lr=0.1,0.01"),
        ("lr=[0.1, 0.01]", "fastil sweep RECIPE lr=0.1,0.01"),
        ("seed=0,1", "--seeds 0,1"),
        ("milestones=[10, 20]", "part of training above 0 and below 1"),
    ],
)
def test_what_users_of_other_toolboxes_write_is_answered_with_what_does_it_here(setting, advice):
    with pytest.raises(UserError, match=advice):
        load("digits", [setting])


@pytest.mark.parametrize("setting", ["lr=0.1,x", "lr=0", "lr=0.1,-1", "seed=[]", "seed=[1]", "lr=','", "epochs=1,2.5"])
def test_what_is_no_list_of_good_values_is_no_sweep(setting):
    with pytest.raises(UserError) as error:
        load("digits", [setting])
    assert "sweep" not in str(error.value)
    assert "--seeds" not in str(error.value)


def test_unknown_recipes_lead_to_those_of_their_data():
    for name in ("seq-cifar100", "cifar100", "split-cifar100"):
        with pytest.raises(UserError, match="such as cifar100_balanced_5"):
            load(name)
    for name, said in (
        ("er", "it is a method, not a recipe; plain rehearsal is"),
        ("derpp", "it is a method, not a recipe; not in fastil"),
        ("icarl", "such as cifar100_icarl_5"),
        ("seq-cifar10", "folder"),
    ):
        with pytest.raises(UserError, match=said):
            load(name)
    with pytest.raises(UserError, match="folder"):
        load("my-cats")
    with pytest.raises(UserError, match=r"of this data set, such as imagenet_|did you mean imagenet_"):
        load("imagenet_bic_b0_10")
    with pytest.raises(UserError, match=r"did you mean cifar100_podnet_10\?"):
        load("cifar100-podnet-10")


def test_keys_of_other_toolboxes_are_told_what_they_are_here():
    parts = recipe.PARTS | configs_of("il_baseline")
    known = {field.name for part in parts.values() for field in fields(part)}
    assert set(advice.KEYS.values()) <= known
    assert not (set(advice.KEYS) | set(advice.ADVICE)) & known
    for theirs, ours in advice.KEYS.items():
        with pytest.raises(UserError, match=f"unknown key {theirs}: did you mean {ours}\\?"):
            load("digits", [f"{theirs}=3"])
    with pytest.raises(UserError, match=r"did you mean lr\?"):
        load("digits", ["lr_bas=0.1"])
    with pytest.raises(UserError, match="no run directory"):
        load("runs/nope")
