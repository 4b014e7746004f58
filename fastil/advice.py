"""Suggestions for an unknown key, method or recipe: the nearest name, or what it is called here for people who come
from PyCIL, mammoth or Avalanche.
"""

import difflib
import re
from collections.abc import Collection, Sequence

# Settings by the names that they have in other toolboxes.
KEYS = {
        "memory_per_class": "exemplars_per_class", "n_exemplars": "exemplars_per_class", "init_cls": "base_classes",
    "nb_cl_fg": "base_classes", "nb_cl": "increment", "classes_per_task": "increment", "convnet_type": "model",
    "backbone": "model", "init_epoch": "base_epochs", "n_epochs": "epochs", "train_epochs": "epochs", "init_lr": "lr",
    "lrate": "lr", "learning_rate": "lr", "lrate_decay": "lr_drop", "lr_scheduler": "schedule",
    "scheduler": "schedule", "lr_milestones": "milestones", "init_milestones": "milestones",
    "optim_wd": "weight_decay", "optim_mom": "momentum", "train_mb_size": "batch_size", "lr_decay": "lr_drop",
    "permute_classes": "order", "n_classes_per_task": "increment",
    "model_name": "method", "shuffle": "order", "class_order": "order", "fixed_class_order": "order",
    "custom_class_order": "order", "amp": "precision", "fp16": "precision", "use_amp": "precision", "gpu": "device",
    "cuda": "device", "augment": "pad", "transform": "pad", "tracker": "track", "logger": "track",
}  # fmt: skip

_MEMORY = "a memory of one size is memory_budget=N exemplars_per_class=null"
_TRACK = "trackers are named by track=tensorboard,wandb,csv"
_STEPS = "the number of steps follows from base_classes=N and increment=N, the classes of each step"
_OUT = "the run directory is given by --out"
_STOP = "a run is always saved; stop it with Ctrl-C and go on with --resume"
_SEVERAL = "several seeds are trained by --seeds"
# Settings of other toolboxes that are something else here.
ADVICE = {
    **dict.fromkeys(("memory_size", "buffer_size", "mem_size", "fixed_memory"), _MEMORY),
    **dict.fromkeys(("csv", "csv_log", "tensorboard", "wandb", "use_wandb", "nowand", "wandb_project", "log"), _TRACK),
    **dict.fromkeys(("n_tasks", "num_tasks", "nb_tasks", "tasks", "n_experiences", "n_steps", "num_steps"), _STEPS),
    **dict.fromkeys(("out", "output", "output_dir", "out_dir", "save_dir", "log_dir", "results_path", "logdir"), _OUT),
    **dict.fromkeys(("seeds", "n_seeds", "num_seeds"), _SEVERAL),
    **dict.fromkeys(("gpus", "n_gpus", "num_gpus", "devices", "distributed"), "several GPUs: docs/distributed.md"),
    **dict.fromkeys(("num_workers", "workers"), "the loaders choose their threads themselves; leave it out"),
    **dict.fromkeys(("savecheck", "loadcheck", "start_from", "stop_after"), _STOP),
    **dict.fromkeys(("eval_epochs", "eval_every"), "the test images are read once, after each step"),
    **dict.fromkeys(("nesterov", "optim_nesterov"), "SGD is without Nesterov's momentum"),
    "base_path": "the path of the data set is given by --data",
    "validation": "other test images are given by --val",
    "minibatch_size": "a batch holds new images and exemplars together (batch_size=, sampler=)",
    "model_config": "the settings of a paper are a recipe; `fastil recipes` lists them",
    "debug_mode": "a short run is epochs=1 base_epochs=1",
    "code_optimization": "see precision= and compile=",
    "resume": "an interrupted run goes on with --resume",
    "joint": "joint training is method=joint exemplars_per_class=0 loss=softmax",
    "label_smoothing": "not built in; a dozen lines of a method of your own do it (docs/extending.md)",
    "optimizer": "training is by SGD (lr, momentum, weight_decay, schedule)",
    "optim": "training is by SGD (lr, momentum, weight_decay, schedule)",
}

_REHEARSAL = "plain rehearsal is method=finetune with the recipe's exemplars and loss=softmax"
_OWN = "a method of your own is a class (docs/extending.md)"
# Methods of other toolboxes that are something else here.
METHODS = {
    **dict.fromkeys(("er", "replay", "rehearsal", "experience_replay"), _REHEARSAL),
    **dict.fromkeys(("sgd", "naive"), "without a memory it is method=finetune exemplars_per_class=0 loss=softmax"),
    **dict.fromkeys(("cumulative", "joint_training", "upper_bound"), "it is method=joint"),
    **dict.fromkeys(("balanced", "balancedsce", "meta", "bsce"), "the loss is a key of its own, such as loss=balanced"),
}


_UNKNOWN = (
    "acil", "agem", "aper", "beef", "beefiso", "bfp", "ccic", "clip", "co2l", "coda_prompt", "coil", "der", "der++",
    "derpp", "ds_al", "dualprompt", "ease", "eeil", "er_ace", "ewc", "ewc_on", "fdr", "fetril", "foster", "gdumb",
    "gem", "gss", "hal", "icarl_lider", "il2a", "il2m", "l2p", "lwf", "lwf_mc", "mas", "memo", "mir", "pass",
    "puridiver", "ranpac", "rmm", "rwalk", "si", "simplecil", "ssil", "starprompt", "tagfex", "twf", "xder", "zap",
)  # fmt: skip


def on_key(key: str, keys: Collection[str]) -> str:
    """Return what to write instead of an unknown key. keys: those of the recipe."""
    key = key.lower()
    if key in ADVICE:
        return ADVICE[key]
    near = [key] if key in keys else [k for k in keys if k.startswith(key)]
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    near = near or [k for k in keys if key.startswith(k)]
    if key in KEYS:
        near = [KEYS[key]]
    return f"did you mean {' or '.join(near)}?" if near else "`fastil recipes RECIPE` prints every key with its value"


def on_option(option: str, keys: Collection[str]) -> str:
    """Return what to write instead of an unknown option, such as --lr, of a command that takes settings."""
    key = option.lstrip("-").replace("-", "_")
    key = KEYS.get(key, key)
    return f"{key}=VALUE" if key in keys else on_key(key, keys).rstrip("?")


def on_method(name: str, methods: Collection[str]) -> str:
    """Return what to write instead of an unknown method. methods: the known ones."""
    if all(part in methods for part in name.split(",")):
        return f"several are trained by `fastil sweep RECIPE method={name}`"
    plain = name.lower().replace("-", "_")
    if plain in METHODS:
        return METHODS[plain]
    if plain in _UNKNOWN:
        return f"not in fastil; {_OWN}"
    near = difflib.get_close_matches(plain, methods, n=1, cutoff=0.65)
    return f"did you mean {near[0]}?" if near else f"methods are {', '.join(sorted(methods))}; {_OWN}"


def on_recipe(name: str, recipes: Sequence[str]) -> str:
    """Return what to write instead of an unknown recipe. recipes: the names of all."""
    plain = name.lower().replace("-", "_").removeprefix("seq_").removeprefix("split_")
    dataset = plain.partition("_")[0]
    if plain in METHODS or plain in _UNKNOWN:
        return f"it is a method, not a recipe; {METHODS.get(plain, f'not in fastil; {_OWN}')}"
    if f"cifar100_{plain}_5" in recipes:
        return f"there is one for each data set, such as cifar100_{plain}_5; fastil recipes lists them"
    of_data = [recipe for recipe in recipes if dataset and re.match(rf"{re.escape(dataset)}([_-]|$)", recipe)]
    near = difflib.get_close_matches(plain, of_data or recipes, n=1, cutoff=0.8)
    if not near and not of_data:
        return "fastil recipes lists them; the one for images of your own is folder"
    if near or len(of_data) == 1:
        return f"did you mean {(near or of_data)[0]}?"
    example = next((recipe for recipe in of_data if recipe.endswith("_balanced_5")), of_data[0])
    scratch = example.replace("_balanced_5", "_balanced_b0_10")
    others = f" (half of the classes, then 5 steps) and {scratch} (10 equal steps)" if scratch in of_data else ""
    return f"there are {len(of_data)} of this data set, such as {example}{others}; fastil recipes lists them"
