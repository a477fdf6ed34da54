"""Results of somebody else that a study shows beside its own, from a JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrd.errors import UserError

Accuracies = Annotated[list[Annotated[float, Field(ge=0.0, le=1.0)]], Field(min_length=1)]


class _File(BaseModel):
    """What such a file says: where it is from, and accuracies after each epoch, from 0 to 1."""

    model_config = ConfigDict(extra="ignore")

    source: str
    test_accuracy: Accuracies
    train_accuracy: Accuracies


@dataclass(frozen=True)
class Published:
    """One training run of somebody else.

    Attributes:
        name: what the report calls it.
        source: where it was published.
        test_accuracy: epoch, from 1 -> accuracy from 0 to 1.
        train_accuracy: the same for training.
    """

    name: str
    source: str
    test_accuracy: dict[int, float]
    train_accuracy: dict[int, float]

    def describe(self) -> str:
        """Its figures in one line."""
        num_epochs = len(self.test_accuracy)
        last = self.test_accuracy[num_epochs]
        best = max(self.test_accuracy.values())
        return (
            f"{self.name}: {100 * last:.2f} after the last of {num_epochs} epochs, best "
            f"{100 * best:.2f} (n = 1). Not run here: {self.source}."
        )


def read_published(study_file: Path, files: dict[str, str]) -> list[Published]:
    """Read the files that a study names.

    Args:
        study_file: the study file; the others are relative to it.
        files: name -> path.

    Raises:
        UserError: a file is missing, is no JSON, or lacks a key. The line names study and file.
    """
    published = []
    for name, relative in files.items():
        path = study_file.parent / relative
        at = f"{study_file}: published.{name}: {path}"
        try:
            content = _File.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{at}: cannot be read: {error.strerror}") from None
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(str(part) for part in fault["loc"]) or "file"
            raise UserError(f"{at}: {key}: {fault['msg']}") from None
        except ValueError:
            raise UserError(f"{at}: is not JSON") from None

        published.append(
            Published(
                name,
                content.source,
                dict(enumerate(content.test_accuracy, start=1)),
                dict(enumerate(content.train_accuracy, start=1)),
            )
        )
    return published
