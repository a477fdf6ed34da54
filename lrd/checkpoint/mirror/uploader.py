"""The thread that copies checkpoints and records to the mirror while training goes on."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrd import console
from lrd import recipe as recipes
from lrd.checkpoint import manifest, store, transfer
from lrd.checkpoint.mirror.claim import Claim, LostClaimError
from lrd.checkpoint.mirror.layout import (
    DAMAGED_FILE,
    RECORDS_FILE,
    folder_name,
    sort_by_step,
    whole_steps,
)
from lrd.checkpoint.mirror.remote import KEY, RemoteError
from lrd.distributed import network
from lrd.errors import describe_os_error

UPLOAD_SECONDS_AT_STOP = 20.0  # to wait for the last upload at a stop: launchers kill after 30 s
UPLOAD_SECONDS_AT_ERROR = 5.0  # the same when the run has failed, and may be started again at once
UPLOAD_SECONDS_AT_END = 300.0  # the same at the end of the run

_STAGING_NAME = ".mirror-upload"  # in the run directory
_FIRST_DELAY = 1.0  # seconds before a failed upload is tried again; doubled each time
_MAX_DELAY = 60.0
_HURRIED_DELAY = 2.0  # at the end of a run
_SECONDS_BEFORE_MESSAGE = 1.0
_SECONDS_TO_LEAVE = 5.0  # that the thread has to tell the mirror that the run ended


class Uploader:
    """Copies the checkpoints of one run to its mirror. Rank 0 makes one; the others must not.

    If a newer checkpoint comes before an upload could begin, the older one is not uploaded. Nobody
    waits for an upload but `finish`. What is to be uploaded is held by hard links, so the writer
    may delete it from the run directory meanwhile.

    Args:
        claim: the right to write to the mirror.
        run_dir: the run directory.
        section: the recipe's `checkpoint`.
        report: is called, from the thread, with a line when an upload fails after some that did
            not.

    Attributes:
        uploaded_step: of the newest checkpoint that is whole in the mirror; None before the first.
    """

    def __init__(
        self,
        claim: Claim,
        run_dir: Path,
        section: recipes.Checkpoint,
        report: Callable[[str], None],
    ) -> None:
        self.claim = claim
        self.remote = claim.remote
        self.run_dir = run_dir
        self.section = section
        self.report = report
        self.uploaded_step: int | None = None

        self._cannot_delete = False
        self._staging = run_dir / _STAGING_NAME
        shutil.rmtree(self._staging, ignore_errors=True)  # of a start that was killed
        self._uploaded_records: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

        # What follows is read and changed with the condition held.
        self._condition = threading.Condition()
        self._offered_step: int | None = None  # the latest
        self._wanted_step: int | None = None  # the same, until it is done
        self._best_step: int | None = None
        self._last_error = ""
        self._is_closing = False
        self._has_ended = False

        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def offer(self, step: int, best_step: int | None) -> None:
        """Have a checkpoint of the run directory uploaded. Returns at once.

        Args:
            step: of a checkpoint that is published.
            best_step: the step of the best checkpoint, which is kept; None if there is none.
        """
        with self._condition:
            self._offered_step = step
            if self._has_ended:
                return
            try:
                self._stage(step)
            except OSError as error:
                self._last_error = describe_os_error(error)
                self.report(self._describe_failure(step))
                return
            self._wanted_step = step
            self._best_step = best_step
            self._condition.notify_all()

    def finish(self, seconds: float, is_stopping: Callable[[], bool]) -> str | None:
        """Wait until the latest checkpoint is uploaded, but not forever.

        Args:
            seconds: to wait at most.
            is_stopping: whether a signal has come; from then on at most UPLOAD_SECONDS_AT_STOP are
                left.

        Returns:
            A line if it is not uploaded.
        """
        start = time.monotonic()
        deadline = start + seconds
        has_seen_stop = False
        was_reported = False

        with self._condition:
            self._is_closing = True
            self._condition.notify_all()  # a failed upload is tried again now

            while self._wanted_step is not None and not self._has_ended:
                now = time.monotonic()

                # Launchers kill a while after the signal, however much time was left before.
                if is_stopping() and not has_seen_stop:
                    has_seen_stop = True
                    deadline = min(deadline, now + UPLOAD_SECONDS_AT_STOP)
                if now >= deadline:
                    break

                # Most uploads end at once, and need no line.
                if now - start > _SECONDS_BEFORE_MESSAGE and not was_reported:
                    was_reported = True
                    console.info(
                        f"{self.remote.url}: waiting up to {deadline - start:.0f} s for the upload "
                        f"of step {self._wanted_step}"
                    )
                self._condition.wait(0.1)

            # `_wanted_step` does not tell: it is given up if another start has the mirror.
            if self._offered_step is None or self.uploaded_step == self._offered_step:
                return None
            reason = self._last_error or f"was not done within {time.monotonic() - start:.0f} s"
            return (
                f"{KEY}: the checkpoint of step {self._offered_step} is not in {self.remote.url}: "
                f"{reason}; it is in {self.run_dir}, whose next start uploads it"
            )

    def close(self) -> None:
        """End the thread, and tell the mirror that this start has ended."""
        with self._condition:
            is_stuck = self._wanted_step is not None  # `finish` has waited long enough
            self._is_closing = True
            self._wanted_step = None
            self._condition.notify_all()
        if not is_stuck:
            self._thread.join(_SECONDS_TO_LEAVE)
        self.claim.close()
        if self._thread.is_alive():  # it waits for a server that does not answer
            network.abandon(self._thread)
        shutil.rmtree(self._staging, ignore_errors=True)

    def _run(self) -> None:
        """Upload what is wanted. Runs in the thread."""
        try:
            self._upload_until_closed()
            self.claim.release()
        finally:
            with self._condition:
                self._has_ended = True
                self._condition.notify_all()

    def _upload_until_closed(self) -> None:
        delay = _FIRST_DELAY
        is_failing = False
        while (step := self._next_step()) is not None:
            try:
                self._upload(step)
                self._upload_best(step)
                self._delete_old(step)
            except LostClaimError as error:
                self._give_up(str(error))
                return
            except (RemoteError, OSError) as error:
                reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
                with self._condition:
                    self._last_error = reason
                    if self._is_closing and self._wanted_step is None:
                        return  # `close` did not wait for this
                if not is_failing:
                    self.report(self._describe_failure(step))
                is_failing = True
                self._wait(delay)
                delay = min(2 * delay, _MAX_DELAY)
                continue

            if is_failing:
                console.info(f"{self.remote.url}: works again, has the checkpoint of step {step}")
            is_failing = False
            delay = _FIRST_DELAY
            self._end_step(step)

    def _next_step(self) -> int | None:
        """Wait for a checkpoint to upload; None at the end."""
        with self._condition:
            while self._wanted_step is None and not self._is_closing:
                self._condition.wait()
            return self._wanted_step

    def _wait(self, delay: float) -> None:
        """Wait before another try; at the end of a run only for a moment."""
        deadline = time.monotonic() + delay
        hurried_deadline = time.monotonic() + min(delay, _HURRIED_DELAY)
        with self._condition:
            while time.monotonic() < (hurried_deadline if self._is_closing else deadline):
                if self._is_closing and self._wanted_step is None:
                    return
                self._condition.wait(0.1)

    def _end_step(self, step: int) -> None:
        with self._condition:
            self._last_error = ""
            if self._wanted_step == step:
                self._wanted_step = None
            self._condition.notify_all()
            for folder in self._staging.glob("step-*"):
                if self._wanted_step is None or folder.name != store.checkpoint_name(
                    self._wanted_step
                ):
                    shutil.rmtree(folder, ignore_errors=True)

    def _give_up(self, line: str) -> None:
        """Another start has the mirror, so this one must not write there any more."""
        with self._condition:
            self._last_error = line.removeprefix(f"{KEY}: ")
            self._wanted_step = None
        self.report(line)

    def _describe_failure(self, step: int) -> str:
        line = (
            f"{KEY}: the checkpoint of step {step} could not be uploaded to {self.remote.url}: "
            f"{self._last_error}"
        )
        return line if self.section.on_error == "stop" else f"{line}; trying again"

    def _stage(self, step: int) -> Path:
        """Hold the files of a checkpoint, whatever becomes of it in the run directory.

        Raises:
            OSError: it is not there, or the disk is full.
        """
        source = store.checkpoint_path(self.run_dir, step)
        target = self._staging / source.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in source.iterdir():
            try:
                os.link(path, target / path.name)
            except OSError:  # a file system without hard links
                shutil.copy2(path, target / path.name)
        return target

    def _upload(self, step: int) -> None:
        """Upload one checkpoint and the records, the manifest last, unless it is there already."""
        folder = self._staging / store.checkpoint_name(step)
        damage = store.find_damage(folder)
        if damage is not None:
            path = store.checkpoint_path(self.run_dir, step)
            raise OSError(None, f"damaged: {damage}", str(path))

        content = (folder / manifest.NAME).read_bytes()
        files = manifest.read_files(folder)
        name = folder_name(step)

        # It may be there already; or one of this step that was written anew since.
        remote_sizes = sort_by_step(self.remote.list_objects()).get(step, {})
        if manifest.NAME in remote_sizes:
            has_same_sizes = all(remote_sizes.get(file) == files[file]["bytes"] for file in files)
            if has_same_sizes and self.remote.read(f"{name}/{manifest.NAME}") == content:
                self._note_uploaded(step)
                return
            self.claim.require_held()
            self.remote.delete([f"{name}/{manifest.NAME}"])

        # Records first: they may contain later steps than a checkpoint, but not fewer.
        self.claim.require_held()
        records = self._upload_records()
        for file in files:
            self.remote.upload(folder / file, f"{name}/{file}")
        self.remote.write(f"{name}/{RECORDS_FILE}", manifest.render(step, records).encode())

        remote_sizes = sort_by_step(self.remote.list_objects(name)).get(step, {})
        for file in files:
            if remote_sizes.get(file) != files[file]["bytes"]:
                raise RemoteError(
                    f"{file} has {remote_sizes.get(file, 0)} bytes there, "
                    f"not {files[file]['bytes']}"
                )

        # From here on readers see it.
        self.claim.require_held()
        self.remote.write(f"{name}/{manifest.NAME}", content)
        self._note_uploaded(step)

    def _note_uploaded(self, step: int) -> None:
        with self._condition:
            self.uploaded_step = max(step, self.uploaded_step or 0)

    def _upload_records(self) -> dict[str, Any]:
        """Upload the event files and `metrics.csv` that have changed.

        Returns:
            For each of them its size and SHA-256 as it was uploaded.
        """
        entries = {}
        for path in sorted(transfer.record_files(self.run_dir)):
            if not path.is_file():
                continue
            status = path.stat()
            version = (status.st_size, status.st_mtime_ns)
            uploaded = self._uploaded_records.get(path.name)
            if uploaded is None or uploaded[0] != version:
                # A copy, because the run goes on writing.
                copied = self._staging / path.name
                shutil.copyfile(path, copied)
                entry = manifest.measure(copied)
                self.remote.upload(copied, path.name)
                copied.unlink()
                uploaded = self._uploaded_records[path.name] = (version, entry)
            entries[path.name] = uploaded[1]
        return entries

    def _upload_best(self, step: int) -> None:
        """Upload the best checkpoint if it was passed over, unless a newer one waits."""
        with self._condition:
            best_step = self._best_step
        if best_step is None or self._has_newer_than(step):
            return

        whole = whole_steps(sort_by_step(self.remote.list_objects()))
        if best_step not in whole and store.checkpoint_path(self.run_dir, best_step).is_dir():
            self._stage(best_step)
            self._upload(best_step)

    def _delete_old(self, step: int) -> None:
        """Delete old checkpoints, unless a newer one waits to be uploaded.

        As in the run directory, these are kept: the newest `keep_last`, the best one, and as many
        as it takes to have store.MIN_VALID. Each was verified before its manifest was uploaded. If
        they cannot be deleted, a line says so: `step` has been uploaded all the same.
        """
        with self._condition:
            best_step = self._best_step
        if self._has_newer_than(step):
            return

        try:
            by_step = sort_by_step(self.remote.list_objects())
            num_kept = max(self.section.keep_last, store.MIN_VALID)
            kept = {*whole_steps(by_step)[-num_kept:], best_step, step}
            for old_step, files in by_step.items():
                is_damaged = manifest.NAME not in files and DAMAGED_FILE in files
                if old_step not in kept and not is_damaged:
                    self.claim.require_held()
                    self._delete(old_step, set(files))
        except RemoteError as error:
            if not self._cannot_delete:
                console.error(
                    f"{KEY}: old checkpoints in {self.remote.url} could not be deleted: {error}; "
                    "trying again after the next upload"
                )
            self._cannot_delete = True
        else:
            self._cannot_delete = False

    def _delete(self, step: int, files: set[str]) -> None:
        """Delete the files of a checkpoint, the manifest first."""
        names = sorted(files, key=lambda file: (file != manifest.NAME, file))
        self.remote.delete([f"{folder_name(step)}/{file}" for file in names])

    def _has_newer_than(self, step: int) -> bool:
        """Whether another checkpoint than `step` waits to be uploaded."""
        with self._condition:
            return self._wanted_step != step
