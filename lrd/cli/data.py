"""`lrd data verify`: a table of what a pack contains, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

from lrd import console
from lrd.data.streaming.packed import describe_bytes, verify_pack


def verify(root: Path) -> bool:
    """Compare a pack with its hashes, and print a row for each part.

    Args:
        root: the folder that contains the pack.

    Returns:
        Whether all of it is there and whole.

    Raises:
        UserError: there is no pack.
    """
    checks = verify_pack(root)
    rows = []
    for check in checks:
        bytes_per_image = check.num_bytes / check.num_images if check.num_images else 0.0
        rows.append(
            [
                check.part,
                f"{check.num_images:,}",
                describe_bytes(check.num_bytes),
                f"{bytes_per_image:,.0f}",
                "no" if check.faults else "yes",
            ]
        )
    console.table(str(root), ["part", "images", "size", "bytes per image", "ok"], rows)

    for check in checks:
        for fault in check.faults:
            console.error(fault)
    return not any(check.faults for check in checks)
