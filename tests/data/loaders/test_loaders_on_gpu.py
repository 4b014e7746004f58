"""Loaders that stream to a GPU, against the same on a CPU. Without a GPU these skip; FASTIL_DEVICE=cpu runs them."""

import numpy as np
import pytest
import torch
from conftest import encoded
from test_loaders import BACKENDS, BOUNDS, CENTRAL, PADDED, RESIZED, photo

from fastil.data import make_loader
from fastil.data.formats.beton import Beton
from fastil.plan import Key, sequential_plan, training_plan
from fastil.recipe_file import load
from fastil.tools.convert import convert, options_of
from fastil.tools.reporting import Reporter
from fastil.training.experiment import Experiment

COUNT, BATCH = 48, 8  # batches enough that each buffer is used again


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A .beton of photos of many sizes in six classes, larger than the crops of CENTRAL."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for split, each in (("train", COUNT // 6), ("val", 2)):
        for i in range(6 * each):
            path = folder / f"in/{split}/class{i % 6}/{i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(photo(*random.integers(42, 90, 2), i), quality=90))
    convert(folder / "in", folder / "x.beton", options_of(workers=1), Reporter())
    return folder / "x.beton"


@pytest.mark.parametrize("backend", [*BACKENDS[:2], BACKENDS[3]])
@pytest.mark.parametrize("transform", [RESIZED, CENTRAL, PADDED], ids=["resized", "central", "padded"])
def test_what_reaches_the_device_is_what_the_cpu_has(made, gpu, backend, transform):
    beton = Beton(made)
    if transform is CENTRAL:
        plan = sequential_plan(np.arange(COUNT), transform, BATCH, sizes=beton.sizes)
    else:
        plan = training_plan(np.arange(COUNT), Key(0, 1), transform, BATCH, beton.sizes)
    here = make_loader(beton, "reference", transform, "cpu")
    there = make_loader(beton, backend, transform, gpu)
    wanted = list(here.batches(plan))
    found = []
    for batch in there.batches(plan):
        torch.randn(512, 512, device=gpu).mm(torch.randn(512, 512, device=gpu))  # work at the same time as the copies
        found.append(batch._replace(images=batch.images.cpu()))
    scale = 255 * here.std.view(3, 1, 1)
    largest, mean = BOUNDS[backend]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.ids.tolist() == theirs.ids.tolist()
        apart = ((ours.images - theirs.images) * scale).abs()
        assert apart.max() <= largest + 1e-2
        assert apart.mean() <= mean + 1e-3
    for loader in (here, there):
        loader.close()


@pytest.mark.parametrize("transform", [RESIZED, CENTRAL, PADDED], ids=["resized", "central", "padded"])
def test_frames_of_held_images_are_made_on_the_device(made, gpu, transform):
    """Exemplars and overlays among images that are streamed, twice over: the buffer is built again."""
    beton = Beton(made)
    here, there = (make_loader(beton, "threads", transform, device) for device in ("cpu", gpu))
    new = torch.from_numpy(np.stack([photo(transform.height, transform.width, i) for i in range(2)]))
    for kept, replaced in (([3, 8, 20, 21], [8, 30]), ([1, 3, *range(9, 17)], [8, 31])):
        for loader in (here, there):
            loader.keep(np.array(kept))
            loader.overlay(torch.tensor(replaced, device=loader.device), new.to(loader.device))
        plan = sequential_plan(np.arange(COUNT), transform, BATCH, sizes=here.sizes)
        for ours, theirs in zip(there.pixels(plan), here.pixels(plan), strict=True):
            assert (ours.cpu().int() - theirs.int()).abs().max() <= 1
    for loader in (here, there):
        loader.close()


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    "settings", [["loader=threads"], ["loader=threads", "memory=resident"], ["loader=dali"]], ids=" ".join
)
def test_a_streamed_run_is_the_same_again(made, gpu, tmp_path, settings):
    if "loader=dali" in settings:
        pytest.importorskip("nvidia.dali")
    common = [
        f"data={made}", "size=32", "order=alphabetical", "base_classes=4", "increment=1", "exemplars_per_class=4",
        "model=resnet8", "epochs=3", "base_epochs=6", "batch_size=8", "lr=0.05", "precision=bf16", f"device={gpu}",
        "compile=false", "deterministic=true",
    ]  # fmt: skip
    for name in ("one", "two"):
        experiment = Experiment(load("imagenet_balanced_5", [*common, *settings]), tmp_path / name, resume=False)
        experiment.run()
        experiment.close()
    for file in ("results.json", "metrics.jsonl", "memory/step_2.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
