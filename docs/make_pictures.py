"""Draw docs/house.svg, the picture of the package's folders: python docs/make_pictures.py"""

from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH = 1010
FLOOR_HEIGHT = 74
GAP = 12
LEFT = 118  # space for the names of the floors
RIGHT = 64  # space for the arrow
TOP = 74


class Room(NamedTuple):
    """One folder or file."""

    name: str
    purpose: str
    share: float  # of the floor's width, relative to the others on it


class Floor(NamedTuple):
    label: str
    color: str
    rooms: list[Room]


FLOORS = [
    Floor("9 command", "#eef2fd", [Room("cli/", "the lrd command: tables and plots of runs", 1)]),
    Floor("8 again", "#e8eefc", [Room("replay/", "steps of a run again: verify, diff, fork", 1)]),
    Floor(
        "7 loop",
        "#d9e4fb",
        [
            Room("train.py", "the training loop, in the order of the algorithm", 1.5),
            Room("inference/", "trained networks in use", 1),
            Room("study/", "arms and seeds", 0.8),
        ],
    ),
    Floor(
        "6 job",
        "#e2f3ea",
        [Room("job/", "recipe → job: its parts and state, evaluation, progress", 1)],
    ),
    Floor(
        "5 state",
        "#d3ecdf",
        [
            Room("checkpoint/", "write, verify, resume, copy between hosts", 3),
            Room("doctor.py", "what each rank sees", 1.5),
        ],
    ),
    Floor(
        "4 services",
        "#fdf3d8",
        [
            Room("distributed/", "ranks meet, agree, stop", 1.25),
            Room("parts/", "networks, optimizers", 1.1),
            Room("data/", "images, batches by position", 1.3),
            Room("tracking/", "TensorBoard", 0.8),
        ],
    ),
    Floor("3 settings", "#fbe9bf", [Room("recipe/", "typed recipes: schema and loader", 1)]),
    Floor(
        "2 method",
        "#fbe0d6",
        [
            Room("optim/", "learning rate dropout: mask, LRDropout, Magma", 3),
            Room("optim/fused/", "the same bits, faster", 1.5),
        ],
    ),
    Floor(
        "1 ground",
        "#eceff1",
        [
            Room("philox", "random bits", 0.8),
            Room("generators", "set, restored", 1.15),
            Room("console, errors", "output, exit statuses", 1.6),
            Room("files, host, startup", "machine, imports", 2.1),
            Room("torchvision_compat", "torchvision anywhere", 1.9),
        ],
    ),
]


def draw_house() -> str:
    """The house as SVG, one floor above the other."""
    height = TOP + len(FLOORS) * (FLOOR_HEIGHT + GAP) + 44
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#ffffff"/>',
        text(
            middle,
            32,
            "accelerate launch -m lrd.train RECIPE      ·      lrd COMMAND",
            15,
            mono=True,
        ),
        arrow(middle, 42, TOP - 8),
    ]

    for number, floor in enumerate(FLOORS):
        y = TOP + number * (FLOOR_HEIGHT + GAP)
        parts += draw_floor(floor, y)

    bottom = TOP + len(FLOORS) * (FLOOR_HEIGHT + GAP)
    parts.append(text(middle, bottom + 20, "torch · NumPy · accelerate", 14, color="#5f6b76"))
    parts += draw_import_arrow(TOP, bottom - GAP)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def draw_floor(floor: Floor, y: float) -> list[str]:
    parts = [
        text(LEFT - 16, y + FLOOR_HEIGHT / 2 + 5, floor.label, 14, anchor="end", color="#5f6b76")
    ]

    total_share = sum(room.share for room in floor.rooms)
    free_width = WIDTH - LEFT - RIGHT - GAP * (len(floor.rooms) - 1)
    x = float(LEFT)
    for room in floor.rooms:
        width = free_width * room.share / total_share
        parts += [
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{FLOOR_HEIGHT}" rx="8" '
            f'fill="{floor.color}" stroke="#9aa5b1" stroke-width="1.2"/>',
            text(x + width / 2, y + 31, room.name, 17, mono=True, bold=True),
            text(x + width / 2, y + 54, room.purpose, 14, color="#3c4650"),
        ]
        x += width + GAP
    return parts


def draw_import_arrow(top: float, bottom: float) -> list[str]:
    x = WIDTH - RIGHT / 2 - 8
    middle = (top + bottom) / 2
    label = text(0, 0, "imports go down only", 14, color="#5f6b76")
    return [
        arrow(x, top, bottom),
        f'<g transform="translate({x + 20} {middle}) rotate(90)">{label}</g>',
    ]


def arrow(x: float, top: float, bottom: float) -> str:
    return (
        f'<path d="M{x} {top} V{bottom} m-6 -9 l6 9 l6 -9" fill="none" '
        'stroke="#5f6b76" stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round"/>'
    )


def text(
    x: float,
    y: float,
    content: str,
    size: int,
    *,
    anchor: str = "middle",
    color: str = "#1f2933",
    mono: bool = False,
    bold: bool = False,
) -> str:
    family = ' font-family="DejaVu Sans Mono, Menlo, Consolas, monospace"' if mono else ""
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}" '
        f'xml:space="preserve"{family}{weight}>{escape(content)}</text>'
    )


if __name__ == "__main__":
    Path(__file__).with_name("house.svg").write_text(draw_house(), encoding="utf-8")
