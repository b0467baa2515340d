"""The picture of a run in the README: `python3 tests/picture.py` prints it, from a real run.

    python3 tests/picture.py --write      puts it into README.md

A run against the stand-in XNAT on a slow line, with one series that cannot be sent, on a terminal
of 100 columns. Only the server's name and the folder's are replaced.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by its path, from any folder

from tests.dicom import readme_tree
from tests.support import (EXCLUSIONS, ROOT, SCRIPT, open_terminal, sealed_environment,
                           shown_on)
from tests.xnat_standin import Standin

URL = "https://xnat.example.org"
BLOCK = re.compile(r"```\n\$ python3 dicomUpload\.py .*?\n```", re.DOTALL)


def run_on_terminal(command: List[str], folder: Path) -> str:
    """All that a terminal is shown by a command."""
    master, slave = open_terminal(100)
    process = subprocess.Popen(command, cwd=str(folder), stdin=subprocess.DEVNULL, stdout=slave,
                               stderr=slave, env=sealed_environment(
                                   folder, XNAT_PASS="s3cret", TERM="xterm", NO_COLOR="1"))
    os.close(slave)
    shown = shown_on(master)
    os.close(master)
    process.wait()
    return shown.replace("\r\n", "\n")


def still(shown: str) -> List[str]:
    """The lines that stay on the screen, and where it was half done the one that moves."""
    moments = [piece.split("\r\x1b[K") for piece in shown.split("\n")]
    lines = [states[-1] for states in moments]
    moving = [(at, state) for at, states in enumerate(moments) for state in states[:-1]
              if re.search(r"about .* left\]  \S", state)]
    if moving:
        at, state = moving[len(moving) // 2]
        lines.insert(at, state)
    return lines


def picture() -> str:
    """Command and output of a real run, as a fenced block."""
    with tempfile.TemporaryDirectory(prefix="dicomUpload-picture-") as name, Standin(
            rate=6_000_000, seconds_per_file=0.01) as xnat:
        folder = Path(name).resolve()
        tree = folder / "dicomdir"
        readme_tree(tree, files=24, rows=384, columns=384)
        broken = tree / "008/post/T1-MPRAGE_0011/IM0117.dcm"
        broken.symlink_to("/mnt/scanner/IM0117.dcm")
        for each in (SCRIPT, EXCLUSIONS):
            (folder / each.name).symlink_to(each)
        arguments = [SCRIPT.name, xnat.url, "alice", "-", "BRAIN", "dicomdir", "--config",
                     EXCLUSIONS.name]
        lines = still(run_on_terminal([sys.executable] + arguments, folder))
        text = "\n".join(["$ python3 " + shlex.join(arguments)] + lines)
        text = text.replace(xnat.url, URL).replace(str(folder) + "/", "")
    return "```\n" + text.rstrip() + "\n```"


def main() -> int:
    block = picture()
    if sys.argv[1:] == ["--write"]:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        readme.write_text(BLOCK.sub(lambda _: block, text, count=1), encoding="utf-8")
    print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
