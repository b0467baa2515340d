"""What the tests of running uploads share: a tree, a run, and what must be true after it."""

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from tests.dicom import uid, write_series
from tests.faults import FaultTest
from tests.support import Ran, need
from tests.xnat_standin import Standin

IMPORT = "POST /data/services/import"
COMMIT = "action=commit"
AGAIN = "trying again in"
HELD = "held back"
# Run a command without root's way round permissions.
HELD_BY_PERMISSIONS = """import os, sys
sys.path.insert(0, sys.argv[1])
from tests.support import drop_root_rights
drop_root_rights()
os.execv(sys.argv[2], sys.argv[2:])
"""


def until(true: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait for something outside the stand-in; what it gave, false if it never came."""
    end = time.monotonic() + seconds
    while True:
        found = true()
        if found or time.monotonic() > end:
            return found
        time.sleep(0.01)


class RunningTest(FaultTest):

    def big_series(self, path: str, megabytes: float, files: int = 1) -> None:
        """A series that does not compress."""
        subject, session, name = path.split("/")
        write_series(self.root / path, study=uid(subject, session), number=int(name[-4:]),
                     files=files, patient=subject, pixels=os.urandom(int(megabytes * 5e5) * 2))

    def processes(self, program: str = "") -> List[int]:
        """All living processes that were started with this test's HOME; or those of `program`."""
        if not os.path.isdir("/proc/self"):
            lines = subprocess.check_output(["ps", "-axo", "pid=,args="]).decode().splitlines()
            return [int(line.split()[0]) for line in lines if str(self.folder) in line
                    and os.path.basename(line.split()[1]).startswith(program)]
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = os.fsencode(f"HOME={self.home}\0") in (place / "environ").read_bytes()
                name = (place / "comm").read_text()
                if mine and name.startswith(program):
                    found.append(int(place.name))
        return found

    def assert_alone(self, seconds: float = 3) -> None:
        """Nothing that the run started is alive. One that the kernel is only about to start has
        no environment yet, so it is looked twice."""
        if not until(lambda: not self.processes() and not self.processes(), seconds):
            left = self.processes()
            self.fail("processes are left:\n" + subprocess.run(
                ["ps", "-o", "pid,ppid,stat,etime,args", "-p", ",".join(map(str, left))],
                stdout=subprocess.PIPE, universal_newlines=True).stdout)

    def ended(self, process: Any, seconds: float = 20) -> Ran:
        """The end of a run."""
        out, err = process.communicate(timeout=seconds)
        ran = Ran(process.returncode, out, err)
        self.assertNotIn("Traceback", ran.text)
        return ran

    def completes(self, server: Standin, *options: str) -> Ran:
        """The next run ends with everything there."""
        ran = self.run_it(server, *options, status=0)
        self.assert_whole(server)
        self.assert_alone()
        return ran

    def shim(self, tool: str, before: str) -> Dict[str, str]:
        """An environment whose `tool` does something before it is the real one."""
        place = self.folder / "bin"
        place.mkdir(exist_ok=True)
        (place / tool).write_text(f"#!/bin/sh\n{before}\nexec {need(self, tool)} \"$@\"\n")
        (place / tool).chmod(0o755)
        return {"PATH": f"{place}:{os.environ['PATH']}"}

    def on_open(self, end: str, do: str, event: str = "open") -> Dict[str, str]:
        """An environment in which Python does something, with `path`, before it opens a file
        below ROOTDIR (or scans a folder there) whose path ends so."""
        place = self.folder / "site"
        place.mkdir(exist_ok=True)
        lines = "\n        ".join(do.splitlines())
        (place / "sitecustomize.py").write_text(f"""import os, sys, time

def watch(event, given):
    if event != {event!r} or not isinstance(given[0], (str, bytes)):
        return
    path = os.fsdecode(given[0])
    if path.startswith({str(self.root)!r}) and path.endswith({end!r}):
        {lines}

sys.addaudithook(watch)
""")
        return {"PYTHONPATH": str(place)}
