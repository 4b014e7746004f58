"""What lies next to an exported network, in the layout of the Hugging Face hub: config.json and README.md, its card."""

import dataclasses
import hashlib
import json
from typing import Any

import yaml

from fastil.files import read
from fastil.reporting.classifier import Classifier
from fastil.reporting.fidelity import remark_of
from fastil.reporting.run_files import AGAIN
from fastil.reporting.runs import Run
from fastil.text import format_table, one_line, plain
from fastil.version import __version__

BY_HEAD, BY_MEANS = "head", "nearest class mean"
ENDS = {  # of the code for weights alone
    BY_HEAD: 'probabilities = out.scaled_logits[:, : config["num_labels"]].softmax(1)',
    BY_MEANS: 'probabilities = (out.features @ weights["predictor.means"].T).softmax(1)',
}
CORRECTED = "logits = out.scaled_logits  # not corrected yet: the method's `predict` does it, by predictor.* in weights"
USE = {
    ".pt2": (
        "torch.export; needs torch {torch} or later, and nothing else",
        """import torch

network = torch.export.load("{stem}.pt2").module()
probabilities = network(images)  # tensors""",
    ),
    ".onnx": (
        "ONNX; needs onnxruntime",
        """import onnxruntime

network = onnxruntime.InferenceSession("{stem}.onnx")
(probabilities,) = network.run(None, {{"images": images}})  # a NumPy array""",
    ),
    ".safetensors": (
        "weights alone, under the names of fastil's networks; needs fastil and safetensors",
        """import json

import torch
from safetensors.torch import load_file

from fastil.models import ModelConfig, build_network

config = json.load(open("config.json"))
network = build_network(ModelConfig(**config["model"]), config["num_classes"], seed=0).eval()
weights = load_file("{stem}.safetensors")
network.load_state_dict({{k: v for k, v in weights.items() if not k.startswith("predictor.")}})
mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
out = network((images - mean) / std)
{end}""",
    ),
}


def config_of(run: Run, step: int, network: Classifier) -> dict[str, Any]:
    """The content of config.json. run, step: which network it is; two files that agree in it hold the same one."""
    names, transform, result = network.class_names, network.transform, run.results.steps[step]
    predictor = BY_HEAD if network.method is None else f"head, corrected by method={run.results.method}"
    weights = read(run.path / f"checkpoints/step_{result.step}.pt", AGAIN)
    return {
        "library_name": "fastil",
        "library_version": __version__,
        "model": dataclasses.asdict(run.recipe.model),
        "num_classes": len(run.protocol.class_order),
        "predictor": predictor if network.means is None else BY_MEANS,
        "num_labels": len(names),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "image_size": [transform.height, transform.width],
        "resize_short_side": transform.resize or (transform.height if transform.height == transform.width else None),
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "run": {
            "recipe": run.results.recipe, "method": run.results.method, "loss": run.results.loss,
            "seed": run.results.seed, "step": result.step, "steps": run.total_steps, "top1": result.top1,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        },
    }  # fmt: skip


def card(run: Run, config: dict[str, Any], stem: str, torch_version: str) -> str:
    """The text of README.md. stem: of the files of the network."""
    which, results = config["run"], run.results.steps[: config["run"]["step"] + 1]
    name = one_line(f"{which['recipe']}-{which['method']}-{which['loss']}-s{which['seed']}-step{which['step']}")
    metric = {
        "type": "accuracy",
        "name": f"top-1 over the {config['num_labels']} classes seen after step {which['step']}",
        "value": round(which["top1"], 2),
    }
    dataset = {"type": run.dataset_name, "name": run.dataset_name}
    result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": [metric]}
    head = {
        "library_name": "fastil",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "class-incremental-learning", which["method"]],
        "model-index": [{"name": name, "results": [result]}],
    }
    height, width = config["image_size"]
    short = config["resize_short_side"]
    shaped = f"its short side to {short} pixels (bilinear, antialiased), then the central" if short else "resized to"
    remark = remark_of(run.recipe)
    ranks = " The softmax ranks classes as the distances to the means do, and is no measure of certainty."
    doubt = ranks if config["predictor"] == BY_MEANS else ""
    rows = []
    for r in results:
        shown = ("" if percent is None else f"{percent:.2f}" for percent in (r.top1, r.top1_base, r.top1_old))
        rows.append((str(r.step), str(r.classes_seen), *shown))
    end = ENDS.get(config["predictor"], CORRECTED)
    uses = [
        f"`{stem}{suffix}` ({what.format(torch=torch_version)}):\n\n```python\n{code.format(stem=stem, end=end)}\n```"
        for suffix, (what, code) in USE.items()
    ]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"An image classifier of {config['num_labels']} classes, trained with fastil on {run.dataset_name}, one group "
        f"of classes after the other (step {which['step']} of 0 to {which['steps'] - 1}): method {which['method']}, "
        f"loss {which['loss']}, network {config['model']['model']}, recipe {which['recipe']}, seed {which['seed']}."
        + (f" {remark}." if remark else ""),
        "## Use",
        f"Takes float32 [n, 3, {height}, {width}], RGB in 0 to 1, of any number of images, and normalises them itself. "
        "Returns float32 [n, classes], probabilities. The classes are `id2label` of `config.json`, which is in the "
        f"file, too. An image of another size: {shaped} {height} x {width}. Predicts by: {config['predictor']}.{doubt}",
        *uses,
        "## Accuracy",
        "Percent of the test images, over all classes seen; `old` of the classes of earlier steps.",
        format_table(("step", "classes", "top-1", "base", "old"), rows),
        "## Classes",
        "\n".join(f"    {i} {one_line(label)}" for i, label in enumerate(config["id2label"].values())),
    ]  # fmt: skip
    return plain("\n\n".join(parts)) + "\n"


def as_json(config: dict[str, Any]) -> str:
    """Return the text of config.json."""
    return json.dumps(config, indent=1) + "\n"
