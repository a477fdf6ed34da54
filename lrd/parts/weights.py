"""`model.weights`: a network starts from the weights in a safetensors file."""

from __future__ import annotations

import fnmatch
import hashlib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lrd import console
from lrd import recipe as recipes
from lrd.errors import UserError, first_line, summarize

SUFFIX = ".safetensors"

# What DDP and torch.compile put before all names.
_WRAPPERS = ("module.", "_orig_mod.")


def load_weights(model: nn.Module, section: recipes.Model) -> str:
    """Copy the weights in the file `model.weights` into a network.

    All tensors must be there and have the network's shapes, except those that a pattern in
    `model.reset` matches: they stay as they are. BatchNorm's count of batches may be missing, as
    torch allows it. Other floating-point types are converted to the network's.

    The file may be an export of lrd, or have the names of torchvision or timm. The prefixes of DDP
    and `torch.compile` are removed from names.

    Args:
        model: the network, whole and not under DDP.
        section: the recipe's `model`, with a file in `weights`.

    Returns:
        The file's SHA-256, in hexadecimal, by which ranks can compare their files.

    Raises:
        UserError: the file cannot be read, its tensors are not the network's, or a pattern matches
            nothing. The network is unchanged then.
    """
    assert section.weights is not None, "the recipe names no weights"
    path = Path(section.weights)
    data = _read(path)

    try:
        # They come in a random order, and ranks must report the same names.
        tensors = _remove_prefixes(dict(sorted(safetensors.torch.load(data).items())))
    except (SafetensorError, KeyError) as error:  # KeyError: a type that torch does not have
        raise UserError(f"model.weights: {path} is damaged: {first_line(error)}") from None

    targets = {
        name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)
    }
    left_out = _match_reset(section, path, [*targets, *tensors])
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    targets = {name: target for name, target in targets.items() if name not in left_out}

    _require_fit(section, path, tensors, targets)
    _report(path, tensors, targets, left_out)
    model.load_state_dict(tensors, strict=False)
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    """The bytes of a safetensors file.

    They are read once, so that the digest is that of the weights that were loaded.
    """
    try:
        if path.is_dir():
            raise UserError(f"model.weights: {path} is a folder; name the {SUFFIX} file in it")
        if path.suffix != SUFFIX:
            raise UserError(_describe_conversion(path))
        if path.exists() and not path.is_file():  # to read a named pipe would wait for its writer
            raise UserError(f"model.weights: {path} is not a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the name contains a NUL
        raise UserError(f"model.weights: {path} cannot be read: {first_line(error)}") from None


def _describe_conversion(path: Path) -> str:
    """How to convert a file that is no safetensors file, in one line for a shell."""
    code = (
        "import sys, torch, safetensors.torch as s; "
        "s.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])"
    )
    files = shlex.join([str(path), str(path.with_suffix(SUFFIX))])
    return (
        f"model.weights: {path} is no {SUFFIX} file; weights that torch.save wrote are converted "
        f'by: python -c "{code}" {files}'
    )


def _remove_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers that all names have."""
    while tensors:
        prefixes = [p for p in _WRAPPERS if all(name.startswith(p) for name in tensors)]
        if not prefixes:
            break
        tensors = {name.removeprefix(prefixes[0]): tensor for name, tensor in tensors.items()}
    return tensors


def _match_reset(section: recipes.Model, path: Path, names: Iterable[str]) -> set[str]:
    """The names that a pattern of `model.reset` matches.

    Args:
        section: the recipe's `model`.
        path: the file with the weights, for messages.
        names: of the tensors in the network and in the file.
    """
    names = list(names)
    left_out: set[str] = set()
    for pattern in section.reset_patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise UserError(
                f"model.reset: {pattern!r} matches no tensor of {section.arch} or {path}"
            )
        left_out.update(matching)
    return left_out


def _require_fit(
    section: recipes.Model, path: Path, tensors: dict[str, Tensor], targets: dict[str, Tensor]
) -> None:
    """Refuse weights that are not those of the network.

    Args:
        section: the recipe's `model`.
        path: the file, for messages.
        tensors: what was read from it, without what is left out.
        targets: the network's tensors, without what is left out.
    """
    if not targets:
        raise UserError(
            f"model.reset: leaves out all tensors of {path}; name only those that are not to be "
            "taken from it, e.g. fc.*, or leave out model.weights"
        )
    if not any(name in targets for name in tensors):
        raise UserError(
            f"model.weights: {path} has no tensor that {section.arch} would take; its first names "
            f"are {summarize(list(tensors)) or 'none'}, the network's {summarize(list(targets))}"
        )

    missing = [
        name
        for name in targets
        if name not in tensors and name.rpartition(".")[2] != "num_batches_tracked"
    ]
    unexpected = [name for name in tensors if name not in targets]
    misfits = [
        name
        for name, tensor in tensors.items()
        if name in targets and not _fits(tensor, targets[name])
    ]
    if not (missing or unexpected or misfits):
        return

    faults = []
    if misfits:
        described = [_describe_misfit(name, tensors[name], targets[name]) for name in misfits]
        faults.append(f"{len(misfits)} of other shape or type: {summarize(described)}")
    if missing:
        faults.append(f"{len(missing)} missing in the file: {summarize(missing)}")
    if unexpected:
        faults.append(f"{len(unexpected)} that the network does not have: {summarize(unexpected)}")
    raise UserError(
        f"model.weights: {path} does not fit {section.arch}: {'; '.join(faults)}; model.reset "
        f"leaves tensors out{_suggest_patterns([*misfits, *missing, *unexpected])}"
    )


def _fits(tensor: Tensor, target: Tensor) -> bool:
    return tensor.shape == target.shape and tensor.is_floating_point() == target.is_floating_point()


def _describe_misfit(name: str, tensor: Tensor, target: Tensor) -> str:
    if tensor.shape == target.shape:
        return f"{name} ({tensor.dtype} in the file, {target.dtype} in the network)"
    return f"{name} ({tuple(tensor.shape)} in the file, {tuple(target.shape)} in the network)"


def _suggest_patterns(names: Sequence[str]) -> str:
    """The patterns that would leave all these tensors out, if they are few."""
    patterns = sorted({f"{name.partition('.')[0]}.*" for name in names if "." in name})
    if not 0 < len(patterns) <= 2:
        return ""
    return f", e.g. model.reset='[{', '.join(patterns)}]'"


def _report(
    path: Path, tensors: dict[str, Tensor], targets: dict[str, Tensor], left_out: set[str]
) -> None:
    """Say what was loaded, what was left out, and what was converted."""
    reset = f"; reset: {summarize(sorted(left_out))}" if left_out else ""
    console.info(f"model.weights: {len(tensors)} tensors from {path}{reset}")

    for dtype in sorted({tensor.dtype for tensor in tensors.values()}, key=str):
        converted = [
            name
            for name, tensor in tensors.items()
            if tensor.dtype == dtype and targets[name].dtype != dtype
        ]
        if converted:
            network_dtype = targets[converted[0]].dtype
            console.info(
                f"model.weights: {len(converted)} tensors of {path} are {dtype}, converted to "
                f"{network_dtype}"
            )
