"""The commands of `lrd` with wrong arguments."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .cases import (
    RECIPE_FILE,
    RUN_DIR,
    Expected,
    Input,
    accepted,
    misused,
    refused,
    told,
    write_nothing,
)
from .saved_runs import copy_run

# Arguments of `lrd` -> what is expected, where there is no run.
WITHOUT_RUN: dict[tuple[str, ...], Expected] = {
    ("nothing",): misused("nothing"),
    ("--nothing",): misused("--nothing"),
    ("train",): misused("recipe"),
    ("train", "nothing.yaml"): refused("nothing.yaml"),
    ("train", RECIPE_FILE, "--lr", "1"): misused("--lr"),
    ("train", RECIPE_FILE, "lr"): refused("lr"),
    ("check",): misused("recipe"),
    ("check", "nothing.yaml"): refused("nothing.yaml"),
    ("check", RECIPE_FILE, "seed=abc"): refused("seed"),
    ("check", RECIPE_FILE, "model.width=100000000"): refused("model.width"),
    ("check", RECIPE_FILE, "data.image_size=100000"): refused("data.image_size"),
    ("check", RECIPE_FILE, "data.batch_size=1"): refused("data.batch_size"),
    ("check", RECIPE_FILE, "data.batch_size=1", "data.image_size=16"): accepted("2 x 2 values"),
    ("check", RECIPE_FILE, "data.batch_size=7"): accepted("any batch size will do"),
    ("check", RECIPE_FILE, "run_dir=recipe.yaml"): refused("run_dir"),
    ("check", RECIPE_FILE, 'run_dir="a\\0b"'): refused("run_dir"),
    ("check", RECIPE_FILE, f"run_dir={300 * 'x'}"): refused("run_dir"),
    ("check", RECIPE_FILE, "optimizer.lr=1e300"): refused("lr"),
    ("check", RECIPE_FILE, "optimizer.lr=1e30"): Expected((1,), ("loss",)),
    ("check", RECIPE_FILE, "optimizer.differentiable=true"): refused("differentiable"),
    ("lr",): misused("SOURCE"),
    ("lr", "nothing.yaml"): refused("nothing.yaml"),
    ("lr", "seed=1"): refused("lr: name a recipe"),
    ("lr", RECIPE_FILE, "seed=abc"): refused("seed"),
    ("lr", RECIPE_FILE, "-o", "x.abc"): refused("x.abc"),
    ("lr", RECIPE_FILE, "-o", "nothing/x.png"): refused("nothing/x.png"),
    ("lr", RECIPE_FILE, "-o", "/dev/full/x.png"): refused("/dev/full/x.png"),
    ("lr", RECIPE_FILE, "-o", ""): refused("--out"),
    ("lr", RECIPE_FILE, "trainer.epochs=99999999999999999999", "trainer.max_steps=null"): refused(
        "trainer.epochs"
    ),
    ("lr", RECIPE_FILE, "schedule.name=LambdaLR", "schedule.lr_lambda='1/t'"): refused("lr_lambda"),
    ("lr", "."): refused("."),
    ("lr", "/dev/null"): refused("/dev/null"),
    ("runs", "nothing"): refused("nothing"),
    ("runs", "."): refused("."),
    ("runs", RECIPE_FILE): refused(RECIPE_FILE),
    ("runs", ".", "--sort", "abc"): refused("--sort", "abc"),
    ("runs", "a", "b"): misused("b"),
    ("compare",): misused("RUN"),
    ("compare", "nothing"): refused("two"),
    ("compare", "nothing", "nowhere"): refused("nothing"),
    ("compare", RECIPE_FILE, RECIPE_FILE): refused(RECIPE_FILE),
    ("checkpoints",): misused("run_dir"),
    ("checkpoints", "nothing"): refused("nothing"),
    ("checkpoints", RECIPE_FILE): refused(RECIPE_FILE),
    ("checkpoints", "ftp://host/run"): refused("ftp://host/run"),
    ("checkpoints", "s3://user:password@bucket/run"): refused("user"),
    ("checkpoints", "s3://bucket/a b"): refused("s3://bucket/a b"),
    ("checkpoints", "file:///nothing-here/x"): refused("file:///nothing-here/x", "no such folder"),
    ("checkpoints", "."): refused("."),
    ("checkpoints", ".", "--export", "x.safetensors", "--verify"): refused("--export"),
    ("eval",): misused("RUN_OR_FILE"),
    ("eval", "nothing"): refused("nothing"),
    ("eval", RECIPE_FILE): refused(RECIPE_FILE),
    ("eval", "."): refused("."),
    ("predict",): misused("RUN_OR_FILE"),
    ("predict", "nothing", "x.png"): refused("nothing"),
    ("predict", RECIPE_FILE, "x.png"): refused(RECIPE_FILE),
    ("probe",): misused("RUN"),
    ("probe", "nothing", "fc.bias"): refused("nothing"),
    ("probe", RECIPE_FILE, "fc.bias"): refused(RECIPE_FILE),
    ("probe", ".", "fc.bias"): refused("."),
    ("diff",): misused("RUN"),
    ("diff", "nothing"): misused("RUN"),
    ("diff", "nothing", "nowhere"): refused("nothing"),
    ("diff", RECIPE_FILE, "."): refused(RECIPE_FILE),
    ("fork",): misused("RUN"),
    ("fork", "nothing"): misused("run_dir=NEW"),
    ("fork", "nothing", "run_dir=new"): misused("--at"),
    ("fork", "nothing", "run_dir=new", "--at", "1"): refused("nothing"),
    ("fork", ".", "run_dir=new", "--at", "abc"): misused("--at"),
    ("replay",): misused("RUN"),
    ("replay", "nothing"): refused("which steps"),
    ("replay", "nothing", "--around", "1"): refused("nothing"),
    ("replay", ".", "--from", "1", "--to", "1"): refused("."),
    ("replay", ".", "--around", "abc"): misused("--around"),
    ("replay", ".", "--around", "1", "--ranks", "0"): misused("--ranks"),
    ("verify",): misused("RUN"),
    ("verify", "nothing"): refused("nothing"),
    ("verify", RECIPE_FILE): refused(RECIPE_FILE),
    ("verify", "."): refused("."),
    ("verify", ".", "--windows", "0"): misused("--windows"),
    ("verify", ".", "--seed", "abc"): misused("--seed"),
    ("study",): misused("file"),
    ("study", "nothing.yaml"): refused("nothing.yaml"),
    ("study", RECIPE_FILE): refused(RECIPE_FILE),
    ("study", "."): refused("."),
    ("study", RECIPE_FILE, "--jobs", "0"): misused("--jobs"),
    ("data",): Expected((2,), ("verify",), is_in_output=True),  # typer shows its help
    ("data", "nothing"): misused("nothing"),
    ("data", "pack"): misused("DIR"),
    ("data", "pack", "nothing"): refused("nothing/train"),
    ("data", "pack", RECIPE_FILE): refused(f"{RECIPE_FILE}/train"),
    ("data", "pack", ".", "--size", "abc"): misused("--size"),
    ("data", "pack", ".", "--size", "0"): misused("--size"),
    ("data", "pack", ".", "--size", "100000000"): misused("--size"),
    ("data", "verify"): misused("DIR"),
    ("data", "verify", "nothing"): refused("nothing: has no complete pack"),
    ("data", "verify", RECIPE_FILE): refused(RECIPE_FILE),
    ("doctor", RECIPE_FILE): refused(RECIPE_FILE),
    ("doctor", "nothing/at/all"): accepted("the disk above it is looked at"),
    ("doctor", "a", "b"): misused("b"),
}


def _remove(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        copy_run(folder)
        path = folder / RUN_DIR / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return remove


def _write(name: str, raw: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        copy_run(folder)
        (folder / RUN_DIR / name).write_bytes(raw)

    return write


def _garbage_events(folder: Path) -> None:
    copy_run(folder)
    for path in (folder / RUN_DIR).glob("events.out.tfevents.*"):
        path.write_bytes(1000 * b"garbage")


# Arguments of `lrd`, what is done to a finished run before, and what is expected.
WITH_RUN: list[tuple[tuple[str, ...], str, Callable[[Path], None], Expected]] = [
    (("checkpoints", RUN_DIR, "--export", "x.pt"), "", copy_run, refused("x.pt")),
    (
        ("checkpoints", RUN_DIR, "--export", "no/x.safetensors"),
        "",
        copy_run,
        refused("no/x.safetensors"),
    ),
    (("checkpoints", RUN_DIR, "--export", RUN_DIR), "", copy_run, refused(RUN_DIR)),
    (
        ("checkpoints", RUN_DIR, "--verify"),
        "damaged",
        _write("checkpoints/step-00000002/trainer.json", b"{}"),
        Expected((1,), ("damaged",), is_in_output=True),
    ),
    (
        ("checkpoints", RUN_DIR),
        "trainer.json is a list",
        _write("checkpoints/step-00000002/trainer.json", b"[]"),
        accepted("the table shows `?`"),
    ),
    (("checkpoints", RUN_DIR), "no checkpoints", _remove("checkpoints"), refused(RUN_DIR)),
    (("checkpoints", RUN_DIR, "--best"), "", copy_run, refused("--best", "--export")),
    (("checkpoints", RUN_DIR, "--export", "x", "--step", "7"), "", copy_run, refused("7")),
    (("checkpoints", RUN_DIR, "--export", "x", "--step", "a"), "", copy_run, misused("--step")),
    (("checkpoints", RUN_DIR, "--export", "x", "--ema"), "", copy_run, refused("ema")),
    (("eval", RUN_DIR), "no checkpoints", _remove("checkpoints"), refused(RUN_DIR)),
    (("eval", RUN_DIR, "--data", "nothing"), "", copy_run, refused("nothing")),
    (("eval", RUN_DIR, "--data", RECIPE_FILE), "", copy_run, refused(RECIPE_FILE)),
    (("eval", RUN_DIR, "--part", "training"), "", copy_run, refused("part:", "training")),
    (("eval", RUN_DIR, "--part", "validation"), "", copy_run, refused("validation")),
    (("eval", RUN_DIR, "--ema"), "", copy_run, refused("ema")),
    (("eval", RUN_DIR, "-o", "no/x.png"), "", copy_run, refused("no/x.png")),
    (("eval", RUN_DIR, "-o", "x.abc"), "", copy_run, refused("x.abc")),
    (("eval", RUN_DIR, "seed=1"), "", copy_run, refused("seed")),
    (("eval", RUN_DIR, "data.root"), "", copy_run, refused("data.root")),
    (("predict", RUN_DIR), "", copy_run, Expected((2,), ("IMAGE",), is_usage=True)),
    (("predict", RUN_DIR, "nothing.png"), "", copy_run, refused("nothing.png")),
    (("predict", RUN_DIR, RECIPE_FILE), "", copy_run, refused(RECIPE_FILE)),
    (("predict", RUN_DIR, "/dev/zero"), "", copy_run, refused("/dev/zero")),
    (("predict", RUN_DIR, "."), "", copy_run, refused(".")),
    (("predict", RUN_DIR, "x.png", "--top", "0"), "", copy_run, misused("--top")),
    (
        ("predict", RUN_DIR, "x.png"),
        "a FIFO",
        lambda folder: (copy_run(folder), os.mkfifo(folder / "x.png"))[0],
        refused("x.png"),
    ),
    (("runs", "."), "status.json is garbage", _write("status.json", b"{"), refused(".")),
    (("runs", "."), "status.json is a list", _write("status.json", b"[]"), refused(".")),
    (
        ("runs", "."),
        "status.json has other types",
        _write("status.json", b'{"state": [1], "step": "x", "updated": 1e300}'),
        accepted("what it says is shown"),
    ),
    (
        ("runs", ".", "--json"),
        "status.json has other types",
        _write("status.json", b'{"state": {}, "step": 1e999, "updated": -1e300}'),
        accepted("what it says is shown"),
    ),
    (
        ("runs", "."),
        "recipe.yaml is garbage",
        _write("recipe.yaml", b"\xff{[!!python/object:os.x"),
        accepted("the table shows `?`"),
    ),
    (("runs", "."), "recipe.yaml is a list", _write("recipe.yaml", b"[]"), accepted("shows `?`")),
    (("runs", "."), "recipe.yaml is empty", _write("recipe.yaml", b""), accepted("shows `?`")),
    (
        ("runs", "."),
        "recipe.yaml is deeply nested",
        _write("recipe.yaml", 10_000 * b"["),
        accepted("shows `?`"),
    ),
    (("probe", RUN_DIR), "", copy_run, refused("name an element")),
    (("probe", RUN_DIR, "nothing.weight"), "", copy_run, refused("nothing.weight")),
    (("probe", RUN_DIR, "fc.bias[99]"), "", copy_run, refused("fc.bias[99]")),
    (("probe", RUN_DIR, "fc.bias[-1]"), "", copy_run, refused("fc.bias[-1]")),
    (("probe", RUN_DIR, "fc.bias[0,0]"), "", copy_run, refused("fc.bias[0,0]")),
    (("probe", RUN_DIR, "fc.bias[a]"), "", copy_run, refused("fc.bias[a]")),
    (("probe", RUN_DIR, "fc.bias["), "", copy_run, refused("fc.bias[")),
    (("probe", RUN_DIR, ""), "", copy_run, refused("probe: ")),
    (("probe", RUN_DIR, "fc.bias", "-o", "x.abc"), "", copy_run, refused("x.abc")),
    (("probe", RUN_DIR, "fc.bias", "-o", "no/x.png"), "", copy_run, refused("no/x.png")),
    (("probe", RUN_DIR, "fc.bias", "--until", "1"), "", copy_run, refused("--until")),
    (("probe", RUN_DIR, "--coverage", "--until", "0"), "", copy_run, misused("--until")),
    (("probe", RUN_DIR, "--coverage", "--until", "9"), "", copy_run, refused("9")),
    (("probe", RUN_DIR, "fc.bias"), "no checkpoints", _remove("checkpoints"), refused(RUN_DIR)),
    (
        ("probe", RUN_DIR, "fc.bias"),
        "event files are garbage",
        _garbage_events,
        Expected((0, 2), (RUN_DIR,)),
    ),
    (("probe", RUN_DIR, "fc.bias"), "no recipe", _remove("recipe.yaml"), refused("recipe.yaml")),
    (
        ("probe", RUN_DIR, "fc.bias"),
        "recipe.yaml is a list",
        _write("recipe.yaml", b"[]"),
        refused("recipe.yaml"),
    ),
    (
        ("probe", RUN_DIR, "fc.bias"),
        "trainer.json is a list",
        _write("checkpoints/step-00000002/trainer.json", b"[]"),
        accepted("the checkpoint before it will do"),
    ),
    (("diff", RUN_DIR, "nothing"), "", copy_run, refused("nothing")),
    (("diff", RUN_DIR, RUN_DIR), "twice", copy_run, accepted("they are equal")),
    (("diff", RUN_DIR, RUN_DIR, "seed"), "", copy_run, refused("seed")),
    (("diff", RUN_DIR, RUN_DIR, "nothing=1"), "", copy_run, refused("nothing")),
    (("fork", RUN_DIR, "seed=1", "--at", "1"), "", copy_run, refused("run_dir=NEW")),
    (("fork", RUN_DIR, "run_dir=new", "--at", "0"), "", copy_run, refused("--at 0")),
    (("fork", RUN_DIR, "run_dir=new", "--at", "-1"), "", copy_run, refused("--at -1")),
    (("fork", RUN_DIR, "run_dir=new", "--at", "3"), "", copy_run, refused("--at 3")),
    (("fork", RUN_DIR, f"run_dir={RUN_DIR}", "--at", "1"), "", copy_run, refused("run_dir")),
    (("fork", RUN_DIR, "run_dir=recipe.yaml", "--at", "1"), "", copy_run, refused("recipe.yaml")),
    (("fork", RUN_DIR, "run_dir=/proc/x", "--at", "1"), "", copy_run, refused("/proc/x")),
    (("fork", RUN_DIR, "run_dir=new", "--at", "1", "lr=1"), "", copy_run, refused("lr")),
    (
        ("fork", RUN_DIR, "run_dir=new", "--at", "1", "model.width=abc"),
        "",
        copy_run,
        refused("model.width"),
    ),
    (
        ("fork", RUN_DIR, "run_dir=new", "--at", "1", "optimizer.momentun=1"),
        "",
        copy_run,
        refused("optimizer.momentun"),
    ),
    (
        ("fork", RUN_DIR, "run_dir=new", "--at", "2"),
        "no checkpoints",
        _remove("checkpoints"),
        refused("--at 2"),
    ),
    (("replay", RUN_DIR, "--from", "1", "--to", "3"), "", copy_run, refused("step 3")),
    (("replay", RUN_DIR, "--from", "0", "--to", "1"), "", copy_run, refused("steps 0 to 1")),
    (("replay", RUN_DIR, "--from", "2", "--to", "1"), "", copy_run, refused("steps 2 to 1")),
    (("replay", RUN_DIR, "--from", "1"), "", copy_run, refused("--to")),
    (("replay", RUN_DIR, "--around", "9"), "", copy_run, refused("9")),
    (("replay", RUN_DIR, "--around", "1", "data.root"), "", copy_run, refused("data.root")),
    (
        ("replay", RUN_DIR, "--around", "1", "optimizer.lr=1"),
        "",
        copy_run,
        refused("optimizer.lr"),
    ),
    (("replay", RUN_DIR, "--around", "1", "-o", RECIPE_FILE), "", copy_run, refused(RECIPE_FILE)),
    (("replay", RUN_DIR, "--around", "1", "-o", "/proc/x"), "", copy_run, refused("/proc/x")),
    (("verify", RUN_DIR), "no checkpoints", _remove("checkpoints"), refused(RUN_DIR)),
    (("verify", RUN_DIR, "seed=1"), "", copy_run, refused("seed")),
    (
        ("verify", RUN_DIR),
        "a checkpoint is damaged",
        _write("checkpoints/step-00000002/optimizer.pt", b"x"),
        Expected((1,), ("optimizer.pt",)),
    ),
    (
        ("verify", RUN_DIR),
        "event files are garbage",
        _garbage_events,
        Expected((1,), ("lr/group0",), is_in_output=True),
    ),
    (("compare", RUN_DIR, RUN_DIR), "twice", copy_run, told(RUN_DIR)),
    (("compare", RUN_DIR, RUN_DIR, "-o", "x.abc"), "", copy_run, refused("x.abc")),
    (("compare", RUN_DIR, RUN_DIR, "-o", "no/x.png"), "", copy_run, refused("no/x.png")),
    (
        ("compare", RUN_DIR, RUN_DIR),
        "event files are garbage",
        _garbage_events,
        Expected((0, 2), (RUN_DIR,)),
    ),
    (("lr", RUN_DIR), "event files are garbage", _garbage_events, refused(RUN_DIR)),
    (("lr", RUN_DIR, "seed=1"), "", copy_run, refused("seed=1")),
    (("lr", RUN_DIR), "recipe.yaml is missing", _remove("recipe.yaml"), accepted("records do")),
]


def inputs() -> list[Input]:
    found = []
    for arguments, expected in WITHOUT_RUN.items():
        name = "lrd " + " ".join(arguments)[:100]
        found.append(Input("commands", name, expected, ("lrd", *arguments), write_nothing))
    for arguments, what, prepare, expected in WITH_RUN:
        name = "lrd " + " ".join(arguments) + (f", {what}" if what else "")
        found.append(Input("commands", name, expected, ("lrd", *arguments), prepare))
    return found
