"""A TEST DOUBLE of Android's adb. It reaches no phone: its device is a folder of this machine.

It takes `-s SERIAL` and the parts `shell LINE`, `push FILE... FOLDER/`, `pull FILE FOLDER/`, with
the exit codes and places of output that adb has. The device's paths begin in $ADB_DOUBLE_ROOT;
$ADB_DOUBLE_OFFLINE names what it says instead of working.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Be adb."""
    if said := os.environ.get("ADB_DOUBLE_OFFLINE"):
        print(f"adb: {said}", file=sys.stderr)
        return 1
    root = os.environ["ADB_DOUBLE_ROOT"]
    option, serial, part, *rest = sys.argv[1:]
    if (option, serial) != ("-s", "0a1b2c3d"):
        print(f"adb: device '{serial}' not found", file=sys.stderr)
        return 1
    if part == "shell":
        [line] = rest
        line = line.replace("/data/local/tmp", f"{root}/data/local/tmp")
        line = line.replace("getprop ro.product.model", "echo A phone that is none")
        return subprocess.run(["sh", "-c", line], check=False).returncode
    *sources, target = rest
    if part == "push":
        for source in sources:
            shutil.copyfile(source, f"{root}{target}{Path(source).name}")
        print(f"{len(sources)} files pushed")
        return 0
    assert part == "pull"
    shutil.copy(f"{root}{sources[0]}", target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
