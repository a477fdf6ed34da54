"""Own parts, which a recipe names as `module:attribute`, such as `my_package.nets:build`.

The module is imported from the Python path and from the folder in which the command was started.
Nothing is imported from a URL, and no name that stands in a checkpoint is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import lrd
from lrd.errors import UserError, describe_error, did_you_mean, first_line
from lrd.recipe.schema import Recipe, SequentialLR, is_own

_PATTERN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

# Collections of networks that `model.arch` names by a prefix; these are no modules of the user.
MODEL_COLLECTIONS = ("torchvision", "timm")


def import_named(name: str, key: str) -> Any:
    """Import what a recipe names.

    Args:
        name: `module:attribute`; both may contain dots.
        key: the key of the recipe that has this value, for messages.

    Raises:
        UserError: there is no such module or attribute, or the module fails while it is imported.
    """
    if not _PATTERN.fullmatch(name):
        raise UserError(
            f"{key}: is {name!r}, an own part is named module:attribute, e.g. my_package.nets:build"
        )

    module_name, _, attribute = name.partition(":")
    _search_working_folder()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: {name}: {_describe_missing(error, module_name)}") from None
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        where = last_line_in_file(error)
        raise UserError(
            f"{key}: {name}: {module_name} cannot be imported: {describe_error(error)}{where}"
        ) from None

    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [item for item in dir(found) if not item.startswith("_")]
            hint = did_you_mean(part, names, cutoff=0.6)
            file = getattr(sys.modules[module_name], "__file__", None)
            where = "" if file is None or _is_below(Path(file), Path.cwd()) else f" ({file})"
            raise UserError(f"{key}: {name}: {module_name}{where} has no {attribute}{hint}")
        found = getattr(found, part)
    return found


def import_callable(name: str, key: str) -> Callable[..., Any]:
    """Import a function or class that a recipe names.

    Raises:
        UserError: as `import_named`, or what is found cannot be called.
    """
    found = import_named(name, key)
    if not callable(found):
        kind = type(found).__name__
        raise UserError(f"{key}: {name} is of type {kind}, not a function or class")
    result: Callable[..., Any] = found
    return result


def check_arguments(
    name: str,
    section: str,
    function: Callable[..., Any],
    arguments: Collection[str],
    num_positional: int = 0,
) -> None:
    """Refuse arguments that a function or class does not have, and name those that it needs.

    Args:
        name: what the recipe names, for messages.
        section: the section of the recipe that has the arguments as its keys.
        function: what `name` stands for.
        arguments: the names of the keyword arguments it is to be called with.
        num_positional: how many arguments it gets before these, which no key may name.

    Raises:
        UserError: with a line for each fault.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):  # some functions written in C have no signature
        return

    by_kind = inspect.Parameter
    keyword_kinds = (by_kind.POSITIONAL_OR_KEYWORD, by_kind.KEYWORD_ONLY)
    named = [key for key, parameter in parameters.items() if parameter.kind in keyword_kinds]
    accepted = named[num_positional:]
    if not any(parameter.kind == by_kind.VAR_KEYWORD for parameter in parameters.values()):
        refuse_unknown(name, section, arguments, accepted)

    missing = [
        key for key in accepted if parameters[key].default is by_kind.empty and key not in arguments
    ]
    if missing:
        raise UserError(
            "\n".join(f"{section}.{key}: is missing, {name} needs it" for key in missing)
        )


def refuse_unknown(name: str, section: str, arguments: Iterable[str], known: list[str]) -> None:
    """Refuse arguments that are not among the known ones.

    Args:
        name, section, arguments: as for `check_arguments`.
        known: the arguments that there are.

    Raises:
        UserError: with a line for each unknown argument.
    """
    has = f"it has {', '.join(known)}" if known else "it has none"
    lines = [
        f"{section}.{key}: {name} has no such argument{did_you_mean(key, known)}; {has}"
        for key in arguments
        if key not in known
    ]
    if lines:
        raise UserError("\n".join(lines))


def call_named(name: str, key: str, function: Callable[..., Any], /, **arguments: Any) -> Any:
    """Call what a recipe names; whatever it raises becomes one line.

    Raises:
        UserError: the call fails; the line names key, error and the line of the user's file.
    """
    try:
        return function(**arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        where = last_line_in_file(error)
        raise UserError(f"{key}: {name} failed: {describe_error(error)}{where}") from None


def named_parts(recipe: Recipe) -> dict[str, str]:
    """The own parts that a recipe names: key -> name."""
    names = {
        "model.arch": recipe.model.arch,
        "data.dataset": recipe.data.dataset,
        "optimizer.name": recipe.optimizer.name,
        "schedule.name": recipe.schedule.name,
        "trainer.loss": recipe.trainer.loss,
    }
    if isinstance(recipe.schedule, SequentialLR):
        for i, section in enumerate(recipe.schedule.schedules):
            names[f"schedule.schedules.{i}.name"] = section.name
    return {key: name for key, name in names.items() if is_own(name)}


def describe_sources(recipe: Recipe) -> dict[str, str]:
    """What the ranks compare before they start: key -> the source of the own part it names.

    An own part that cannot be imported here is described as such and raises nothing: the ranks
    meet first, and then each of them reports it.
    """
    return {
        f"{key} ({name})": describe_source(name, key) for key, name in named_parts(recipe).items()
    }


def describe_source(name: str, key: str) -> str:
    """A digest of the source files of an own part, or the version of the package it is from."""
    module_name = name.partition(":")[0]
    top = module_name.partition(".")[0]
    if top in MODEL_COLLECTIONS:
        return _describe_version(top)

    try:
        import_named(name, key)
    except UserError as error:
        return str(error)
    return source_digest(_source_folder(module_name))


def source_digest(path: Path | None) -> str:
    """A digest of a Python file, or of all Python files in a folder.

    Args:
        path: None: something without a source, such as a built-in module.
    """
    if path is None:
        return "no source file"

    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path.parent)).encode(errors="surrogateescape"))
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _source_folder(module_name: str) -> Path | None:
    """The folder of the package that contains an imported module, or the module's own file.

    A part may use other files of its package, so all of them count.
    """
    top = sys.modules[module_name.partition(".")[0]]
    file = getattr(top, "__file__", None) or getattr(sys.modules[module_name], "__file__", None)
    if file is None:
        return None
    path = Path(file)
    return path.parent if path.name == "__init__.py" else path


def _describe_version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"


def _search_working_folder() -> None:
    """Let the folder in which the command was started be searched, as `python -m` does.

    The command `lrd` is a script: without this only the folder of the script would be searched.
    """
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)


def _describe_missing(error: ModuleNotFoundError, module_name: str) -> str:
    missing = error.name or first_line(error)
    is_itself = module_name == missing or module_name.startswith(f"{missing}.")
    if not is_itself:
        return f"{module_name} cannot be imported: it needs {missing}, which is not installed"
    return (
        f"there is no module {missing} on the Python path; "
        "start in the folder that contains it, or set PYTHONPATH"
    )


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder and is no installed package there, as in `.venv`."""
    return path.is_relative_to(folder) and "site-packages" not in path.parts


def last_line_in_file(error: BaseException) -> str:
    """Where the user's code raised an error, as ` (nets.py, line 12)`; empty if it did not."""
    traceback = error.__traceback__
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"

    where = ""
    folders = (Path(lrd.__file__).parent, sysconfig.get_path("stdlib"))
    not_users = tuple(f"{folder}{os.sep}" for folder in folders)
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        is_users = "importlib" not in file and not file.startswith(not_users)
        # The last line in the user's own files: what torch raises, the user's line has caused.
        if is_users and "site-packages" not in file:
            where = f" ({Path(file).name}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return where
