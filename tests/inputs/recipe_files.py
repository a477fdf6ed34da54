"""Recipe files: YAML that is broken, hostile or oddly encoded; and overrides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .cases import RECIPE, RECIPE_FILE, Expected, Input, accepted, refused, training

_BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)

# Name -> content of the recipe's file.
FILES: dict[str, tuple[str | bytes, Expected]] = {
    "empty": ("", accepted("all defaults; `trainer` is given by overrides")),
    "only a comment": ("# nothing\n", accepted("all defaults")),
    "a list": ("- 1\n- 2\n", refused(RECIPE_FILE, "mapping")),
    "a word": ("recipe\n", refused(RECIPE_FILE, "mapping")),
    "a number": ("1\n", refused(RECIPE_FILE, "mapping")),
    "an unclosed bracket": ("data: {dataset: digits\n", refused(RECIPE_FILE, "YAML")),
    "a tab": ("data:\n\tdataset: digits\n", refused(RECIPE_FILE, "line 2")),
    "two documents": (RECIPE + "---\n" + RECIPE, refused(RECIPE_FILE, "YAML")),
    "a key twice": (RECIPE + "seed: 1\nseed: 2\n", refused(RECIPE_FILE, "seed", "twice")),
    "a section twice": (RECIPE + "data: {}\n", refused(RECIPE_FILE, "data", "twice")),
    "an unknown section": (RECIPE + "trainers: {}\n", refused(RECIPE_FILE, "trainers", "trainer?")),
    "an unknown key": (RECIPE + "model2: 1\n", refused(RECIPE_FILE, "model2")),
    "a key that is a number": (RECIPE + "1: 2\n", refused(RECIPE_FILE, "1")),
    "a key that is null": (RECIPE + "null: 2\n", refused(RECIPE_FILE)),
    "a key that is a list": (RECIPE + "? [a, b]\n: 2\n", refused(RECIPE_FILE)),
    "a key that is a mapping": (RECIPE + "? {a: b}\n: 2\n", refused(RECIPE_FILE)),
    "a key that is a date": (RECIPE + "2024-01-01: 2\n", refused(RECIPE_FILE)),
    "a date that does not exist": ("seed: 2024-13-45\n", refused(RECIPE_FILE)),
    "an alias without an anchor": ("data: *x\n", refused(RECIPE_FILE, "x")),
    "aliases of one section": (
        RECIPE + "checkpoint: &c {}\ntracking: *c\n",
        accepted("YAML allows it"),
    ),
    "a merge key": (
        "data: &d {dataset: digits}\nmodel:\n  <<: *d\n",
        refused(RECIPE_FILE, "model.dataset"),
    ),
    "a merge key of a number": ("data:\n  <<: 1\n", refused(RECIPE_FILE)),
    "a billion laughs": (_BOMB + "\n", refused(RECIPE_FILE)),
    "a billion laughs under a known key": (
        _BOMB + "\ndata: {dataset: *a8}\n",
        refused(RECIPE_FILE),
    ),
    "a billion laughs as an argument": (
        _BOMB + "\noptimizer: {dampening: *a8}\n",
        refused(RECIPE_FILE),
    ),
    "a list that contains itself": (
        "optimizer: {dampening: &x [*x]}\n",
        refused(RECIPE_FILE, "itself"),
    ),
    "a mapping that contains itself": ("data: &x\n  dataset: *x\n", refused(RECIPE_FILE, "itself")),
    "2,000 nested lists": ("seed: " + 2000 * "[" + 2000 * "]" + "\n", refused(RECIPE_FILE)),
    "100,000 nested lists": ("seed: " + 100_000 * "[" + "\n", refused(RECIPE_FILE)),
    "nested mappings": ("seed: " + 900 * "{a: " + 900 * "}" + "\n", refused(RECIPE_FILE)),
    "200,000 keys": (
        "".join(f"k{i}: 1\n" for i in range(20_000)),
        refused(RECIPE_FILE, "k0"),
    ),
    "a Python object": (
        "seed: !!python/object/apply:os.system ['touch owned']\n",
        refused(RECIPE_FILE, "python/object"),
    ),
    "an unknown tag": ("seed: !seed 1\n", refused(RECIPE_FILE, "!seed")),
    "a set": ("seed: !!set {1, 2}\n", refused(RECIPE_FILE, "seed")),
    "ordered pairs": ("seed: !!omap [a: 1]\n", refused(RECIPE_FILE, "seed")),
    "a directive of a later YAML": ("%YAML 9.9\n---\nseed: 1\n", refused(RECIPE_FILE)),
    "bytes that are not UTF-8": (b"seed: \xff\xfe\xfa\n", refused(RECIPE_FILE)),
    "Latin-1": ("run_dir: caf\u00e9\n".encode("latin-1"), refused(RECIPE_FILE)),
    "UTF-16": (RECIPE.encode("utf-16"), refused(RECIPE_FILE)),
    "a byte order mark": (b"\xef\xbb\xbf" + RECIPE.encode(), accepted("editors on Windows")),
    "CRLF": (RECIPE.replace("\n", "\r\n"), accepted("editors on Windows")),
    "CR": (RECIPE.replace("\n", "\r"), accepted("is YAML")),
    "a NUL": ("seed: 1\0\n", refused(RECIPE_FILE)),
    "control characters": ("seed: \x1b[31m1\n", refused(RECIPE_FILE)),
    "an escape sequence as a value": ('seed: "\\e[31mred"\n', refused("seed")),
    "a PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", refused(RECIPE_FILE)),
    "markup in a key": (RECIPE + "'[/x]': 1\n", refused("[/x]")),
    "a value of a million characters": ("seed: " + 1_000_000 * "x" + "\n", refused("seed")),
    "a key of a million characters": (1_000_000 * "x" + ": 1\n", refused(RECIPE_FILE)),
    "a quoted key of a million characters": (
        '? "' + 1_000_000 * "x" + '"\n: 1\n',
        refused(RECIPE_FILE),
    ),
    "a run_dir with no text": (RECIPE + "run_dir:\n", accepted("an override gives it")),
}

OVERRIDES: dict[tuple[str, ...], Expected] = {
    ("",): refused("section.key=value"),
    ("=",): refused("section.key=value"),
    ("=1",): refused("section.key=value"),
    ("seed",): refused("seed", "section.key=value"),
    ("seed=",): refused("seed"),
    (".seed=1",): refused("section.key=value"),
    ("data.=1",): refused("section.key=value"),
    ("data..root=1",): refused("section.key=value"),
    ("--seed=1",): refused("--seed"),
    ("-h",): refused("-h"),
    ("seed==1",): refused("seed"),
    ("seed =1",): refused("seed"),
    (" seed=1",): refused("seed"),
    ("Seed=1",): refused("Seed", "seed"),
    ("seed.x=1",): refused("seed"),
    ("data.root.x=1",): refused("data.root"),
    ("data=1", "data.root=x"): refused("data"),
    ("optimizer.momentun=0.9",): refused("momentun", "momentum?"),
    ("trainer.epoch=1",): refused("epoch", "epochs?"),
    ("lr_dropout.keep=0.5",): refused("keep", "keep_prob?"),
    ("optimizer.groups.0.lr=1",): refused("optimizer.groups"),
    ("schedule.lr=1",): refused("schedule.lr"),
    ("seed=" + 3000 * "[",): refused("seed"),
    ("seed=" + 3000 * "[" + 3000 * "]",): refused("seed"),
    ("seed=" + 100_000 * "x",): refused("seed"),
    (100_000 * "x" + "=1",): refused("xxx"),
    (".".join(2000 * ["x"]) + "=1",): refused("x.x"),
    ("seed=&x [*x]",): refused("seed"),
    ("seed=*x",): refused("seed"),
    ("seed=1 # one",): accepted("a comment"),
    ("seed=!!python/name:os.system",): refused("seed"),
    ("seed=1\n2",): refused("seed"),
    ("seed=1", "seed=2"): accepted("the last one counts"),
    ("[/x]=1",): refused("[/x]"),
    ("seed=[/x]",): refused("seed"),
    ("caf\u00e9=1",): refused("caf\u00e9"),
    ("seed=1", "RECIPE2.yaml"): refused("RECIPE2.yaml"),
}


def inputs() -> list[Input]:
    found = []
    for name, (content, expected) in FILES.items():
        raw = content.encode() if isinstance(content, str) else content
        overrides: tuple[str, ...] = ()
        if expected.statuses == (0,):
            # An empty recipe trains ResNet-34 for an epoch.
            overrides = (
                "model.arch=resnet18",
                "model.width=2",
                "trainer.max_steps=1",
                "trainer.device=cpu",
                "lr_dropout=null",
            )
        command = training(*overrides)
        found.append(Input("recipe files", name, expected, command, prepare=_write(raw)))

    for arguments, expected in OVERRIDES.items():
        name = " ".join(arguments)[:60].replace("\n", "\\n") or "nothing"
        name = f"{name} ({sum(map(len, arguments))} characters)"
        found.append(Input("overrides", name, expected, training(*arguments)))

    paths: dict[str, tuple[Callable[[Path], None], Expected]] = {
        "is missing": (lambda folder: (folder / RECIPE_FILE).unlink(), refused(RECIPE_FILE)),
        "is a folder": (_make_folder, refused(RECIPE_FILE)),
        "is a FIFO": (_make_fifo, refused(RECIPE_FILE)),
        "is a link to itself": (_make_loop, refused(RECIPE_FILE)),
        "is 200 MB": (_make_large, refused(RECIPE_FILE)),
    }
    for name, (prepare, expected) in paths.items():
        found.append(Input("recipe files", name, expected, training(), prepare=prepare))

    for name, path in {
        "a path with a NUL": "a\0b.yaml",
        "a path of 5,000 characters": 5000 * "x",
        "no path": "",
        "/dev/zero": "/dev/zero",
        "a URL": "https://localhost/recipe.yaml",
    }.items():
        word = path[:20].replace("\0", "")[:1]
        command = ("lrd.train", path, "run_dir=run")
        found.append(Input("recipe files", name, refused(word), command))
    return found


def _write(raw: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / RECIPE_FILE).write_bytes(raw)

    return write


def _make_folder(folder: Path) -> None:
    (folder / RECIPE_FILE).unlink()
    (folder / RECIPE_FILE).mkdir()


def _make_fifo(folder: Path) -> None:
    (folder / RECIPE_FILE).unlink()
    os.mkfifo(folder / RECIPE_FILE)


def _make_loop(folder: Path) -> None:
    (folder / RECIPE_FILE).unlink()
    (folder / RECIPE_FILE).symlink_to(RECIPE_FILE)


def _make_large(folder: Path) -> None:
    with (folder / RECIPE_FILE).open("wb") as stream:
        stream.truncate(200 << 20)
