"""`fastil export-model`: what is written gives the run's own probabilities, where fastil cannot be imported."""

import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, assert_user_error, environment
from making import PREDICTORS, THREE_STEPS

import fastil as package
from fastil.data import DataConfig, load_dataset
from fastil.errors import UserError
from fastil.reporting import export_model as exporting
from fastil.reporting.export_model import export_model

RUNS = {kind: settings for kind, settings in PREDICTORS.items() if kind != "icarl, cnn"}  # as il_baseline
STEP = {"bic": 1}  # a middle one; of the others the last
# What the card says, in a process that cannot import fastil: for each folder images.npy to probabilities.npy.
ALONE = """
import sys
sys.modules["fastil"] = None
import numpy as np, os, torch
for folder, code in zip(sys.argv[1::2], sys.argv[2::2]):
    os.chdir(folder)
    names = {"images": torch.from_numpy(np.load("images.npy"))}
    exec(code, names)
    parts = [names["network"](names["images"][i : i + 1]) for i in range(3)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts), names["probabilities"][:3])
    np.save("probabilities.npy", names["probabilities"].detach().numpy())
assert not any(name.startswith("fastil.") for name in sys.modules)
"""

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory, without_figures):
    """A run, and the step that is exported."""
    out = tmp_path_factory.mktemp("run") / "run"
    return package.run("digits", out=out, **THREE_STEPS | RUNS[request.param]), STEP.get(request.param, -1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, without_figures):
    return package.run("digits", out=tmp_path_factory.mktemp("plain") / "run", **THREE_STEPS | {"model": "resnet8"})


def images_of(run, step):
    """The test images of the classes seen, float32 [n, 3, 8, 8] in 0 to 1, and the run's predictions for them."""
    val = load_dataset(DataConfig()).val
    seen = [c for classes in run.protocol.steps[: step % run.total_steps + 1] for c in classes]
    images = torch.from_numpy(val.images[np.isin(val.labels, seen)]).permute(0, 3, 1, 2) / 255
    return images.contiguous(), run.predictions(step)[:, 1]


def use_of(folder, ending):
    """The code of the card for a file."""
    found = re.findall(r"`model(\.\w+)` \(.*?\):\n\n```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return dict(found)[ending]


def check(probabilities, run, step, predicted):
    with torch.no_grad():
        wanted = run.network(step)(images_of(run, step)[0]).numpy()
    np.testing.assert_allclose(probabilities, wanted, atol=1e-5)
    rows = np.arange(len(wanted))
    assert (probabilities.max(1) - probabilities[rows, predicted] < 2e-5).all()  # top-1 of the evaluation, or a tie
    assert (probabilities.argmax(1) == predicted).mean() >= 0.99


def test_torch_alone_gives_the_runs_probabilities(run, tmp_path):
    run, step = run
    export_model(run, tmp_path / "model.pt2", step)
    images, predicted = images_of(run, step)
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-c", ALONE, str(tmp_path), use_of(tmp_path, ".pt2")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(np.load(tmp_path / "probabilities.npy"), run, step, predicted)
    assert not (tmp_path / "model.pt2.partial").exists()


def test_onnxruntime_gives_the_runs_probabilities(run, tmp_path, monkeypatch):
    for package_name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package_name)
    run, step = run
    export_model(run, tmp_path / "model.onnx", step)
    images, predicted = images_of(run, step)
    monkeypatch.chdir(tmp_path)
    names = {"images": images.numpy()}
    exec(use_of(tmp_path, ".onnx"), names)
    check(names["probabilities"], run, step, predicted)
    (alone,) = names["network"].run(None, {"images": names["images"][:1]})
    np.testing.assert_allclose(alone, names["probabilities"][:1], atol=1e-5)


def test_safetensors_hold_the_weights_and_what_the_step_predicts_with(run, tmp_path, monkeypatch):
    load_file = pytest.importorskip("safetensors.torch").load_file
    run, step = run
    export_model(run, tmp_path / "model.safetensors", step)
    images, predicted = images_of(run, step)
    monkeypatch.chdir(tmp_path)
    names = {"images": images}
    with torch.no_grad():
        exec(use_of(tmp_path, ".safetensors"), names)
        tensors = load_file("model.safetensors")
        if "predictor.beta" in tensors:
            corrected = names["logits"] * tensors["predictor.beta"] + tensors["predictor.gamma"]
            names["probabilities"] = corrected[:, : names["config"]["num_labels"]].softmax(1)
    check(names["probabilities"].numpy(), run, step, predicted)
    means, corrected = run.recipe.evaluation.predictor == "nme", run.results.method == "bic"
    assert {key for key in tensors if key.startswith("predictor.")} == (
        {"predictor.means"} if means else {"predictor.beta", "predictor.gamma"} if corrected else set()
    )


def test_config_and_card_say_which_network_it_is(plain, tmp_path):
    export_model(plain, tmp_path / "deep/er/model.pt2", 1)
    folder = tmp_path / "deep/er"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.pt2"]
    config, text = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    names = [str(c) for classes in plain.protocol.steps[:2] for c in classes]
    assert config["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert config["label2id"] == {name: i for i, name in enumerate(names)}
    assert (config["num_labels"], config["image_size"], config["num_classes"]) == (4, [8, 8], 6)
    assert config["image_mean"] == list(plain.recipe.data.mean)
    assert config["image_std"] == list(plain.recipe.data.std)
    assert config["run"]["step"] == 1
    assert config["run"]["top1"] == plain.results.steps[1].top1
    opening, head, _ = text.split("---\n", 2)
    head = yaml.safe_load(head)
    assert opening == ""
    assert (head["library_name"], head["pipeline_tag"]) == ("fastil", "image-classification")
    ((result,),) = (entry["results"] for entry in head["model-index"])
    assert result["task"] == {"type": "image-classification"}
    assert result["metrics"][0]["value"] == round(plain.results.steps[1].top1, 2)
    for step in plain.results.steps[:2]:
        assert re.search(rf"\| {step.step} +\| {step.classes_seen} +\| {step.top1:.2f}", text)
    assert "modified: " in text
    inside = {"config.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=inside)
    assert json.loads(inside["config.json"]) == config


def test_every_file_has_the_config_in_it_and_no_path_of_this_machine(plain, tmp_path):
    onnx, safetensors = pytest.importorskip("onnx"), pytest.importorskip("safetensors")
    pytest.importorskip("onnxscript")
    for ending in exporting.FORMATS:
        export_model(plain, tmp_path / f"model{ending}")
    config = json.loads((tmp_path / "config.json").read_text())
    props = onnx.load(tmp_path / "model.onnx").metadata_props
    assert json.loads({prop.key: prop.value for prop in props}["config.json"]) == config
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["config.json"]) == config
    content = [path.read_bytes() for path in tmp_path.iterdir()]
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        content += [archive.read(name) for name in archive.namelist()]
    for place in (str(ROOT), str(plain.path), sys.prefix):
        assert not any(place.encode() in one for one in content)


def test_nothing_that_is_there_is_lost(plain, tmp_path):
    """A folder holds one network; its card is the user's once it is there."""
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README\.md: is there already; give a file in a folder of its own"):
        export_model(plain, tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.pt2").write_text("mine")
    with pytest.raises(UserError, match=r"model\.pt2: is there already"):
        export_model(plain, folder / "model.pt2")
    assert (folder / "model.pt2").read_text() == "mine"
    for content in ("[]", "{", '{"run": {}}', "[" * 100_000):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json: describes something else than this network"):
            export_model(plain, folder / "model.pt2")
    export_model(plain, tmp_path / "a/model.pt2")
    (tmp_path / "a/README.md").write_text("edited")
    export_model(plain, tmp_path / "a/again.pt2", 2)  # the same network
    assert (tmp_path / "a/README.md").read_text() == "edited"
    with pytest.raises(UserError, match=r"config\.json: describes something else than this network"):
        export_model(plain, tmp_path / "a/model.pt2", 1)
    (tmp_path / "a/README.md").unlink()
    export_model(plain, tmp_path / "a/model.pt2")
    assert (tmp_path / "a/README.md").read_text().startswith("---\n")


def test_names_of_classes_cannot_write_the_card(plain, tmp_path, monkeypatch):
    names = ["a\n# b", "\x1b[31m", "```", "---"]
    network = plain.network(1)
    network.class_names = names
    config = exporting.config_of(plain, 1, network)
    text = exporting.card(plain, config, "model", "2.13.0")
    assert "\x1b" not in text
    assert "\n# b" not in text
    assert text.splitlines()[-4:] == ["    0 a # b", "    1 \\u001b[31m", "    2 ```", "    3 ---"]


def test_mistakes_are_one_line(plain, tmp_path, monkeypatch, fastil):
    assert_user_error(fastil("export-model", plain.path, "model.bin"), "model.bin", ".pt2, .onnx, .safetensors")
    assert_user_error(fastil("export-model", plain.path, "out/m.pt2", "--step", 9), "step 9: has finished steps 0 to 2")
    (tmp_path / "file").touch()
    assert_user_error(fastil("export-model", plain.path, "file/m.pt2"), "file/m.pt2: its folder cannot be made")
    (tmp_path / "m.pt2").mkdir()
    assert_user_error(fastil("export-model", plain.path, "m.pt2"), "m.pt2: is a folder")
    process = fastil("export-model", plain.path, "out/m.pt2", "--step", 0)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "out/m.pt2, and next to it config.json and README.md\n"
    found = exporting.find_spec
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(UserError, match=r"m\.onnx: needs onnx and onnxscript; pip install onnx onnxscript$"):
        export_model(plain, tmp_path / "m.onnx")
