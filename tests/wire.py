"""A long cable: two network devices, joined, with a delay, one half each way. wire.py SECONDS DEVICE DEVICE

Kernels without netem have none. Runs until it is killed; the devices go with it.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def device(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def relay(delay: float, ends: tuple[int, int]) -> None:
    under_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        patience = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], patience)[0]:
            other = ends[1] if end == ends[0] else ends[0]
            under_way.append((time.monotonic() + delay / 2, other, os.read(end, 65536)))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            with suppress(OSError):  # the device is down: a cable loses what it cannot deliver
                os.write(end, frame)


if __name__ == "__main__":
    seconds, *names = sys.argv[1:]
    ends = (device(names[0]), device(names[1]))
    print("ready", flush=True)
    relay(float(seconds), ends)
