"""`fastil export-model`: the network of a step in a file that other programs load without fastil."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastil import files, outside
from fastil.errors import UserError
from fastil.reporting.classifier import Classifier
from fastil.reporting.model_card import as_json, card, config_of
from fastil.reporting.runs import Run

AGAIN = "repeat the command"  # once a file can be written
CONFIG, CARD = "config.json", "README.md"
ELSEWHERE = "give a file in a folder of its own, such as exported/model.onnx"


def export_model(run: Run, file: Path, step: int = -1) -> None:
    """Write the network of a step to a file, by its ending, and config.json and README.md next to it. A folder holds
    one network, in several formats perhaps; what is there already of anything else is an error."""
    if file.suffix not in FORMATS:
        raise UserError(f"{file}: give a file that ends in {', '.join(FORMATS)}")
    packages, write = FORMATS[file.suffix]
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"{file}: needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    if file.is_dir():
        raise UserError(f"{file}: is a folder; {ELSEWHERE}")
    network = run.network(step).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    config = config_of(run, step, network)
    others = _others(file, config)
    content = outside.imported(f"{file}: this network cannot be written so", partial(write, network, as_json(config)))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file}: its folder cannot be made ({error.strerror}); give another file") from None
    if not others:
        text = card(run, config, file.stem, torch.__version__.partition("+")[0])
        _write(file.with_name(CONFIG), as_json(config).encode())
        _write(file.with_name(CARD), text.encode())
    _write(file, content)


def _write(path: Path, content: bytes) -> None:
    files.write_atomically(path, lambda opened: opened.write(content), AGAIN)


def _others(file: Path, config: dict[str, Any]) -> bool:
    """Whether the folder of a file holds this network already, in some format; its card, which may have been edited
    since, stays. UserError where it holds something else, which would be overwritten."""
    path = file.with_name(CONFIG)
    if not path.exists():
        found = next((one for one in (file, file.with_name(CARD)) if one.exists()), None)
        if found is not None:
            raise UserError(f"{found}: is there already; {ELSEWHERE}, or remove it")
        return False
    with contextlib.suppress(ValueError, RecursionError):
        there = json.loads(files.read(path, ELSEWHERE))
        if isinstance(there, dict) and there.get("run") == config["run"]:
            return file.with_name(CARD).exists()
    raise UserError(f"{path}: describes something else than this network; {ELSEWHERE}, or remove it")


def _exported(network: Classifier, path_of: Callable[..., Any]) -> Any:
    """What torch makes of a classifier that takes any number of float32 images. path_of(network, images, shapes)."""
    transform = network.transform
    images = torch.zeros(2, 3, transform.height, transform.width)
    shapes = ({0: torch.export.Dim("images")},)
    # By formulas: an exported program cannot call fastil's kernels.
    with torch.no_grad(), network.network.as_formula(), _quiet():
        return path_of(network, (images,), dynamic_shapes=shapes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on its own deprecated parts, and on torchvision, which is not needed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(before)


def _pt2(network: Classifier, config: str) -> bytes:
    program = _exported(network, torch.export.export)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={CONFIG: config})
    return file.getvalue()


def _onnx(network: Classifier, config: str) -> bytes:
    export = partial(
        torch.onnx.export, dynamo=True, verbose=False, input_names=["images"], output_names=["probabilities"]
    )
    program = _exported(network, export)
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of this machine
    program.model.metadata_props[CONFIG] = config
    content: bytes = program.model_proto.SerializeToString()
    return content


def _safetensors(network: Classifier, config: str) -> bytes:
    from safetensors.torch import save

    predictor: dict[str, Any] = {} if network.method is None else network.method.state_dict()
    if network.means is not None:
        predictor = {"means": network.means}
    odd = [key for key, value in predictor.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"{odd[0]} of the method is no tensor, and .safetensors holds nothing else; use .pt2")
    tensors = network.network.state_dict() | {f"predictor.{key}": value for key, value in predictor.items()}
    content: bytes = save({key: value.contiguous() for key, value in tensors.items()}, {CONFIG: config})
    return content


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Classifier, str], bytes]]] = {
    ".pt2": ((), _pt2),
    ".onnx": (("onnx", "onnxscript"), _onnx),
    ".safetensors": (("safetensors",), _safetensors),
}
