"""A long cable: it joins two network devices and delays every frame, for kernels without netem.

    slow_wire.py SECONDS DEVICE DEVICE

SECONDS is the delay there and back. The script creates the devices, prints `ready`, and runs until
it is killed; the devices disappear with it.
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

# From linux/if_tun.h.
TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000


def open_device(name: str) -> int:
    """Create a network device. Returns a descriptor from which its frames are read."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def relay(delay: float, ends: tuple[int, int]) -> None:
    """Pass on every frame, half the delay after it came."""
    under_way: deque[tuple[float, int, bytes]] = deque()  # (when it arrives, where, frame)
    while True:
        timeout = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        readable, _, _ = select.select(ends, [], [], timeout)
        for end in readable:
            other_end = ends[1] if end == ends[0] else ends[0]
            under_way.append((time.monotonic() + delay / 2, other_end, os.read(end, 65536)))

        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            # If the device is down, the frame is lost, as it is on a cable.
            with suppress(OSError):
                os.write(end, frame)


if __name__ == "__main__":
    seconds, first_name, second_name = sys.argv[1:]
    devices = (open_device(first_name), open_device(second_name))
    print("ready", flush=True)
    relay(float(seconds), devices)
