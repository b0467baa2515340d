"""The main job in one command: `python3 tests/demo.py`, or `python3 -m tests.demo`.

Makes the README's dicomdir of small synthetic files, starts the stand-in XNAT on this machine,
runs dicomUpload.py as a user would, and shows the tree that the server then holds. Nothing to
set up, nothing left behind, no network beyond 127.0.0.1.
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run by its path, from any folder

from tests.dicom import readme_tree
from tests.support import EXCLUSIONS, SCRIPT, sealed_environment
from tests.xnat_standin import Standin


def main() -> int:
    """Run the demo; the exit status of dicomUpload.py."""
    with tempfile.TemporaryDirectory(prefix="dicomUpload-demo-") as name, Standin() as xnat:
        folder = Path(name)
        readme_tree(folder / "dicomdir")
        for each in (SCRIPT, EXCLUSIONS):  # so that the command reads as in the README
            (folder / each.name).symlink_to(each)
        command = ["python3", SCRIPT.name, xnat.url, "alice", "-", "BRAIN", "dicomdir",
                   "--config", EXCLUSIONS.name]
        print(f"$ {shlex.join(command)}", flush=True)
        status = subprocess.call([sys.executable] + command[1:], cwd=name,
                                 env=sealed_environment(folder, XNAT_PASS="s3cret"))
        print(f"\nWhat {xnat.url} holds now:\n")
        print("\n".join(xnat.tree()), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
