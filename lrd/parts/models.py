"""Recipe -> network: lrd's ResNets, a classifier of torchvision or timm, or the user's own.

A network that is not lrd's is checked before the run: two calls give the same weights, two images
give two rows of logits, and a backward pass reaches every parameter.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lrd import recipe as recipes
from lrd.errors import UserError, first_line, summarize
from lrd.generators import preserved_generators, seeded_generators
from lrd.optim.tensor_bits import as_integers
from lrd.parts.random_layers import read_generators
from lrd.parts.resnet import ARCHITECTURES, ResNet, require_memory_of_resnet
from lrd.recipe import named
from lrd.torchvision_compat import torchvision

_KEY = "model.arch"

# Arguments with which torchvision and timm download weights or read them from a pickle.
_SOURCES_OF_WEIGHTS = re.compile(r"pretrained.*|weights.*|checkpoint_path|cache_dir")

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_UNEXPECTED_ARGUMENT = re.compile(r"unexpected keyword argument '(\w+)'")


def build_model(section: recipes.Model, num_classes: int, seed: int) -> nn.Module:
    """The network that a recipe names, with weights that depend on `seed` alone.

    Args:
        section: the recipe's `model`.
        num_classes: size of the output, unless the recipe gives one.
        seed: of the initial weights. The global generators of torch, NumPy and Python are left as
            they were.

    Raises:
        UserError: there is no such network, it has no such argument, it cannot be built, or two
            calls give two networks.
    """
    num_classes = section.num_classes or num_classes
    if section.arch in ARCHITECTURES:
        assert section.width is not None, "the recipe fills in the default"
        require_memory_of_resnet(section.arch, num_classes, section.width)
        with seeded_generators(seed):
            return ResNet(section.arch, num_classes, section.width)

    function = _find_function(section.arch)
    arguments: dict[str, Any] = {"num_classes": num_classes, **section.arguments}
    if section.width is not None:
        arguments["width"] = section.width
    _check_arguments(section.arch, function, arguments)

    with seeded_generators(seed):
        model = _call(section.arch, function, arguments)
    with seeded_generators(seed):
        other = _call(section.arch, function, arguments)
    _require_same_weights(section.arch, model, other)
    return model


def _find_function(arch: str) -> Callable[..., Any]:
    """The function or class that builds a network which is not lrd's."""
    collection, _, name = arch.partition(":")

    if collection == "torchvision":
        names = torchvision.models.list_models(module=torchvision.models)
        _require_known(arch, name, names)
        return partial(torchvision.models.get_model, name, weights=None)

    if collection == "timm":
        timm = _import_timm(arch)
        # A name may end with that of pretrained weights, as in resnet50.a1_in1k.
        _require_known(arch, name.partition(".")[0], timm.list_models())
        return partial(timm.create_model, name, pretrained=False)

    return named.import_callable(arch, _KEY)


def _import_timm(arch: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        if error.name == "timm":
            raise UserError(
                f"{_KEY}: {arch} needs the package timm, which is not installed (pip install timm)"
            ) from None
        raise UserError(f"{_KEY}: {arch}: timm cannot be imported: {first_line(error)}") from None


def _require_known(arch: str, name: str, names: list[str]) -> None:
    if name not in names:
        collection = arch.partition(":")[0]
        matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f" (did you mean {', '.join(matches)}?)" if matches else ""
        raise UserError(f"{_KEY}: {arch}: {collection} has no classifier of this name{hint}")


def _check_arguments(arch: str, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Refuse arguments that the network does not have, or that bring weights with them."""
    package = re.split("[.:]", arch)[0]
    for key in arguments if package in named.MODEL_COLLECTIONS else ():
        if _SOURCES_OF_WEIGHTS.fullmatch(key):
            raise UserError(
                f"model.{key}: weights are not downloaded; "
                "name a .safetensors file with model.weights"
            )

    if not isinstance(function, partial):  # those of torchvision and timm pass all on
        named.check_arguments(arch, "model", function, arguments)


def _call(arch: str, function: Callable[..., Any], arguments: dict[str, Any]) -> nn.Module:
    """Build a network once; any error of its code becomes one line."""

    def build() -> Any:
        try:
            return function(**arguments)
        except TypeError as error:
            match = _UNEXPECTED_ARGUMENT.search(str(error))
            if match is None or match[1] not in arguments:
                raise
            if isinstance(function, partial):
                named.refuse_unknown(arch, "model", arguments, _list_arguments(type(function())))
            raise UserError(
                f"model.{match[1]}: {arch} has no such argument: {first_line(error)}"
            ) from None

    model = named.call_named(arch, _KEY, build)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{_KEY}: {arch} returns {_describe_type(model)}, should return a torch.nn.Module"
        )
    if isinstance(function, partial):
        # Some networks of torchvision ignore arguments that they do not know. timm may put another
        # class around a network, whose arguments say nothing.
        known = _list_arguments(type(model))
        if "num_classes" in known:
            named.refuse_unknown(arch, "model", arguments, known)
    _require_trainable(arch, model)
    return model


def _list_arguments(cls: Any) -> list[str]:
    """The arguments that a network of torchvision or timm can be given.

    They are those of its class. If it takes any argument, the functions of its module may have
    further ones.
    """
    parameters = dict(inspect.signature(cls).parameters)
    if any(item.kind == item.VAR_KEYWORD for item in parameters.values()):
        for item in vars(sys.modules[cls.__module__]).values():
            if inspect.isfunction(item) and item.__module__ == cls.__module__:
                parameters |= inspect.signature(item).parameters

    keyword_kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, item in parameters.items() if item.kind in keyword_kinds]


def _require_trainable(arch: str, model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"{_KEY}: {arch} has no parameters that can be trained")

    for name, tensor in [*parameters.items(), *model.named_buffers()]:
        if is_lazy(tensor) or tensor.is_meta:
            raise UserError(
                f"{_KEY}: {arch}: {name} has no values when the network is built; lazy modules "
                "and the device meta cannot be used here"
            )


def _require_same_weights(arch: str, model: nn.Module, other: nn.Module) -> None:
    """Refuse a network whose initial weights are not a function of the seed.

    Args:
        model: built after the generators were seeded.
        other: built in the same way once more.
    """
    first = _tensors(model)
    second = _tensors(other)
    if list(first) != list(second):
        differing = [name for name in [*first, *second] if name not in first or name not in second]
        what = f"only one has {differing[0]}" if differing else "their order differs"
        raise UserError(f"{_KEY}: {arch}: two calls give two networks: {what}")

    for name, tensor in first.items():
        if not _has_same_bits(tensor, second[name]):
            raise UserError(
                f"{_KEY}: {arch}: two calls give other values of {name}; draw them from torch's, "
                "NumPy's or Python's global generator, which is seeded before each call"
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers by name; a `state_dict` may contain other things too."""
    return {
        name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]
    }


def _has_same_bits(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(as_integers(first), as_integers(second))


# Checks of the forward and backward pass


def check_model(
    model: nn.Module, section: recipes.Model, image_shape: tuple[int, ...], num_classes: int
) -> None:
    """Run a network on two images, and refuse it if it does not give two rows of logits.

    A network that is not lrd's is run in training mode too, with a backward pass, because DDP waits
    for the gradients of all parameters. Weights, buffers, modes and generators are left as they
    were, and there are no gradients afterwards.

    Args:
        model: the network, on the device that it is for; not yet under DDP, sharded or compiled.
        section: the recipe's `model`.
        image_shape: of the data's images, (3, H, W).
        num_classes: size of the output, unless the recipe gives one.

    Raises:
        UserError: a pass fails, the output has another shape or is no tensor, or a parameter gets
            no gradient.
    """
    expected_shape = (2, section.num_classes or num_classes)
    device = next(model.parameters()).device
    # The same values on every rank and in every run, and no two pixels alike.
    images = torch.linspace(-1, 1, 2 * torch.Size(image_shape).numel(), device=device)
    images = images.view(2, *image_shape)  # float32 (2, 3, H, W)

    with preserved_generators(), _preserved_state(model):
        model.eval()
        generators = read_generators(device)
        with torch.no_grad():
            logits = _forward(section.arch, model, images)
        _check_logits(section.arch, logits, expected_shape, mode="eval")
        if read_generators(device) != generators:
            raise UserError(
                f"{_KEY}: {section.arch} draws random numbers in eval mode, so an evaluation could "
                "not be repeated"
            )
        if section.arch in ARCHITECTURES:
            return

        model.train()
        logits = _forward(section.arch, model, images)
        _check_logits(section.arch, logits, expected_shape, mode="training")
        named.call_named(f"{section.arch}: backward", _KEY, lambda: logits.sum().backward())
        _require_gradients(section.arch, model)


def _forward(arch: str, model: nn.Module, images: Tensor) -> Any:
    height, width = images.shape[2:]
    return named.call_named(
        f"{arch} on images of {height}x{width} pixels (data.image_size)",
        _KEY,
        lambda: model(images),
    )


def _check_logits(arch: str, logits: Any, expected_shape: tuple[int, int], mode: str) -> None:
    batch, num_classes = expected_shape
    expected = f"should be one tensor of shape ({batch}, {num_classes}) for {batch} images"

    if not isinstance(logits, Tensor):
        # torchvision's GoogLeNet and Inception return several, in training mode alone.
        fields = getattr(logits, "_fields", ())
        hint = "; set model.aux_logits=false" if "aux_logits" in " ".join(fields) else ""
        what = _describe_type(logits)
        raise UserError(f"{_KEY}: {arch} gives {what} in {mode} mode, {expected}{hint}")
    if logits.shape != expected_shape:
        raise UserError(f"{_KEY}: {arch} gives {tuple(logits.shape)}, {expected}")
    if not logits.is_floating_point():
        raise UserError(f"{_KEY}: {arch} gives {logits.dtype}, {expected} and of a float type")


def _require_gradients(arch: str, model: nn.Module) -> None:
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if unused:
        raise UserError(
            f"{_KEY}: {arch}: no gradient reaches {summarize(unused)}; a parameter that is not "
            "trained needs requires_grad=False"
        )


@contextmanager
def _preserved_state(model: nn.Module) -> Iterator[None]:
    """Put buffers and modes back after this context, and drop gradients."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, values in buffers:
            module._buffers[name] = buffer  # a forward pass may have put another tensor there
            buffer.copy_(values)
        model.zero_grad(set_to_none=True)


def _describe_type(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"


# Sharding


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of a network that are gathered one at a time if it is sharded, in their order.

    They are the modules in an `nn.Sequential`, `nn.ModuleList` or `nn.ModuleDict` whose class
    occurs there at least twice: the residual blocks of a ResNet, the layers of a transformer. Of
    blocks within blocks the outer ones count. Single layers are left to the whole network.
    """
    candidates = [
        child
        for module in model.modules()
        if isinstance(module, _CONTAINERS)
        for child in module.children()
        if type(child) not in _CONTAINERS and any(True for _ in child.children())
    ]
    counts = Counter(type(child) for child in candidates)
    repeated = {id(child) for child in candidates if counts[type(child)] > 1}
    return list(_outermost(model, repeated))


def _outermost(module: nn.Module, chosen: set[int]) -> Iterator[nn.Module]:
    """The modules of a network with these ids, without those within others."""
    for child in module.children():
        if id(child) in chosen and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _outermost(child, chosen)
