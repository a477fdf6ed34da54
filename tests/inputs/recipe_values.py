"""Values of a recipe's keys: of a wrong type, out of range, huge, tiny, and nothing at all."""

from __future__ import annotations

from .cases import (
    Expected,
    Input,
    accepted,
    fails,
    override_inputs,
    refused,
    told,
    training,
)

# No key takes these.
_TEXTS = ("'[/x]'", '"\\0"', "'\u00e9\u4e2d'")
_NEVER = ("{a: 1}", "[[1, 2], [3]]", "2024-01-01", "!!binary aGk=", *_TEXTS)
_NO_NUMBER = (*_NEVER, "abc", "''", "true", "[1]", "'1,5'", "1 2", "0b2", "'0x'")
_NO_INTEGER = (*_NO_NUMBER, "1.5", ".nan", ".inf", "-.inf", "1e400")
_NO_FLOAT = (*_NO_NUMBER, ".nan", ".inf", "-.inf", "1e400", "1" + 400 * "0")
_NO_FLAG = (*_NEVER, "abc", "''", "2", "1.5", "[true]", ".nan")
_NO_NAME = (*_NEVER, "abc", "''", "2", "1.5", "true", "[a]", ".nan")

HUGE = "99999999999999999999"  # above 2**64

# Key -> integers that are out of its range.
INTEGERS = {
    "data.batch_size": ("0", "-1", "7000", HUGE),
    "data.image_size": ("0", "-8", "1000000", HUGE),
    "data.padding": ("-1",),
    "data.resize": ("0", "1", "-5"),
    "data.workers": ("-1", "257", HUGE),
    "data.num_samples": ("0", "-1"),
    "model.width": ("0", "-4", "20000", "100000000", HUGE),
    "model.num_classes": ("0", "9", "-10", "100000000000", HUGE),
    "lr_dropout.seed": ("-1", HUGE),
    "schedule.warmup_steps": ("-1",),
    "trainer.epochs": ("0", "-1"),
    "trainer.max_steps": ("0", "-1"),
    "trainer.accumulation_steps": ("0", "-1", "7", HUGE),
    "trainer.eval_every": ("0", "-1"),
    "trainer.fingerprint_every": ("-1",),
    "trainer.profile": ("0", "-1"),
    "checkpoint.every_steps": ("-1",),
    "checkpoint.keep_last": ("0", "1", "-1"),
    "tracking.every_steps": ("0", "-1"),
    "tracking.probes": ("-1",),
    "tracking.histograms_every": ("-1",),
    "seed": ("-1", HUGE, "9223372036854775808"),
}

FLOATS = {
    "optimizer.lr": ("-0.1", "-1e-300", "1e300"),
    "optimizer.momentum": ("-0.9", "1e300"),
    "optimizer.weight_decay": ("-1", "1e300"),
    "optimizer.eps": ("-1e-8",),
    "lr_dropout.keep_prob": ("0", "-0.5", "1.0001", "5e-325", "50"),
    "lr_dropout.tau": ("2.0",),  # of Magma alone
    "lr_dropout.score_start": ("0.5",),  # of Magma alone
    "data.validation": ("1", "-0.1", "2", "0.9999"),
    "data.crop_scale": ("0", "-0.5", "1.5"),
    "data.random_erasing": ("-0.1", "1.5", "0.5"),  # images in memory are not changed one by one
    "data.mixup": ("-1", "1e-320", "1e300"),
    "data.cutmix": ("-1", "1e-320", "1e300"),
    "trainer.label_smoothing": ("-0.1", "1.5"),
    "trainer.ema_decay": ("-0.1", "1", "2"),
    "trainer.clip_norm": ("0", "-1"),
    "trainer.timeout_minutes": ("0", "-1", "1e300", HUGE),
}

FLAGS = (
    "data.skip_corrupt",
    "data.trivial_augment",
    "model.sync_batchnorm",
    "optimizer.nesterov",
    "optimizer.decay_norms_and_biases",
    "lr_dropout.rescale",
    "trainer.compile",
    "trainer.deterministic",
    "checkpoint.keep_best",
    "checkpoint.background",
    "checkpoint.allow_changed",
)

# Key -> names that are nearly right.
NAMES = {
    "data.dataset": ("Digits", "digitss", "cifar", "imagenet"),
    "data.augment": ("flip", "crop_flip_crop", "resized_crop"),
    "data.storage": ("disk", "file", "files", "packed"),
    "data.fingerprint": ("name", "sha256"),
    "trainer.loss": ("crossentropy", "nll", "CrossEntropyLoss"),
    "model.arch": ("ResNet34", "resnet", "resnet1000"),
    "model.weights": ("nothing.safetensors", "recipe.yaml", "/dev/zero", "~nobody-here/x"),
    "optimizer.name": ("sgd", "adamw", "LBFGS", "Muon", "SparseAdam", "Optimizer", "__class__"),
    "lr_dropout.kind": ("Dropout", "magmas"),
    "lr_dropout.granularity": ("elements", "rows"),
    "lr_dropout.masks": ("updates", "momentum"),
    "schedule.name": ("cosine", "steplr", "Constant"),
    "schedule.unit": ("steps", "epochs"),
    "trainer.precision": ("fp16", "bfloat16", "16"),
    "trainer.gradient_compression": ("fp16",),
    "trainer.gradient_exchange": ("none",),
    "trainer.sharding": ("fsdp",),
    "trainer.channels_last": ("yes please",),
    "trainer.device": ("gpu", "cuda:99", "mps"),
    "trainer.on_nonfinite": ("ignore",),
    "checkpoint.on_error": ("ignore",),
    "checkpoint.mirror": (
        "s3://",
        "s3:///run",
        "s3://bucket/../run",
        "s3://bucket//run",
        "s3://bucket/a b",
        "ftp://host/run",
        "https://host/run",
        "file://run",
        "file:///",
        "s3://user:password@bucket/run",
        "'s3://bucket/run?X-Amz-Signature=abc'",
        "file:///dev/null/run",
    ),
}

SECTIONS = ("data", "model", "optimizer", "lr_dropout", "trainer", "checkpoint", "tracking")

_NO_SECTION = ("1", "abc", "''", "[]", "[1]", "true", ".nan", "2024-01-01", "'[/x]'")

# What is valid, however odd it looks, and what ends a run that began.
OTHERS: dict[str, dict[str, Expected]] = {
    "data.batch_size": {"1": refused("data.batch_size", "BatchNorm")},
    "data.image_size": {
        "1": refused("image_size"),
        "3": accepted("small, and enough for the last stage"),
        "100000": refused("image_size"),
    },
    "data.padding": {
        "1000000": accepted("has no effect without data.augment"),
        HUGE: accepted("has no effect without data.augment"),
    },
    "optimizer.lr": {
        "0": accepted("torch allows it, and nothing moves"),
        "1e-300": accepted("a small number"),
        "1e3": accepted("the loss of two steps is finite"),
        "1e30": fails("loss"),
        "'1e-2'": accepted("PyYAML reads 1e-2 as text, which is a number"),
        "0x1": accepted("YAML's hexadecimal 1"),
    },
    "optimizer.momentum": {"null": accepted("torch's default"), "0.999999": accepted("is < 1")},
    "optimizer.nesterov": {"true": accepted("there is a momentum")},
    "optimizer.eps": {"1e-8": refused("eps", "SGD")},
    "optimizer.betas": {
        "[0.9]": refused("optimizer.betas"),
        "[0.9, 0.99, 0.999]": refused("optimizer.betas"),
        "[0.9, 0.99]": refused("betas", "SGD"),
        "0.9": refused("optimizer.betas"),
        "[a, b]": refused("optimizer.betas"),
        "[.nan, 0.9]": refused("optimizer.betas"),
    },
    "optimizer.groups": {
        "1": refused("optimizer.groups"),
        "[1]": refused("optimizer.groups"),
        "[{}]": refused("optimizer.groups.0.match"),
        "[{match: 1}]": refused("optimizer.groups.0.match"),
        "[{match: [1]}]": refused("optimizer.groups.0.match"),
        "[{match: []}]": refused("optimizer.groups.0.match"),
        "[{match: nothing}]": refused("optimizer.groups.0.match"),
        "[{match: '*'}, {match: '*'}]": refused("optimizer.groups.1.match"),
        "[{match: 'fc.*', lr: -1}]": refused("optimizer.groups.0.lr"),
        "[{match: 'fc.*', lr: .nan}]": refused("optimizer.groups.0.lr"),
        "[{match: 'fc.*', lr: 1e300}]": refused("optimizer.groups.0"),
        "[{match: 'fc.*', momentum: abc}]": refused("optimizer.groups.0"),
        "[{match: 'fc.*', momentun: 0.9}]": refused("momentun", "momentum"),
        "[{match: 'fc.*', name: group0}]": refused("group0"),
        "[{match: 'fc.*', name: 'a/b [/x]'}]": accepted("any name will do for a tag"),
        "[{match: 'fc.*', keep_prob: 2}]": refused("optimizer.groups.0.keep_prob"),
        "[{match: '[', lr: 0.1}]": refused("optimizer.groups.0.match"),
    },
    "optimizer.decay_norms_and_biases": {"false": accepted("there is no weight decay to split")},
    "data.mean": {
        "1": refused("data.mean"),
        "[0.5, 0.5]": refused("data.mean"),
        "[a, b, c]": refused("data.mean"),
        "[.nan, 0, 0]": refused("data.mean"),
        "[0.5, 0.5, 0.5]": accepted("a value for each channel"),
    },
    "data.std": {
        "1": refused("data.std"),
        "[0, 1, 1]": refused("data.std"),
        "[1, 1, 1, 1]": refused("data.std"),
        "[0.2, 0.2, 0.2]": accepted("a value for each channel"),
    },
    "data.trivial_augment": {"true": refused("trivial_augment")},
    "data.mixup": {"0.2": accepted("images in memory can be mixed")},
    "data.cutmix": {"1": accepted("images in memory can be mixed")},
    "data.validation": {"1e-300": refused("data.validation"), "0": accepted("none")},
    "model.reset": {
        "1": refused("model.reset"),
        "[1]": refused("model.reset"),
        "{a: 1}": refused("model.reset"),
        "fc.*": refused("reset", "weights"),
    },
    "trainer.ema_decay": {"0": refused("ema_decay"), "1e-300": accepted("the newest weights")},
    "trainer.label_smoothing": {"0": accepted("none")},
    "lr_dropout": {"null": accepted("no learning rate dropout")},
    "lr_dropout.keep_prob": {
        "1": accepted("keeps all"),
        "1e-300": accepted("keeps nothing, and is allowed"),
        "null": refused("lr_dropout.keep_prob"),
    },
    "lr_dropout.kind": {"magma": accepted("the recipe has a momentum")},
    "lr_dropout.seed": {"18446744073709551615": accepted("the largest")},
    "schedule": {"null": accepted("constant"), "1": refused("schedule"), "[]": refused("schedule")},
    "trainer.epochs": {HUGE: accepted("max_steps ends the run")},
    "trainer.max_steps": {HUGE: accepted("epochs end the run")},
    "trainer.eval_every": {HUGE: accepted("evaluates at the end")},
    "trainer.fingerprint_every": {HUGE: accepted("never"), "0": accepted("never")},
    "trainer.profile": {HUGE: told("profile")},
    "trainer.device": {"cuda": refused("trainer.device")},
    "trainer.clip_norm": {"1e300": accepted("clips nothing"), "1e-300": accepted("a tiny step")},
    "trainer.timeout_minutes": {"1e-9": accepted("one rank waits for nobody")},
    "checkpoint.every_steps": {HUGE: accepted("at the end"), "0": accepted("at the end")},
    "checkpoint.keep_last": {HUGE: accepted("keeps all")},
    "checkpoint.mirror": {"null": accepted("none")},
    "tracking.every_steps": {HUGE: accepted("never")},
    "tracking.probes": {HUGE: accepted("one for each parameter"), "0": accepted("none")},
    "tracking.histograms_every": {HUGE: accepted("never"), "0": accepted("never")},
    "seed": {"9223372036854775807": accepted("the largest")},
}


def inputs() -> list[Input]:
    table: dict[str, dict[str, Expected]] = {}

    def add(key: str, values: tuple[str, ...]) -> None:
        # The last part, because a line may name the section and the key apart.
        for value in values:
            table.setdefault(key, {})[value] = refused(key.rpartition(".")[2])

    for key, values in INTEGERS.items():
        add(key, _NO_INTEGER + values)
    for key, values in FLOATS.items():
        add(key, _NO_FLOAT + values)
    for value in ("7", HUGE):
        table["trainer.accumulation_steps"][value] = refused("accumulation step(s)")
    for key in FLAGS:
        add(key, _NO_FLAG)
    for key, values in NAMES.items():
        add(key, _NO_NAME + values)
    for key in SECTIONS:
        add(key, _NO_SECTION)
    for key, others in OTHERS.items():
        table.setdefault(key, {}).update(others)

    # 2 is no word for a flag, and `true` is a layout.
    table["trainer.channels_last"].pop("true")
    return override_inputs("values of a recipe", table) + _combinations()


_FEW_IMAGES = ("data.dataset=synthetic", "data.num_samples=20")


def _combinations() -> list[Input]:
    """Values that are wrong, or too large, only together."""
    group = "values together"
    table = {
        ("data.augment=crop", "data.padding=1000000"): refused("data.padding"),
        ("data.augment=crop", f"data.padding={HUGE}"): refused("data.padding"),
        ("data.dataset=synthetic", f"data.num_samples={HUGE}"): refused("data.num_samples"),
        ("data.dataset=synthetic", "data.num_samples=1000000000000"): refused("data.num_samples"),
        ("data.dataset=synthetic", "data.num_samples=100"): refused("data.batch_size"),
        ("data.dataset=synthetic", "data.image_size=100000"): refused("data.image_size"),
        ("data.dataset=synthetic", "data.image_size=100000000"): refused("data.image_size"),
        ("data.batch_size=1", "data.image_size=2"): refused("data.batch_size", "BatchNorm"),
        (*_FEW_IMAGES, "data.batch_size=1", "data.image_size=16"): accepted("2 x 2 values"),
        ("data.batch_size=2", "trainer.accumulation_steps=2", "data.image_size=4"): refused(
            "data.batch_size", "BatchNorm"
        ),
        ("model.width=1000", "trainer.max_steps=1", "model.arch=resnet50"): refused("model.width"),
        ("optimizer.lr=0", "optimizer.momentum=0"): accepted("nothing moves"),
        ("optimizer.momentum=0", "optimizer.nesterov=true"): refused("Nesterov"),
        ("lr_dropout=null", "optimizer.groups=[{match: 'fc.*', keep_prob: 0.5}]"): refused(
            "keep_prob", "lr_dropout"
        ),
        ("lr_dropout=null", "lr_dropout.keep_prob=0.5"): accepted("the last one counts"),
        ("lr_dropout.kind=magma", "lr_dropout.tau=0"): refused("lr_dropout.tau"),
        ("lr_dropout.kind=magma", "lr_dropout.tau=1e300"): accepted("scores are 1/2"),
        ("lr_dropout.kind=magma", "lr_dropout.tau=1e-300"): accepted("scores are 0 or 1"),
        ("lr_dropout.kind=magma", "lr_dropout.score_start=2"): refused("lr_dropout.score_start"),
        ("lr_dropout.kind=magma", "lr_dropout.keep_prob=1"): refused("lr_dropout.keep_prob"),
        ("lr_dropout.kind=magma", "optimizer.momentum=0"): refused("lr_dropout.kind"),
        ("trainer.gradient_compression=bf16", "trainer.sharding=full"): refused(
            "trainer.gradient_compression"
        ),
        **{
            ("trainer.gradient_exchange=kept", *others): refused("trainer.gradient_exchange", key)
            for others, key in (
                (("lr_dropout=null",), "lr_dropout"),
                (("lr_dropout.kind=magma",), "lr_dropout.kind"),
                (("lr_dropout.masks=gradient",), "lr_dropout.masks"),
                (("optimizer.name=Adam", "optimizer.lr=0.001"), "optimizer.name"),
                (("trainer.clip_norm=1.0",), "trainer.clip_norm"),
                (("trainer.sharding=full",), "trainer.sharding"),
            )
        },
        ("trainer.gradient_exchange=kept", "trainer.max_steps=1"): told("sends nothing to others"),
        ("trainer.precision=bf16", "optimizer.lr=1e30"): fails("loss"),
        ("trainer.on_nonfinite=skip", "optimizer.lr=1e30", "trainer.max_steps=3"): told("skipped"),
        ("data.root=''", "data.dataset=imagefolder"): refused("data.root"),
        ("data.root=1", "data.dataset=imagefolder"): refused("data.root"),
        ("data.root=~nobody-here/x",): refused("data.root"),
        ('data.root="\\0"', "data.dataset=imagefolder"): refused("data.root"),
        ("data.root='[/x]'", "data.dataset=imagefolder"): refused("[/x]/train"),
        ("data.root=/dev/null", "data.dataset=cifar10"): refused("data.root"),
        ("data.root=/dev/null", "data.dataset=imagefolder"): refused("data.root"),
    }
    return [
        Input(group, " ".join(overrides), expected, training(*overrides))
        for overrides, expected in table.items()
    ]
