"""Two judges that know DICOM and nothing of this project: Orthanc and DCMTK's dcmftest.

Orthanc, a DICOM server, gets every zip that the uploader posts, and must hold each file of the
tree then, with the same bytes. dcmftest says of each file whether it is DICOM, and where the
uploader says otherwise the table below says why. pydicom's own test files (`.ci/run` fetches them
and names their folder in DICOMUPLOAD_TEST_PYDICOM; none is committed) are the odd ones: all
transfer syntaxes, files without preamble, without meta elements, cut, or no DICOM at all.
"""

import contextlib
import fnmatch
import gzip
import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import unittest
import zipfile
from collections import Counter
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, NamedTuple, Set, Tuple

import dicomUpload
from tests.dicom import dicom_file, dicomdir_file, digests, uid, write_series
from tests.support import UploadTest, missing, need, sealed_environment
from tests.test_real_data import case001
from tests.xnat_standin import Image, Standin, read_image

ONCE = True  # the Python that it runs on makes no difference


# What the uploader calls damaged: XNAT refuses what has no SOP class or instance, and takes what is
# cut in its pixels as it is.
DAMAGED = ("charset_files/chrSQEncoding.dcm", "charset_files/chrSQEncoding1.dcm",
           "test_files/UN_sequence.dcm", "test_files/empty_charset_LEI.dcm",
           "test_files/meta_missing_tsyntax.dcm", "test_files/nested_priv_SQ.dcm",
           "test_files/no_meta_group_length.dcm", "test_files/priv_SQ.dcm",
           "test_files/MR_truncated.dcm", "test_files/rtplan_truncated.dcm")


class Disagreement(NamedTuple):
    """Files (a glob on their paths) of which dcmftest and the uploader think differently."""

    files: str
    dcmftest: bool
    ours: bool
    why: str  # why ours is right


BARE = ("a data set without preamble, as old exports are: dcmftest knows files by `DICM` at 128 "
        "only, XNAT's reader also by a first tag that it knows, and takes it")
INDEX = ("an index of other files, without a SOP class of its own: DICOM by the letter, but XNAT "
         "answers 400 and drops all that comes after it in the zip")
HALF = "damaged, and named as that: cut, or without SOP class or instance, which XNAT refuses"
DISAGREEMENTS = (
    Disagreement("made/bare-*", False, True, BARE),
    Disagreement("made/DICOMDIR", True, False, INDEX),
    Disagreement("pydicom/test_files/ExplVR_LitEndNoMeta.dcm", False, True, BARE),
    Disagreement("pydicom/test_files/ExplVR_BigEndNoMeta.dcm", False, True, BARE),
    Disagreement("pydicom/test_files/rtstruct.dcm", False, True, BARE),
    Disagreement("pydicom/test_files/dicomdirtests/DICOMDIR*", True, False, INDEX),
    Disagreement("pydicom/test_files/dicomdirtests/TINY_ALPHA/DICOMDIR", True, False, INDEX),
    Disagreement("made/cut-*", True, False, HALF),
    *(Disagreement(f"pydicom/{name}", True, False, HALF) for name in DAMAGED),
)

# What XNAT takes and Orthanc does not, for reasons of its own.
NO_PLACE = "without study and series UID: XNAT puts it where the uploader says, Orthanc nowhere"
ORTHANC_REFUSES = {
    "palettes/*.dcm": NO_PLACE, "test_files/JPEGLSNearLossless_*.dcm": NO_PLACE,
    "test_files/SC_rgb_jls_lossy_*.dcm": NO_PLACE,
}
# Its meta elements say explicit and its data set is implicit: DCMTK reads a length of 1.3 GB there,
# and Orthanc takes so much memory, for seconds, before it refuses the file.
TOO_DEAR = "test_files/SC_rgb_jpeg.dcm"


class Orthanc:
    """A DICOM server of its own on loopback, empty at first; a context manager."""

    SETTINGS = {"DicomServerEnabled": False, "RemoteAccessAllowed": False, "Plugins": [],
                "AuthenticationEnabled": False, "OverwriteInstances": False,
                "SyncStorageArea": False, "StorageCompression": False}

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder
        folder.mkdir()

    def __enter__(self) -> "Orthanc":
        for _ in range(5):  # it cannot choose a free port itself, and ours may be taken meanwhile
            if self._start(free_port()):
                return self
            self.__exit__()
        raise AssertionError("Orthanc does not start: " + "".join(self.said[-3:]))

    def _start(self, port: int) -> bool:
        """Whether it serves on that port."""
        config = self.folder / "orthanc.json"
        config.write_text(json.dumps(dict(
            self.SETTINGS, HttpPort=port, StorageDirectory=str(self.folder / "storage"),
            IndexDirectory=str(self.folder / "storage"))))
        self.process = subprocess.Popen(
            [self.program, str(config)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, universal_newlines=True, errors="replace",
            env=sealed_environment(self.folder))
        assert self.process.stderr
        self.said: List[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if "Orthanc has started" in line:
                self.reader = threading.Thread(target=self.said.extend, daemon=True,
                                               args=(self.process.stderr,))
                self.reader.start()
                self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                return True
        return False

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if hasattr(self, "reader"):
            self.http.close()
            self.reader.join()
        assert self.process.stderr
        self.process.stderr.close()

    def answer(self, method: str, path: str, body: bytes = b"") -> Tuple[int, bytes]:
        self.http.close()  # Orthanc ends a connection that has been idle for a second
        self.http.request(method, path, body)
        answer = self.http.getresponse()
        return answer.status, answer.read()

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        status, data = self.answer(method, path, body)
        assert status == 200, f"{method} {path}: HTTP {status} {data[:300]!r}"
        return data

    def knows(self, path: Path) -> bool:
        """Give it one file: whether it takes it, or has it."""
        return self.answer("POST", "/instances", path.read_bytes())[0] == 200

    def take(self, zipped: Path) -> "Counter[str]":
        """Give it a zip: how many of its files it stored, or had already, or what else it says."""
        answers = json.loads(self.ask("POST", "/instances", zipped.read_bytes()))
        return Counter(each["Status"] for each in answers)

    def digests(self) -> List[str]:
        """The sorted sha256 of all files, as it gives them back."""
        return sorted(hashlib.sha256(self.ask("GET", f"/instances/{each}/file")).hexdigest()
                      for each in json.loads(self.ask("GET", "/instances")))

    def statistics(self) -> Dict[str, int]:
        return {key: int(value) for key, value in json.loads(self.ask("GET", "/statistics")).items()
                if key.startswith("Count")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pydicom_files(test: UploadTest) -> Path:
    """The folder of pydicom's test files, or the test is skipped."""
    folder = os.environ.get("DICOMUPLOAD_TEST_PYDICOM", "")
    if not folder or not Path(folder, "test_files").is_dir():
        missing(test, "no files of pydicom: DICOMUPLOAD_TEST_PYDICOM is not set (.ci/run sets it)")
    return Path(folder)


def image_of(path: Path) -> Image:
    """What the stand-in reads in a file; nothing where it cannot."""
    try:
        return read_image(path.read_bytes()[:256 * 1024])
    except ValueError:
        return Image()


class JudgeTest(UploadTest):
    """What the tests here share."""

    def setUp(self) -> None:
        super().setUp()
        self.kept = self.folder / "kept"
        self.kept.mkdir()

    @contextlib.contextmanager
    def orthanc(self) -> Iterator[Orthanc]:
        place = shutil.which("Orthanc", path="/usr/sbin")  # where Debian has it
        program = place or need(self, "Orthanc")
        with Orthanc(program, self.folder / "orthanc") as orthanc:
            yield orthanc

    def names(self, zipped: Path) -> List[str]:
        """What a zip holds, by Python's reading."""
        with zipfile.ZipFile(str(zipped)) as archive:
            self.assertIsNone(archive.testzip())
            return [os.fsdecode(each.orig_filename.encode(
                "utf-8" if each.flag_bits & 0x800 else "cp437")) for each in archive.infolist()]

    def give(self, server: Standin, orthanc: Orthanc) -> int:
        """Give Orthanc all that the uploader posted; it must take each file. How many they are."""
        total = 0
        for _, copy in server.kept():
            count = len(self.names(copy))
            self.assertEqual(orthanc.take(copy), {"Success": count})
            total += count
        return total


class WhatOrthancGets(JudgeTest):

    def tree(self) -> Dict[str, str]:
        """A tree of eight series in four sessions; the digests of what is to be sent."""
        for number, path in enumerate((
                "007/pre/T2_FLAIR_0012", "007/pre/T1 MPRAGE", "007/post/a,b;c'd\"e",
                "007/post/-q", "Ünïcödé/καλημέρα/日本 語", "Ünïcödé/καλημέρα/Русский",
                "x[1]/y{2}/z*?", "x[1]/y{2}/%20&=+"), 1):
            subject, session, _ = path.split("/")
            write_series(self.root / path, study=uid(subject, session), number=number, files=5,
                         patient=subject, explicit=number % 2 == 0, rows=number, columns=9)
            write_series(self.root / path / "deeper" / "ελλ", study=uid(subject, session),
                         number=number, files=2, series=uid(subject, session, number),
                         name="2.25.77.{}", patient=subject)
        wanted = digests(self.root)
        write_series(self.root / "007/pre/AAHEAD_SCOUT", study=uid("007", "pre"), number=99)
        (self.root / "007/pre/T2_FLAIR_0012/notes.txt").write_text("no DICOM")
        (self.root / "007/pre/T2_FLAIR_0012/DICOMDIR").write_bytes(dicomdir_file())
        return wanted

    def test_orthanc_holds_the_whole_tree_after_it_got_what_was_posted(self) -> None:
        wanted = self.tree()
        config = self.folder / "config.json"
        config.write_text('{"Exclude": ["aahead"]}')
        with self.xnat(keep=str(self.kept)) as server, self.orthanc() as orthanc:
            ran = self.upload(server, "--config", str(config), "--max-files", "3")
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.kept()), 8 * 3)
            self.assertEqual(self.give(server, orthanc), len(wanted))
            self.assertEqual(orthanc.statistics(), {
                "CountInstances": len(wanted), "CountPatients": 3, "CountSeries": 16,
                "CountStudies": 4})
            self.assertEqual(orthanc.digests(), sorted(wanted.values()))
            stored = [each for label in server.labels() for each in server.stored(label)]
            self.assertEqual(sorted(stored), orthanc.digests())

    def test_orthanc_holds_all_324_real_files_after_it_got_what_was_posted(self) -> None:
        source = case001(self) / "scans"
        shutil.copytree(str(source), str(self.root / "Case001" / "MR 1"))
        wanted = [value for name, value in digests(self.root).items() if name.endswith(".dcm")]
        with self.xnat(keep=str(self.kept)) as server, self.orthanc() as orthanc:
            ran = self.upload(server, "--max-files", "50", timeout=120)
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(self.give(server, orthanc), 324)
            self.assertEqual(orthanc.statistics(), {"CountInstances": 324, "CountPatients": 1,
                                                    "CountSeries": 10, "CountStudies": 1})
            self.assertEqual(orthanc.digests(), sorted(wanted))

    def test_the_odd_ones_of_pydicom_arrive_or_are_named_as_what_cannot(self) -> None:
        source = pydicom_files(self)
        places = self.by_image(source)
        with self.xnat(keep=str(self.kept)) as server, self.orthanc() as orthanc:
            ran = self.upload(server, "--retries", "0", timeout=300)
            self.assertEqual(ran.status, 1, ran.text)
            rows = {row["label"]: row for row in self.report()}
            damaged = set()
            for path, label in places.items():
                name = path.relative_to(source).as_posix()
                with self.subTest(name):
                    if name.replace("/", "-") in rows[label]["message"]:
                        damaged.add(name)
                    else:
                        self.assertIn(digest(path), server.stored(label))
            self.assertEqual(damaged, set(DAMAGED))
            self.assertEqual(set(rows), set(places.values()))
            got: "Counter[str]" = Counter()
            for _, copy in server.kept():
                got += orthanc.take(copy)
            self.assertLessEqual(set(orthanc.digests()), set(map(digest, places)))
            self.assertEqual(orthanc.statistics()["CountInstances"], got["Success"])
            names = [path.relative_to(source).as_posix() for path in places]
            refused = {path.relative_to(source).as_posix() for path in places
                       if not orthanc.knows(path)}
            self.assertEqual(refused - damaged, set().union(
                *(fnmatch.filter(names, pattern) for pattern in ORTHANC_REFUSES)))
            self.assertEqual(sum(got.values()), len(set(names) - damaged - refused))

    def by_image(self, source: Path) -> Dict[Path, str]:
        """Lay pydicom's files out as a tree of which no session holds two studies, or two files of
        one image: which session each DICOM file comes to."""
        places = {}
        sessions: List[Tuple[str, Set[str]]] = []  # its study, and the images that it has
        for path in sorted(source.rglob("*")):
            image = image_of(path) if path.is_file() else Image()
            name = path.relative_to(source).as_posix()
            if not path.is_file() or name == TOO_DEAR or not (image.sop_class or name in DAMAGED):
                continue
            study, instance = image.study or name, image.sop_instance or name
            number = next((number for number, (other, has) in enumerate(sessions)
                           if study == other and instance not in has), len(sessions))
            if number == len(sessions):
                sessions.append((study, set()))
            sessions[number][1].add(instance)
            folder = self.root / f"{number:03}" / "s" / "S"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(path), str(folder / name.replace("/", "-")))
            places[path] = f"{number:03}_s"
        return places


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class WhatDcmftestSays(JudgeTest):

    def dcmftest(self, names: Iterable[str]) -> Set[str]:
        """What dcmftest takes for DICOM of these files."""
        done = subprocess.run(
            [need(self, "dcmftest"), *names], cwd=str(self.series), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, universal_newlines=True, env=sealed_environment(self.home))
        said = Counter(line.partition(": ")[0] for line in done.stdout.splitlines())
        self.assertEqual(set(said), {"yes", "no"}, done.stdout)
        return {line[5:] for line in done.stdout.splitlines() if line.startswith("yes: ")}

    def made(self) -> Dict[str, bytes]:
        """Real and junk files of our own."""
        given = {"study": uid("made"), "series": uid("made", 1)}
        good = dicom_file(**given)
        zeros = b"\0" * 600
        return {
            "plain": good, "plain.txt": good, "implicit.dcm": dicom_file(explicit=False, **given),
            "cut-in-the-pixels": good[:-100], "cut-in-the-header": good[:200],
            "bare-explicit": dicom_file(preamble=False, **given),
            "bare-implicit.dcm": dicom_file(preamble=False, explicit=False, **given),
            "bare-meta": good[132:],
            "odd-preamble": b"II*\0\x08\0\0\0" + good[8:],  # a TIFF as well, as slides are
            "DICOMDIR": dicomdir_file(),
            "empty": b"", "one-byte": b"D", "text.dcm": b"no DICOM at all\n" * 50,
            "DICM": b"DICM" + zeros, "DICM-late": b"\0" * 129 + b"DICM" + zeros,
            "DICM-cut": b"\0" * 128 + b"DIC", "zeros.dcm": zeros, "DICM-cut-2": b"\0" * 131,
            "._plain": b"\0\5\x16\7\0\2\0\0" + zeros, ".DS_Store": b"\0\0\0\1Bud1" + zeros,
            "png": b"\x89PNG\r\n\x1a\n" + zeros, "jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + zeros,
            "tiff": b"II*\0\x08\0\0\0" + zeros, "tiff-big": b"MM\0*\0\0\0\x08" + zeros,
            "gzip": gzip.compress(good), "nifti": b"\x5c\1\0\0" + zeros,
            "nrrd": b"NRRD0004\ntype: short\n" + zeros, "json": b'{"a": 1}' + zeros,
            "pe": b"MZ\x90\0\3\0\0\0\4\0\0\0" + zeros, "elf": b"\x7fELF\2\1\1\0" + zeros,
            "pdf": b"%PDF-1.4\n" + zeros, "xml": b"<?xml version='1.0'?>" + zeros,
            "bmp": b"BM6\0\x0c\0\0\0\0\0" + zeros, "wav": b"RIFF\x24\x08\0\0WAVEfmt " + zeros,
        }

    def judge(self) -> None:
        """Compare the two on all files in self.series, and with the table."""
        every = {path.relative_to(self.series).as_posix(): path
                 for path in self.series.rglob("*") if path.is_file()}
        ours = {name for name, path in every.items()
                if dicomUpload.read_header(str(path), path.stat().st_size).kind == "DICOM"}
        theirs = self.dcmftest(sorted(every))
        found = {name: (name in theirs, name in ours) for name in every
                 if (name in theirs) != (name in ours)}
        rows = [row for row in DISAGREEMENTS
                if (self.series / row.files.partition("/")[0]).is_dir()]
        told = {name: (row.dcmftest, row.ours) for row in rows for name in every
                if fnmatch.fnmatchcase(name, row.files)}
        self.assertEqual(found, told)
        for row in rows:
            self.assertTrue(fnmatch.filter(every, row.files), row.files)

    def lay_out(self) -> None:
        self.series = self.root / "007" / "pre" / "S"
        (self.series / "made").mkdir(parents=True)
        (self.series / "a.dcm").write_bytes(dicom_file(study=uid("made"), series=uid("made", 1)))
        for name, content in self.made().items():
            (self.series / "made" / name).write_bytes(content)

    def test_it_agrees_on_files_of_our_own(self) -> None:
        self.lay_out()
        self.judge()

    def test_it_agrees_on_the_files_of_pydicom(self) -> None:
        self.lay_out()
        shutil.copytree(str(pydicom_files(self)), str(self.series / "pydicom"))
        self.judge()

    def test_it_agrees_on_real_files(self) -> None:
        self.lay_out()
        shutil.copytree(str(case001(self)), str(self.series / "Case001"))
        self.judge()


if __name__ == "__main__":
    unittest.main()
