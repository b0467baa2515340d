"""What the tests of trees share: folders full of odd things, runs, and what became of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

from tests.dicom import dicom_file, digests, uid, write_series
from tests.support import ROOT, Ran, UploadTest, drop_root_rights, missing
from tests.xnat_standin import Request, Standin

Word = Union[str, "re.Pattern[str]"]
COPY = re.compile(r"\bcop(y|ies)\b")
# Many calls in one process, where a process each would take too long: main() is the whole command.
MANY = """
import io, json, sys, traceback
sys.path.insert(0, sys.argv[1])
import dicomUpload
ends = []
for sys.argv in json.load(sys.stdin):
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    try:
        status = dicomUpload.main()
    except SystemExit as end:
        status = end.code
    except Exception:
        traceback.print_exc()
        status = 1
    texts = []
    for stream in sys.stdout, sys.stderr:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    ends.append((status, *texts))
sys.__stdout__.write(json.dumps(ends))
"""
# Python starts with this where PYTHONPATH says so: it writes down whatever is opened, and when.
WATCH = """
import os, sys, time
place = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
def watch(event, given):
    if event == "open" and not isinstance(given[0], int):
        os.write(place, b"%r %a\\n" % (time.monotonic(), os.fsdecode(given[0])))
sys.addaudithook(watch)
"""


class Opened(NamedTuple):
    """A file of the tree that the command opened, and when (monotonic seconds)."""

    moment: float
    name: str


class TreeTest(UploadTest):
    """Trees, and what became of them."""

    def setUp(self) -> None:
        super().setUp()
        self.numbers: Dict[str, int] = {}

    # -- making trees

    def header(self, path: str, **more: Any) -> Dict[str, Any]:
        """What images say that lie at subject/session/series or below, unless it is given: each
        session is a study, each series folder a series, each series has its number."""
        subject, session, series = path.split("/")[:3]
        more.setdefault("study", uid(subject, session))
        more.setdefault("series", uid(more["study"], series))
        more.setdefault("number", self.numbers.setdefault(more["series"], len(self.numbers) + 1))
        more.setdefault("description", series)
        return more

    def series(self, path: str, files: int = 2, **more: Any) -> List[str]:
        """Make subject/session/series; the digests of all that is in it then."""
        write_series(self.root / path, files=files, **self.header(path, **more))
        return list(digests(self.root / path).values())

    def content(self, path: str, instance: int = 1, **more: Any) -> bytes:
        """The image that belongs at subject/session/series/name, also below them."""
        return dicom_file(instance=instance, **self.header(path, **more))

    def put(self, path: str, content: bytes) -> str:
        """Make one file with this in it; its digest."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return digests(file.parent)[file.name]

    def image(self, path: str, instance: int = 1, **more: Any) -> str:
        """Make one image, subject/session/series/name, also below them; its digest."""
        return self.put(path, self.content(path, instance, **more))

    def tree(self, path: str = "") -> List[str]:
        """The digests of all that is there: each content once, as a server should hold it."""
        return sorted(set(digests(self.root / path).values()))

    def hold(self, path: Path, mode: int = 0) -> None:
        """Take rights away from a file or folder, until the test is over."""
        self.addCleanup(path.chmod, 0o700)
        path.chmod(mode)

    def need_held_root(self) -> None:
        """Skip where even drop_root_rights leaves every file readable."""
        probe = self.folder / "probe"
        probe.touch(0)
        done = subprocess.run(["cat", str(probe)], preexec_fn=drop_root_rights,
                              stderr=subprocess.DEVNULL, check=False)
        if done.returncode == 0:
            missing(self, "permission bits do not hold here")

    def config(self, *exclude: str) -> str:
        """A config file that leaves these out."""
        path = self.folder / "config.json"
        path.write_text(json.dumps({"Exclude": exclude}), encoding="utf-8")
        return str(path)

    # -- runs

    def run_it(self, server: Standin, *options: str, status: Optional[int] = 0,
               posts: Optional[int] = None, **call: Any) -> Ran:
        """Run the upload; check exit status, and how many import POSTs it made."""
        before = len(server.imports())
        ran = self.upload(server, *options, **call)
        if status is not None:
            self.assertEqual(ran.status, status, ran.text)
        if posts is not None:
            made = [(post.params.get("EXPT_LABEL"), post.entries)
                    for post in server.imports()[before:]]
            self.assertEqual(len(made), posts, f"{made}\n{ran.text}")
        self.assertEqual(self.zips(), [])
        return ran

    def dry_run(self, server: Standin, *options: str, status: int = 0, **call: Any) -> Ran:
        """A dry run, after which the server is as it was. What a real run would end with 0 ends
        with 1 as long as something is missing on the server."""
        before = len(server.commits()), server.tree()
        ran = self.run_it(server, "--dry-run", *options, status=None, posts=0, **call)
        missing = bool(re.search(r"(?m)^[0-9,]+ sessions?: .*would be ", ran.out))
        self.assertEqual(ran.status, status or int(missing), ran.text)
        self.assertEqual(ran.status == 0, "All is there." in ran.out, ran.text)
        self.assertEqual((len(server.commits()), server.tree()), before)
        return ran

    def run_many(self, calls: List[List[str]], **more: Any) -> List[Ran]:
        """What the command does with each of these arguments."""
        process = self.start([sys.executable, "-c", MANY, str(ROOT)], stdin=subprocess.PIPE,
                             **more)
        out, err = process.communicate(json.dumps([call[1:] for call in calls]), timeout=60)
        self.assertEqual((process.returncode, err), (0, ""))
        ends = [Ran(*end) for end in json.loads(out)]
        for ran in ends:
            self.assertNotIn("Traceback", ran.text)
        return ends

    def watched(self) -> Dict[str, str]:
        """The environment of a run whose openings are written down, see `opened`."""
        (self.folder / "watch").mkdir(exist_ok=True)
        (self.folder / "watch/sitecustomize.py").write_text(WATCH, encoding="utf-8")
        (self.folder / "opened").write_bytes(b"")
        return {"PYTHONPATH": str(self.folder / "watch"), "OPENED": str(self.folder / "opened")}

    def opened(self) -> List[Opened]:
        """The files of the tree that the watched run opened; the tree's file names are unique."""
        names = {path.name for path in self.root.rglob("*") if path.is_file()}
        rows = (line.split(" ", 1) for line in
                (self.folder / "opened").read_text(encoding="utf-8").splitlines())
        found = [Opened(float(moment), os.path.basename(name.strip("'\"")))
                 for moment, name in rows]
        self.assertTrue(found, "nothing was watched")
        return [each for each in found if each.name in names]

    # -- what became of them

    def lines(self, said: Union[Ran, str], *words: Word) -> List[str]:
        """The lines of the output with all these words in them."""
        text = said if isinstance(said, str) else said.text
        return [line for line in text.splitlines()
                if all(word in line if isinstance(word, str) else word.search(line)
                       for word in words)]

    def assert_told(self, said: Union[Ran, str], *words: Word) -> None:
        """There is a line with all these words in it."""
        if not self.lines(said, *words):
            self.fail(f"no line with {words} in:\n{said if isinstance(said, str) else said.text}")

    def assert_not_told(self, said: Union[Ran, str], *words: Word) -> None:
        """There is no line with all these words in it."""
        self.assertEqual(self.lines(said, *words), [])

    def posts(self, server: Standin, label: str) -> List[Request]:
        """The import POSTs of a session."""
        return [post for post in server.imports() if post.params.get("EXPT_LABEL") == label]

    def entries(self, server: Standin, label: str) -> List[str]:
        """The base names of all that was posted of a session."""
        return sorted(entry.rpartition("/")[2] for post in self.posts(server, label)
                      for entry in post.entries)

    def assert_archived(self, server: Standin, label: str, wanted: List[str]) -> None:
        """The archive holds exactly these files in that session, and nothing waits."""
        self.assertIn(("BRAIN", label), server.archive)
        self.assertEqual(server.stored(label), sorted(wanted), label)
        self.assertEqual([row.name for row in server.prearchive if row.name == label], [])

    def assert_held_back(self, server: Standin, label: str, wanted: List[str]) -> None:
        """Exactly these files of the session wait in the prearchive; none is archived."""
        self.assertNotIn(("BRAIN", label), server.archive)
        self.assertEqual(server.stored(label), sorted(wanted), label)
        self.assertLessEqual(len([row for row in server.prearchive if row.name == label]), 1)

    def assert_nothing_there(self, server: Standin) -> None:
        self.assertEqual(server.imports(), [])
        self.assertEqual(server.labels(), [])

