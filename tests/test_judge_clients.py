"""XNAT's own clients as judges of the stand-in, and of what the uploader left there.

PyPI's xnat (xnatpy), pyxnat and xnatctl log in, look, import and archive. `.ci/run` installs them
into a venv and says in DICOMUPLOAD_TEST_CLIENTS where its Python is; none of their code is here.
They were written against real XNATs, so where one chokes on the stand-in, the stand-in is wrong.
"""

import json
import os
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any, Dict, List

from tests.support import load_tests as load_tests  # they mostly start up: several at a time
from tests.support import missing, sealed_environment
from tests.running import RunningTest
from tests.xnat_standin import Standin, read_image

ONCE = True  # the Python that it runs on makes no difference

A, B, C = "007/pre/A_0001", "007/pre/B_0002", "008/pre/C_0003"

# Each script has `url`, `given` (a list of words) and `tell` (prints the answer as JSON).
START = """
import json, sys, types
url, *given = sys.argv[1:]
def tell(value):
    print("ANSWER " + json.dumps(value))
"""
XNATPY = START + """
import xnat
def files_of(scan):
    [resource] = [each for each in scan.resources.values() if each.label == "DICOM"]
    names = sorted(each.name for each in resource.files.values())
    assert len(names) == resource.file_count, (names, resource.file_count)
    return [names, resource.file_size]
session = xnat.connect(url, user="alice", password="s3cret")
"""
XNATPY_LOOKS = XNATPY + """
with session:
    project = session.projects["BRAIN"]
    tell([session.logged_in_user, session.xnat_version,
          sorted(each.label for each in project.subjects.values()),
          {each.label: {scan.series_description: files_of(scan) for scan in each.scans.values()}
           for each in project.experiments.values()},
          {each.label: [each.uid, {scan.id: scan.uid for scan in each.scans.values()}]
           for each in project.experiments.values()}])
"""
XNATPY_REVIEWS = XNATPY + """
with session:
    [found] = session.prearchive.sessions(project="MANUAL")
    seen = {scan.series_description: len(scan.files) for scan in found.scans.values()}
    state = found.status, found.subject, found.label
    archived = found.archive()
    tell([state, seen, archived.label, {scan.series_description: files_of(scan)
                                        for scan in archived.scans.values()}])
"""
XNATPY_IMPORTS = XNATPY + """
folder, project, subject, label = given
with session:
    found = session.services.import_dir(folder, project=project, subject=subject, experiment=label,
                                        destination="/prearchive/projects/" + project)
    tell([type(found).__name__, found.label, {
        scan.series_description: files_of(scan) if hasattr(scan.resources, "values") and
        project == "BRAIN" else len(scan.files) for scan in found.scans.values()}])
"""
# Its extras for derived data want three big packages, which it does not ask pip for.
PYXNAT = START + """
for name in "nibabel", "numpy", "pandas":
    sys.modules[name] = types.ModuleType(name)
import pyxnat
server = pyxnat.Interface(server=url, user="alice", password="s3cret")
def files_of(scan):
    resource = scan.resource("DICOM")
    files = {each.label(): int(each.size()) for each in resource.files()}
    return [sorted(files), sum(files.values())]
"""
PYXNAT_LOOKS = PYXNAT + """
project = server.select.project("BRAIN")
assert project.exists() and not server.select.project("NOT_THERE").exists()
sessions = {}
for subject in project.subjects():
    for each in subject.experiments():
        sessions[each.label()] = {scan.attrs.get("series_description"): files_of(scan)
                                  for scan in each.scans()}
tell([server.version()["version"], sorted(each.label() for each in project.subjects()), sessions,
      sorted(each["subject_ID"] for each in server.array.mrsessions(project_id="BRAIN").data)])
server.disconnect()
"""
PYXNAT_IMPORTS = PYXNAT + """
path, project, subject, label = given
with open(path, "rb") as file:
    answer = server.post("/data/services/import", files={"file": ("images.zip", file)}, params={
        "import-handler": "DICOM-zip", "PROJECT_ID": project, "SUBJECT_ID": subject,
        "EXPT_LABEL": label})
place = answer.text.strip()
commit = server.post(place, params={"action": "commit"})
session = server.select("/project/%s/subject/%s/experiment/%s" % (project, subject, label))
tell([answer.status_code, commit.status_code, session.exists(),
      {scan.attrs.get("series_description"): files_of(scan) for scan in session.scans()}])
"""


class ClientTest(RunningTest):
    """What the judges share."""

    def setUp(self) -> None:
        super().setUp()
        self.python = os.environ.get("DICOMUPLOAD_TEST_CLIENTS", "")
        if not self.python or not os.access(self.python, os.X_OK):
            missing(self, "no clients: DICOMUPLOAD_TEST_CLIENTS is not set (.ci/run sets it)")

    def sizes(self, *paths: str) -> Dict[str, List[Any]]:
        """What must be there of series folders: description, names of files, bytes."""
        return {path.name: [sorted(file.name for file in path.iterdir()),
                            sum(file.stat().st_size for file in path.iterdir())]
                for path in map(self.root.joinpath, paths)}

    def uids(self, *paths: str) -> List[Any]:
        """The study's UID, and each series' by its number, as the images say."""
        images = [read_image(next((self.root / path).iterdir()).read_bytes()) for path in paths]
        return [images[0].study, {str(image.number): image.series for image in images}]

    def ask(self, script: str, server: Standin, *given: str) -> Any:
        """Run a client; what it tells."""
        out = self.start_client([self.python, "-c", script, server.url, *given])
        [answer] = re.findall("^ANSWER (.*)$", out, re.MULTILINE)
        return json.loads(answer)

    def xnatctl(self, server: Standin, *words: str) -> Any:
        """Run xnatctl; its JSON."""
        program = Path(self.python).with_name("xnatctl")
        return json.loads(self.start_client([str(program), *words, "-o", "json"],
                                            XNAT_URL=server.url, XNAT_USER="alice",
                                            XNAT_PASS="s3cret"))

    def start_client(self, command: List[str], **more: str) -> str:
        ran = subprocess.run(command, env=sealed_environment(self.home, **more), timeout=60,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, cwd=str(self.home))
        self.assertEqual(ran.returncode, 0, ran.stderr.decode() + ran.stdout.decode())
        return ran.stdout.decode()

    def uploaded(self, server: Standin, *paths: str, project: str = "BRAIN") -> None:
        """The series lie on the server, sent by the uploader."""
        for number, path in enumerate(paths):
            self.tree(path, files=3 + number)
        self.run_it(server, status=0, posts=len(paths), project=project)


class Looking(ClientTest):

    def test_xnatpy_sees_all_that_the_uploader_archived(self) -> None:
        with Standin() as server:
            self.uploaded(server, A, B, C)
            self.assertEqual(self.ask(XNATPY_LOOKS, server), [
                "alice", "1.8.11", ["007", "008"],
                {"007_pre": self.sizes(A, B), "008_pre": self.sizes(C)},
                {"007_pre": self.uids(A, B), "008_pre": self.uids(C)}])

    def test_pyxnat_sees_all_that_the_uploader_archived(self) -> None:
        with Standin() as server:
            self.uploaded(server, A, B, C)
            version, subjects, sessions, owners = self.ask(PYXNAT_LOOKS, server)
            self.assertEqual((version, subjects), ("1.8.11", ["007", "008"]))
            self.assertEqual(sessions, {"007_pre": self.sizes(A, B), "008_pre": self.sizes(C)})
            self.assertEqual(owners, ["XNAT_S_007", "XNAT_S_008"])

    def test_xnatctl_sees_all_that_the_uploader_archived(self) -> None:
        with Standin() as server:
            self.uploaded(server, A, B, C)
            [first, second] = self.xnatctl(server, "session", "list", "-P", "BRAIN")
            self.assertEqual((first["label"], first["subject"], second["label"]),
                             ("007_pre", "007", "008_pre"))
            scans = self.xnatctl(server, "scan", "list", "-P", "BRAIN", "-E", "007_pre")
            self.assertEqual([(each["id"], each["series_description"]) for each in scans],
                             [("1", "A_0001"), ("2", "B_0002")])
            [counts] = self.xnatctl(server, "resource", "list", first["id"], "--scan", "2")
            self.assertEqual((counts["label"], counts["file_count"], int(counts["file_size"])),
                             ("DICOM", "4", self.sizes(B)["B_0002"][1]))

    def test_what_was_left_for_review_is_archived_with_xnatpy_and_the_uploader_knows_it(
            self) -> None:
        with Standin() as server:
            self.uploaded(server, A, B, project="MANUAL")
            state, seen, label, archived = self.ask(XNATPY_REVIEWS, server)
            self.assertEqual(state, ["READY", "007", "007_pre"])
            self.assertEqual(seen, {"A_0001": 3, "B_0002": 4})
            self.assertEqual((label, archived), ("007_pre", self.sizes(A, B)))
            self.assert_whole(server)
            self.run_it(server, status=0, posts=0, commits=0, words="already there, 7 files",
                        project="MANUAL")


class Importing(ClientTest):

    def test_xnatpy_imports_a_session_and_the_uploader_adds_a_series_to_it(self) -> None:
        with Standin() as server:
            self.tree(A, files=3)
            kind, label, seen = self.ask(XNATPY_IMPORTS, server, str(self.root / A), "BRAIN",
                                         "007", "007_pre")
            self.assertEqual((kind, label), ("MrSessionData", "007_pre"))
            self.assertEqual(seen, self.sizes(A))
            for file in (self.root / A).iterdir():
                file.unlink()
            (self.root / A).rmdir()
            self.tree(B, files=4)
            self.run_it(server, status=0, posts=1, commits=1, words="archived")
            self.assertEqual(len(server.stored("007_pre")), 7)

    def test_xnatpy_imports_a_session_for_review(self) -> None:
        with Standin() as server:
            self.tree(C, files=5)
            self.assertEqual(self.ask(XNATPY_IMPORTS, server, str(self.root / C), "MANUAL", "008",
                                      "008_pre"), ["PrearchiveSession", "008_pre", {"C_0003": 5}])
            self.assert_whole(server, archived=False)

    def test_pyxnat_imports_and_commits_a_session(self) -> None:
        with Standin() as server:
            self.tree(C, files=5)
            path = self.folder / "images.zip"
            with zipfile.ZipFile(path, "w") as images:
                for file in (self.root / C).iterdir():
                    images.write(file, file.name)
            self.assertEqual(self.ask(PYXNAT_IMPORTS, server, str(path), "BRAIN", "008",
                                      "008_pre"), [200, 301, True, self.sizes(C)])
            self.assert_whole(server)

    def test_xnatctl_imports_a_session_as_tar_in_two_parts_and_it_is_archived(self) -> None:
        with Standin() as server:
            self.tree(C, files=5)
            told = self.xnatctl(server, "session", "upload", "--prearchive", "--workers", "2",
                                "-P", "MANUAL", "-S", "008", "-E", "008_pre", str(self.root / C))
            self.assertEqual((told["status"], told["files"]), ("success", 5))
            self.assertEqual({each.file_name[-4:] for each in server.imports()}, {".tar"})
            self.assert_whole(server, archived=False)
            [row] = self.xnatctl(server, "prearchive", "list", "--project", "MANUAL")
            self.assertEqual((row["name"], row["status"]), ("008_pre", "READY"))
            self.xnatctl(server, "prearchive", "archive", "MANUAL", row["timestamp"], "008_pre")
            self.assert_whole(server)
