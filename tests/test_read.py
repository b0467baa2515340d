"""Reading a session's files: what is an image, what is wrong with it, and what has changed.

Each kind of trouble has a tree whose sessions are its variants, and goes through the real command
line: dry, then in earnest, then again, when nothing may be sent any more. Many are mended in the
end, after which all must be there.
"""

import gzip
import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import unittest
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Set, Tuple

from dicomUpload import READERS, File, Series, read_files
from tests.dicom import dicom_file, dicomdir_file, digests, uid, write_series
from tests.support import Ran, cases, drop_root_rights, or_at_hand, variation
from tests.support import load_tests as load_tests  # several at a time
from tests.trees import COPY, TreeTest
from tests.xnat_standin import Standin

IMPORT = "POST /data/services/import"
SOP_CLASS, SOP_INSTANCE, STUDY = 0x00080016, 0x00080018, 0x0020000D
NOTES = b"Scanned twice, the first one moved.\n" * 20
LFS = (b"version https://git-lfs.github.com/spec/v1\n"
       b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n")
ANNEX = (b"/annex/objects/SHA256E-s12345--"
         b"4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393.dcm\n")
JUNK = {
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600,
    "notes.txt": NOTES,
    "notes.txt.gz": gzip.compress(NOTES),
    "empty.txt": b"",
    "zeros.bin": bytes(2000),
    "pointer.md": LFS,
    "photo.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + b"\1" * 600,
    "protocol.pdf": b"%PDF-1.4\n" + b"\1" * 600,
    "DICOMDIR": dicomdir_file(),
}


# ---- Spoiling files --------------------------------------------------------------------------

def place_of(tag: int, data: bytes) -> Tuple[int, int, int]:
    """Where an element of a little-endian file begins, where its value does, where it ends."""
    mark = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    explicit = data.find(mark + b"UI")
    if explicit >= 0:
        (length,) = struct.unpack_from("<H", data, explicit + 6)
        return explicit, explicit + 8, explicit + 8 + length
    at = data.index(mark)
    (length,) = struct.unpack_from("<I", data, at + 4)
    return at, at + 8, at + 8 + length


def without(data: bytes, tag: int) -> bytes:
    """The file without this element."""
    begin, _, end = place_of(tag, data)
    return data[:begin] + data[end:]


def emptied(data: bytes, tag: int) -> bytes:
    """The file with an explicit element that has no value."""
    begin, value, end = place_of(tag, data)
    return data[:begin + 6] + b"\0\0" + data[end:]


def zipped(files: Dict[str, bytes]) -> bytes:
    place = io.BytesIO()
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return place.getvalue()


def tarred(files: Dict[str, bytes], mode: str = "w:gz") -> bytes:
    place = io.BytesIO()
    with tarfile.open(fileobj=place, mode=mode) as file:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return place.getvalue()


class ReadTest(TreeTest):
    """What the tests of reading share."""

    def play(self, server: Standin, *options: str, status: int, posts: int,
             **call: Any) -> Tuple[Ran, Ran, Ran]:
        """Dry, in earnest, and again: all end alike, and the third sends nothing."""
        return (self.dry_run(server, *options, status=status, **call),
                self.run_it(server, *options, status=status, posts=posts, **call),
                self.run_it(server, *options, status=status, posts=0, **call))

    def assert_mended(self, server: Standin, *labels: str, posts: int = -1) -> None:
        """Now all goes well, and the archive holds these sessions as they lie here."""
        self.run_it(server, status=0, posts=None if posts < 0 else posts)
        for label in labels:
            with self.subTest(label):
                subject, _, session = label.rpartition("_")
                self.assert_archived(server, label, self.tree(f"{subject}/{session}"))


# ---- An image is its UID ---------------------------------------------------------------------

class Copies(ReadTest):
    """One SOP Instance UID in several files of a scan."""

    def test_an_image_that_lies_there_twice_is_sent_once_and_named(self) -> None:
        twice = {}

        def copy(path: str, *others: str) -> None:
            for other in others:
                self.put(other, (self.root / path).read_bytes())
            twice.setdefault(path.split("/")[0], []).append(
                {name.rpartition("/")[2] for name in (path, *others)})

        self.series("one-folder/pre/T1", files=3, name="a{}.dcm")
        copy("one-folder/pre/T1/a3.dcm", "one-folder/pre/T1/a3 (1).dcm")
        self.series("three-times/pre/T1", files=2, name="b{}.dcm")
        copy("three-times/pre/T1/b1.dcm", "three-times/pre/T1/x/b1.dcm",
             "three-times/pre/T1/y/z/c1")
        one = uid("two-folders", "T1")
        self.image("two-folders/pre/T1/d1.dcm", 1, series=one)
        self.image("two-folders/pre/T1/d2.dcm", 2, series=one)
        self.image("two-folders/pre/T1_more/d3.dcm", 3, series=one)
        copy("two-folders/pre/T1/d2.dcm", "two-folders/pre/T1_more/e2.dcm")
        for name in ("f{}.dcm", "g{}.IMA"):
            subject = "whole-series" if name[0] == "f" else "whole-series-renamed"
            self.series(f"{subject}/pre/T1", files=3, name="f{}.dcm")
            for number in (1, 2, 3):
                copy(f"{subject}/pre/T1/f{number}.dcm",
                     f"{subject}/pre/T1 (1)/" + name.format(number))
        with self.xnat() as server:
            dry, _, _ = self.play(server, status=0, posts=6)
            for subject, copies in twice.items():
                label, wanted = f"{subject}_pre", self.tree(subject)
                with self.subTest(subject):
                    self.assert_archived(server, label, wanted)
                    self.assertEqual(set(server.instances(label).values()), {1})
                    self.assertEqual(len(self.entries(server, label)), len(wanted))
                    for names in copies:
                        for said in (dry.text, self.log()):
                            told = self.lines(said, COPY)
                            self.assertTrue(any(name in line for name in names for line in told),
                                            f"{names}\n{said}")
            self.assertNotIn("held back", dry.text)

    @variation
    def test_what_only_looks_like_a_copy_is_sent(self) -> None:
        wanted = {}
        # The other one is left out on purpose.
        wanted["left-out"] = self.series("left-out/pre/T1")
        shutil.copytree(str(self.root / "left-out/pre/T1"),
                        str(self.root / "left-out/pre/LOCALIZER"))
        # Two sessions are two, even if somebody has copied the folder.
        for session in ("pre", "again"):
            wanted[f"copied_{session}"] = self.series(f"copied/{session}/T1",
                                                      study=uid("copied"), series=uid("T1"))
        # Another series is another scan.
        wanted["series"] = [
            self.image(f"series/pre/{name}/IM1", sop_instance=uid("the same"))
            for name in ("T1", "T2")]
        # Equal pixels of other images.
        wanted["pixels"] = [self.image(f"pixels/pre/T1/IM{number}", number, pixels=b"\1" * 512)
                            for number in (1, 2)]
        with self.xnat() as server:
            dry, _, _ = self.play(server, "--config", self.config("LOCALIZER"), status=0, posts=6)
            for name, digest in wanted.items():
                with self.subTest(name):
                    self.assert_archived(server, name if "_" in name else f"{name}_pre", digest)
        self.assertEqual(self.lines(dry, COPY, "IM"), [])

    def test_two_images_of_one_uid_fail_their_series_by_name(self) -> None:
        same, beside = uid("the same"), {}

        def fork(subject: str, *files: Tuple[str, Dict[str, Any]]) -> None:
            """Files of one series and one UID, other bytes; a good series beside them."""
            beside[subject] = self.series(f"{subject}/pre/BESIDE", files=1)
            for path, more in files:
                self.image(f"{subject}/pre/{path}", series=uid(subject, "T1"), sop_instance=same,
                           description="fieldmap", **more)

        one, other = {"pixels": b"\1" * 512}, {"pixels": b"\1" * 511 + b"\2"}
        fork("two-folders", ("fieldmap_e1/IM0001.dcm", {}), ("fieldmap_e2/IM0001.dcm", other))
        fork("one-folder", ("T1/IM1.dcm", one), ("T1/IM2.dcm", other))
        fork("subfolders", ("T1/a/IM0001.dcm", one), ("T1/b/IM0001.dcm", other))
        fork("other-size", ("T1/IM1.dcm", {"rows": 8}), ("T1/IM2.dcm", {"rows": 16}))
        fork("header-only", ("T1/IM1.dcm", one), ("T1/IM2.dcm", {"patient": "x", **one}))
        fork("copy-and-other", ("T1/IM1.dcm", one), ("T2/IM2.dcm", one), ("T3/IM3.dcm", other))
        # A good image in the same series does not go either: the series has failed.
        self.image("one-folder/pre/T1/IM3.dcm", 3, series=uid("one-folder", "T1"))
        good = self.series("good/pre/T1")
        with self.xnat() as server:
            dry, ran, again = self.play(server, status=1, posts=len(beside) + 1)
            self.assert_archived(server, "good_pre", good)
            for subject, digest in beside.items():
                with self.subTest(subject):
                    label = f"{subject}_pre"
                    self.assert_held_back(server, label, digest)
                    for said in (dry, ran, again):
                        told = "\n".join(self.lines(said, re.compile(f"{subject}[_/]pre")))
                        for path in (self.root / subject).rglob("IM[12].dcm"):
                            self.assertIn(path.name, told)
                        for folder in (self.root / subject / "pre").iterdir():
                            if folder.name != "BESIDE":
                                self.assertIn(folder.name, told)
                    self.assert_told(ran, label, "held back")
            self.assertEqual(len(server.commits()), 1)  # of the good one
            for number, path in enumerate(sorted(self.root.rglob("*.dcm")), 1):
                if path.parts[-2] != "BESIDE" and "good" not in path.parts:
                    self.image(path.relative_to(self.root).as_posix(), number)
            self.assert_mended(server, *(f"{subject}_pre" for subject in beside))


class TwoStudies(ReadTest):
    """A session folder is one study."""

    def test_two_studies_in_a_session_fail_it_before_a_byte_leaves(self) -> None:
        studies: Dict[str, Dict[str, List[str]]] = {}  # session: study: its files

        def study(subject: str, name: str, *paths: str, **more: Any) -> None:
            other = uid(subject, name)
            for number, path in enumerate(paths, 1):
                self.image(f"{subject}/pre/{path}", 10 * len(name) + number, study=other, **more)
            studies.setdefault(subject, {})[other] = [path.rpartition("/")[2] for path in paths]

        one = {"series": uid("one series")}
        study("slice", "a", "T1/a1.dcm", "T1/a2.dcm", "T1/a4.dcm", **one)
        study("slice", "scanner restarted", "T1/b3.dcm", **one)
        study("series-folder", "a", "T1/c1.dcm", "T1/c2.dcm")
        study("series-folder", "another", "T1/d3.dcm", "T1/d4.dcm")
        study("subfolder", "a", "T1/e1.dcm")
        study("subfolder", "another", "T1/old/f1.dcm")
        study("two-series", "a", "T1/g1.dcm", "T2/g2.dcm")
        study("two-series", "another", "T3/h1.dcm", "T3/h2.dcm")
        study("three", "a", "T1/i1.dcm")
        study("three", "another", "T2/j1.dcm")
        study("three", "and another", "T3/k1.dcm")
        good = self.series("good/pre/T1")
        with self.xnat() as server:
            dry, ran, again = self.play(server, status=1, posts=1)
            self.assertEqual(server.labels(), ["good_pre"])
            self.assert_archived(server, "good_pre", good)
            for said in (dry, ran, again):
                for subject, found in studies.items():
                    with self.subTest(subject):
                        self.assert_told(said, re.compile(f"{subject}[_/]pre"), "stud")
                        for each, files in found.items():
                            self.assertIn(each, said.text)
                            self.assertTrue(any(name in said.text for name in files), files)
                        for folder in (self.root / subject / "pre").iterdir():
                            self.assertIn(folder.name, said.text)

    @variation
    def test_a_study_that_is_left_out_on_purpose_is_no_second_one(self) -> None:
        wanted = self.series("007/pre/T1")
        self.series("007/pre/PHANTOM", study=uid("another"))
        self.series("007/pre/.phantom", study=uid("another"))
        with self.xnat() as server:
            self.play(server, "--config", self.config("phantom"), status=0, posts=1)
            self.assert_archived(server, "007_pre", wanted)


# ---- What is no whole image ------------------------------------------------------------------

class Damaged(ReadTest):
    """Images that are broken: named, not sent, and all others are archived."""

    @variation
    def test_images_without_sop_class_or_instance_uid_are_all_named_at_once(self) -> None:
        bad: Dict[str, List[str]] = {}
        wanted: Dict[str, List[str]] = {}

        def spoil(path: str, how: Callable[[bytes], bytes], instance: int = 9,
                  **more: Any) -> None:
            self.put(path, how(self.content(path, instance, **more)))
            bad.setdefault(path.split("/")[0], []).append(path.rpartition("/")[2])

        kinds: Dict[str, Tuple[Callable[[bytes], bytes], Dict[str, Any]]] = {
            "acr-nema": (lambda data: without(data, SOP_CLASS),
                         {"preamble": False, "explicit": False}),
            "bare": (lambda data: without(data, SOP_CLASS), {"preamble": False}),
            "no-class": (lambda data: without(data, SOP_CLASS), {}),
            "no-instance": (lambda data: without(data, SOP_INSTANCE), {}),
            "neither": (lambda data: without(without(data, SOP_CLASS), SOP_INSTANCE),
                        {"explicit": False}),
            "empty-class": (lambda data: emptied(data, SOP_CLASS), {}),
            "empty-instance": (lambda data: emptied(data, SOP_INSTANCE), {}),
        }
        for kind, (how, more) in kinds.items():
            wanted[kind] = self.series(f"{kind}/pre/T1", name="IM{}.dcm")
            spoil(f"{kind}/pre/T1/{kind}.dcm", how, **more)
        for number in range(2, 6):
            spoil(f"acr-nema/pre/T1/acr{number}.dcm", kinds["acr-nema"][0], number,
                  preamble=False, explicit=False)
        wanted["whole-series"] = self.series("whole-series/pre/T1")
        for number in (1, 2):
            spoil(f"whole-series/pre/OLD/old{number}", kinds["no-class"][0], number)
            spoil(f"whole-session/pre/OLD/older{number}", kinds["bare"][0], number, preamble=False)
        with self.xnat() as server:
            dry, ran, again = self.play(server, status=1, posts=len(wanted))
            for subject, digest in wanted.items():
                self.assert_archived(server, f"{subject}_pre", digest)
            self.assertNotIn("whole-session_pre", server.labels())
        for said in (dry, ran, again):
            self.assertNotIn("held back", said.text)
            for subject, names in bad.items():
                with self.subTest(subject):
                    self.assert_told(said, re.compile(f"{subject}[_/]pre"), "damaged")
                    for name in names:
                        self.assertIn(name, said.text)

    KINDS: Dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda data: b"",
        "zeros": lambda data: bytes(len(data)),
        "few zeros": lambda data: bytes(100),
        "after 100 bytes": lambda data: data[:100],
        "in the meta header": lambda data: data[:200],
        "before the SOP UIDs": lambda data: data[:place_of(SOP_CLASS, data)[0]],
        "in the SOP instance": lambda data: data[:place_of(SOP_INSTANCE, data)[1] + 5],
        "in the study": lambda data: data[:place_of(STUDY, data)[1] + 5],
        "in the pixels": lambda data: data[:-256],
        "before the last pixel": lambda data: data[:-2],
        "LFS pointer": lambda data: LFS,
        "annex pointer": lambda data: ANNEX,
    }

    def test_broken_images_are_named_and_the_rest_is_archived(self) -> None:
        wanted, bad = {}, {}
        encodings = {"implicit": {"explicit": False}, "bare": {"preamble": False},
                     "bare implicit": {"preamble": False, "explicit": False}}
        kinds = or_at_hand(
            {**self.KINDS, **dict.fromkeys(encodings, self.KINDS["in the pixels"])}, "empty",
            "zeros", "in the meta header", "in the study", "in the pixels", "bare implicit",
            "LFS pointer")
        for number, (kind, spoil) in enumerate(kinds.items()):
            subject, name = kind.replace(" ", "_"), f"k{number}_{{:04d}}.dcm"
            more = encodings.get(kind, {})
            wanted[subject] = self.series(f"{subject}/pre/T1", files=2, name=name, **more)
            whole = self.content(f"{subject}/pre/T1/x", 4, **more)
            bad[subject] = f"{subject}/pre/T1/" + name.format(4), spoil(whole), whole
            self.put(*bad[subject][:2])
        with self.xnat() as server:
            dry, ran, again = self.play(server, status=1, posts=len(wanted))
            for subject, digest in wanted.items():
                with self.subTest(subject):
                    self.assert_archived(server, f"{subject}_pre", digest)
                    for said in (dry, ran, again):
                        self.assert_told(said, re.compile(f"{subject}[_/]pre"), "damaged")
                        self.assertIn(bad[subject][0].rpartition("/")[2], said.text)
            self.assertNotIn("held back", dry.text + ran.text)
            # Somebody copies them again: only they are sent, and each merges with its series.
            for path, _, whole in bad.values():
                self.put(path, whole)
            before = len(server.imports())
            self.assert_mended(server, *(f"{subject}_pre" for subject in wanted),
                               posts=len(wanted))
            self.assertEqual([len(post.entries) for post in server.imports()[before:]],
                             [1] * len(wanted))

    @variation
    def test_a_file_that_is_named_as_its_neighbours_are_is_damaged_by_any_naming(self) -> None:
        names = {"uids": "1.2.840.113619.2.5.17.{}", "numbers": "{:08d}", "plain": "IM{:06d}",
                 "typed": "MR.1.3.12.2.1107.{}", "siemens": "{:04d}.IMA", "upper": "I{}.DCM"}
        contents = (b"", bytes(1000), LFS)
        wanted, bad = {}, {}
        for kind, name in names.items():
            wanted[kind] = self.series(f"{kind}/pre/T1", name=name)
            bad[kind] = [name.format(number) for number in (11, 12, 13)]
            for other, content in zip(bad[kind], contents):
                self.put(f"{kind}/pre/T1/{other}", content)
        # A clone without git-lfs has no neighbours to compare with: all are pointers.
        wanted["clone"], bad["clone"] = self.series("clone/pre/T1"), ["b1.dcm", "b2.dcm"]
        for other in bad["clone"]:
            self.put(f"clone/pre/T2/{other}", LFS)
        with self.xnat() as server:
            for said in self.play(server, status=1, posts=len(wanted)):
                for kind, others in bad.items():
                    with self.subTest(kind):
                        self.assert_told(said, re.compile(f"{kind}[_/]pre"), "damaged")
                        for other in others:
                            self.assertIn(other, said.text)
            for kind, digest in wanted.items():
                self.assert_archived(server, f"{kind}_pre", digest)


class Packed(ReadTest):
    """Archives that hold images must be unpacked; others are nothing."""

    def images(self, path: str, *instances: int) -> Dict[str, bytes]:
        """Images of a series, in memory."""
        return {f"IM{number}.dcm": self.content(path, number) for number in instances}

    def test_packed_images_are_named_and_what_is_unpacked_arrives(self) -> None:
        good = {}
        later: List[Tuple[str, Dict[str, bytes]]] = []

        def pack(path: str, files: Dict[str, bytes], packed: bytes, into: str) -> None:
            subject = path.split("/")[0]
            if subject not in good and not subject.startswith("only"):
                good[subject] = self.series(f"{subject}/pre/GOOD")
            self.put(path, packed)
            later.append((path, {f"{into}/{name}": content for name, content in files.items()}))

        for number, content in enumerate(self.images("gz/pre/T1/x", 1, 2).values(), 1):
            pack(f"gz/pre/T1/gz{number}.dcm.gz", {f"gz{number}.dcm": content},
                 gzip.compress(content), "gz/pre/T1")
        for kind, make in cases(("zip", zipped), ("tgz", tarred),
                                ("tar", lambda files: tarred(files, "w"))):
            inside = f"{kind}-inside"
            files = self.images(f"{inside}/pre/GOOD/x", 11, 12)
            pack(f"{inside}/pre/GOOD/{kind}1.{kind}", files, make(files), f"{inside}/pre/GOOD")
            files = self.images(f"{kind}-named-oddly/pre/GOOD/x", 11)
            pack(f"{kind}-named-oddly/pre/GOOD/odd.{kind}.dat", files, make(files),
                 f"{kind}-named-oddly/pre/GOOD")
            files = self.images(f"{kind}-instead/pre/FLAIR/x", 1, 2)
            pack(f"{kind}-instead/pre/FLAIR.{kind}", files,
                 make({f"FLAIR/deep/{name}": content for name, content in files.items()}),
                 f"{kind}-instead/pre/FLAIR")
        files = self.images("tar-gz/pre/T2/x", 1)
        pack("tar-gz/pre/T2.tar.gz", files, tarred({"README": NOTES, "notes.txt": NOTES, **files}),
             "tar-gz/pre/T2")
        files = self.images("a-viewer-first/pre/T2/x", 1)
        pack("a-viewer-first/pre/T2.zip", files, zipped(
            {**{f"VIEWER/{number}.dll": NOTES for number in range(30)}, **files}),
             "a-viewer-first/pre/T2")
        files = self.images("only-packed/pre/T1/x", 1)
        pack("only-packed/pre/T1.zip", files, zipped(files), "only-packed/pre/T1")
        with self.xnat() as server:
            for said in self.play(server, status=1, posts=len(good)):
                for path, _ in later:
                    with self.subTest(path):
                        subject, _, name = path.partition("/")
                        self.assert_told(said, re.compile(f"{subject}[_/]pre"), "packed")
                        self.assertIn(name.rpartition("/")[2], said.text)
                self.assertIn("unpack", said.text)
            for subject, digest in good.items():
                self.assertEqual(server.stored(f"{subject}_pre"), sorted(digest))
            for path, files in later:
                (self.root / path).unlink()
                for name, content in files.items():
                    self.put(name, content)
            labels = {f"{path.split('/')[0]}_pre" for path, _ in later}
            self.assert_mended(server, *sorted(labels))

    def test_archives_without_images_are_not_dicom(self) -> None:
        wanted = self.series("007/pre/T1")
        packed = {"notes.zip": zipped({"a.txt": NOTES, "b/c.txt": b"", "d.jpg": JUNK["photo.jpg"]}),
                  "notes.tar.gz": tarred({"a.txt": NOTES}), "notes.tar": tarred({"a": NOTES}, "w"),
                  "notes.gz": gzip.compress(NOTES), "nothing.zip": zipped({}),
                  "cut.zip": zipped({"a.txt": NOTES})[:40], "cut.gz": gzip.compress(NOTES)[:15],
                  "no.zip": b"PK\3\4" + b"\xff" * 100, "no.gz": b"\x1f\x8b" + b"\xff" * 100}
        for name, content in packed.items():
            self.put(f"007/pre/T1/{name}", content)
            self.put(f"007/pre/{name}", content)
        with self.xnat() as server:
            ran = self.run_it(server, status=0, posts=1)
            self.assert_archived(server, "007_pre", wanted)
            self.assertNotIn("unpack", ran.text)
        for name in packed:
            self.assert_told(self.log(), f"T1/{name}")


class Unfinished(ReadTest):
    """Names that say that somebody still writes there."""

    def test_a_series_with_a_file_that_is_being_written_fails_until_it_is_done(self) -> None:
        names = {"part": "IM3.dcm.part", "filepart": "IM3.dcm.filepart",
                 "partial": "IM3.dcm.partial", "chrome": "IM3.dcm.crdownload",
                 "rsync": ".IM3.dcm.Xa3kQz", "rsync-2": ".IM3.dcm.0aB9zZ",
                 "rsync-uid": ".1.2.840.113619.2.5.Q2x0Yz", "subfolder": "more/IM3.dcm.part",
                 "whole": "IM3.dcm.part", "empty": "IM3.dcm.part", "zeros": "IM3.dcm.filepart"}
        names = or_at_hand(names, "part", "rsync", "rsync-uid", "subfolder", "empty")
        beside = {}
        for kind, name in names.items():
            beside[kind] = self.series(f"{kind}/pre/BESIDE", files=1)
            self.series(f"{kind}/pre/T1", name="IM{}.dcm")
            whole = self.content(f"{kind}/pre/T1/{name}", 3)
            cut = {"whole": len(whole), "empty": 0}.get(kind, len(whole) // 2)
            self.put(f"{kind}/pre/T1/{name}", bytes(999) if kind == "zeros" else whole[:cut])
        # The one that is being written may have a finished name beside it.
        beside["both"] = self.series("both/pre/BESIDE", files=1)
        self.series("both/pre/T1", files=3, name="IM{}.dcm")
        names["both"] = "IM3.dcm.part"
        self.put("both/pre/T1/IM3.dcm.part", (self.root / "both/pre/T1/IM3.dcm").read_bytes()[:999])
        good = self.series("good/pre/T1")
        with self.xnat() as server:
            for said in self.play(server, status=1, posts=len(names) + 1):
                for kind, name in names.items():
                    with self.subTest(kind):
                        self.assert_told(said, re.compile(f"{kind}[_/]pre"), "unfinished")
                        self.assertIn(name.rpartition("/")[2], said.text)
            for kind, digest in beside.items():
                self.assert_held_back(server, f"{kind}_pre", digest)
            self.assert_archived(server, "good_pre", good)
            for kind, name in names.items():
                (self.root / kind / "pre/T1" / name).unlink()
                if kind != "both":
                    self.image(f"{kind}/pre/T1/IM3.dcm", 3)
            self.assert_mended(server, *(f"{kind}_pre" for kind in names), posts=len(names))

    def test_names_that_only_look_unfinished_are_no_trouble(self) -> None:
        names = ("IM.part1.dcm", "partial", "IM.Xa3kQz", "part.dcm", "1.2.part.3")
        wanted = [self.image(f"007/pre/T1/{name}", number) for number, name in enumerate(names, 1)]
        self.put("007/pre/T1/.dropbox.device", NOTES)  # a dot, a name, a dot, six letters
        self.put("007/pre/T1/.gitattributes", NOTES)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1)
            self.assert_archived(server, "007_pre", wanted)


# ---- What cannot be sent ---------------------------------------------------------------------

class CannotBeSent(ReadTest):
    """Files that no zip can hold, or that XNAT would take for something else."""

    def test_what_cannot_be_sent_fails_its_series_by_name_and_no_other(self) -> None:
        self.need_held_root()
        locked = self.folder / "locked"
        locked.mkdir()
        (locked / "IM9").write_bytes(b"x")

        def unreadable_folder(series: Path) -> None:
            (series / "inner").mkdir()
            (series / "inner/IM9").write_bytes(b"x")
            self.hold(series / "inner")

        cases: Dict[str, Tuple[Callable[[Path], Any], str]] = {
            "dangling-link": (lambda series: (series / "IM9.dcm").symlink_to("no"), "IM9.dcm"),
            "dangling-folder": (lambda series: (series / "more").symlink_to("/not/there"), "more"),
            "link-to-itself": (lambda series: (series / "self").symlink_to("self"), "self"),
            "link-into-a-closed-folder": (
                lambda series: (series / "IM9.dcm").symlink_to(locked / "IM9"), "IM9.dcm"),
            "unreadable-file": (lambda series: self.hold(series / "IM0002.dcm"), "IM0002.dcm"),
            "unreadable-series": (self.hold, "T1"),
            "series-that-can-only-be-listed": (lambda series: self.hold(series, 0o400),
                                               "IM0001.dcm"),
            "unreadable-folder-in-a-series": (unreadable_folder, "inner"),
            "line-break-in-a-file-name": (
                lambda series: (series / "IM0001.dcm").rename(series / "IM1\nIM2.dcm"),
                "IM1\\nIM2.dcm"),
            "line-break-in-a-folder-name": (
                lambda series: (series / "in\nner").mkdir() or
                (series / "IM0001.dcm").rename(series / "in\nner/IM1"), "in\\nner"),
            "file-name-that-is-not-utf-8": (
                lambda series: os.rename(os.fsencode(series / "IM0001.dcm"),
                                         os.fsencode(series) + b"/Sch\xe4del.dcm"), "del.dcm"),
            **{f"named-{suffix.replace('.', '-')}": (
                lambda series, suffix=suffix: (series / "IM0001.dcm").rename(
                    series / f"IM1.{suffix}"), f"IM1.{suffix}")
               for suffix in ("zip", "tar", "tgz", "tar.gz", "gz", "zar", "xar")},
        }
        cases = or_at_hand(
            cases, "dangling-link", "link-to-itself", "unreadable-file", "unreadable-series",
            "series-that-can-only-be-listed", "unreadable-folder-in-a-series",
            "line-break-in-a-folder-name", "file-name-that-is-not-utf-8", "named-tar-gz")
        if sys.platform == "darwin":  # no such name can be made there
            del cases["file-name-that-is-not-utf-8"]
        beside = {case: self.series(f"{case}/pre/BESIDE", files=1) for case in cases}
        for case, (spoil, _) in cases.items():
            self.series(f"{case}/pre/T1")
            spoil(self.root / case / "pre/T1")
        self.hold(locked)
        good = self.series("good/pre/T1")
        with self.xnat() as server:
            runs = self.play(server, status=1, posts=len(cases) + 1, preexec=drop_root_rights)
            self.assertEqual(set(server.archive), {("BRAIN", "good_pre")})
            self.assert_archived(server, "good_pre", good)
            for case, (_, name) in cases.items():
                with self.subTest(case):
                    self.assert_held_back(server, f"{case}_pre", beside[case])
                    for said in runs:
                        self.assert_told(said, re.compile(f"{case}[_/]pre"), "T1")
                        self.assertIn(name, "\n".join(self.lines(said, case)))
                    self.assert_told(runs[1], f"{case}_pre", "held back")
        for said in runs:
            self.assertNotIn("\udce4", said.text)


# ---- What is odd, and fine -------------------------------------------------------------------

class OddButFine(ReadTest):
    """Nothing is wrong with these."""

    def test_what_is_not_dicom_stays_out_counted_and_named(self) -> None:
        wanted = self.series("007/pre/T1", files=3)
        for name, content in JUNK.items():
            self.put(f"007/pre/T1/{name}", content)
        self.put("007/pre/PAPERS/notes.txt", NOTES)
        self.put("007/pre/PAPERS/DICOMDIR", JUNK["DICOMDIR"])
        (self.root / "007/pre/EMPTY/sub").mkdir(parents=True)
        self.put("008/pre/PAPERS/only.txt", NOTES)
        with self.xnat() as server:
            dry, ran, _ = self.play(server, "-v", status=0, posts=1)
            self.assert_archived(server, "007_pre", wanted)
            self.assertEqual(server.labels(), ["007_pre"])
        for said in (dry, ran):
            self.assert_told(said, "T1", re.compile(rf"\b{len(JUNK)}\b.*not DICOM"))
            for series in ("PAPERS", "EMPTY"):
                self.assert_told(said, series)
        for path in [f"T1/{name}" for name in JUNK] + ["PAPERS/notes.txt", "PAPERS/DICOMDIR"]:
            with self.subTest(path):
                self.assert_told(self.log(), "not DICOM", path)

    def test_dicom_is_decided_by_the_bytes_not_by_the_name(self) -> None:
        names = ("1.2.840.113619.2.5.1762583153", "IM0001", "I", "scan.txt", "photo.jpg",
                 "DICOMDIR", "Thumbs.db", "a.json", "IM.bak")
        wanted = [self.image(f"007/pre/T1/{name}", number)
                  for number, name in enumerate(names, 1)]
        bare = self.series("007/pre/EXPLICIT", preamble=False)
        bare += self.series("007/pre/IMPLICIT", preamble=False, explicit=False)
        bare += self.series("007/pre/IMPLICIT_FILE", explicit=False)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=4)
            self.assert_archived(server, "007_pre", wanted + bare)

    def test_files_in_folders_of_a_series_arrive_also_with_equal_names(self) -> None:
        names = ("IM1", "a/IM1", "b/IM1", "b/c/d/e/IM1", "b/c/d/e/IM2", "cache/IM1")
        wanted = [self.image(f"007/pre/T1/{name}", number)
                  for number, name in enumerate(names, 1)]
        self.image("007/pre/T1/.cache/IM1", 99)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1)
            self.assert_archived(server, "007_pre", wanted)

    def test_file_names_with_any_character_arrive(self) -> None:
        names = ("-x.dcm", "-@", "--help", "@", "@list", "[1].dcm", "[", "*", "?", "a b", " before",
                 "after ", "a'b", 'a"b', "$(touch hit)", "`touch hit`", "a;b,c", "a\\b", "a\tb",
                 "a\x1bb", "#", "%41", "~", "\u00fc\u00df", "\u65e5\u672c", "\U0001f9e0", "A", "a",
                 "x" * 250, "x..", "a:b", "a|b&c", "{1..3}", "!", "=1+1")
        wanted = [self.image(f"007/pre/T1/{name}", number)
                  for number, name in enumerate(names, 1)]
        for locale in ({"LANG": "C.UTF-8"}, {"LC_ALL": "C"}):
            with self.subTest(locale), self.xnat() as server:
                self.run_it(server, "--again", status=0, environment=locale)
                arrived = Counter(server.stored("007_pre"))
                self.assertEqual([name for name, digest in zip(names, wanted)
                                  if arrived[digest] != 1], [])
                self.assert_archived(server, "007_pre", wanted)
                self.run_it(server, status=0, posts=0, environment=locale)
        self.assertEqual(list(self.folder.rglob("hit")), [])

    def test_links_to_a_good_file_and_to_a_folder_of_files_are_followed(self) -> None:
        wanted = self.series("007/pre/T1")
        outside = self.folder / "elsewhere"
        write_series(outside, study=uid("007", "pre"), number=77, files=3)
        wanted += digests(outside).values()
        (outside / "IM0003.dcm").rename(self.folder / "IM0003.dcm")
        (self.root / "007/pre/T1/one.dcm").symlink_to(self.folder / "IM0003.dcm")
        (self.root / "007/pre/T1/more").symlink_to(outside)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1)
            self.assert_archived(server, "007_pre", wanted)

    def test_a_link_to_a_folder_above_ends_and_is_named(self) -> None:
        wanted = self.series("007/pre/T1")
        (self.root / "007/pre/T1/loop").symlink_to("..")
        (self.root / "007/pre/T1/again").symlink_to(".")
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1)
            self.assert_archived(server, "007_pre", wanted)
        for name in ("T1/loop", "T1/again"):
            self.assertIn(name, self.log())

    def test_folders_that_link_to_each_other_end_and_send_nothing_twice(self) -> None:
        self.image("007/pre/T1/a/IM1", 1)
        self.image("007/pre/T1/b/IM2", 2)
        for name in ("x", "y"):  # two ways at each step: 2 to the 40th paths
            (self.root / "007/pre/T1/a" / name).symlink_to("../b")
            (self.root / "007/pre/T1/b" / name).symlink_to("../a")
        wanted = self.series("007/pre/T2")
        with self.xnat() as server:
            try:
                ran = self.upload(server, timeout=10)
            except subprocess.TimeoutExpired:
                self.fail("hangs in folders that link to each other")
            self.assertIn(ran.status, (0, 1), ran.text)
            self.assertEqual(set(server.instances("007_pre").values()), {1})
            self.assertLessEqual(set(wanted), set(server.stored("007_pre")))
            self.assertLessEqual(len(server.stored("007_pre")), 4)

    def test_a_fifo_and_a_socket_are_no_dicom_and_nobody_waits_for_them(self) -> None:
        wanted = self.series("007/pre/T1")
        os.mkfifo(str(self.root / "007/pre/T1/pipe"))
        bind = "import socket; socket.socket(socket.AF_UNIX).bind('socket')"
        subprocess.run([sys.executable, "-c", bind], check=True, cwd=str(self.root / "007/pre/T1"))
        with self.xnat() as server:
            self.run_it(server, status=0, posts=1, timeout=20)
            self.assert_archived(server, "007_pre", wanted)
        for name in ("T1/pipe", "T1/socket"):
            self.assert_told(self.log(), "not DICOM", name)


# ---- What changes ----------------------------------------------------------------------------

class Changes(ReadTest):
    """Folders that are not as they were."""

    def at_import(self, server: Standin, actions: Dict[str, Callable[[], Any]]) -> None:
        """Do this when the first image of a series of that name reaches the server."""
        def look(description: str) -> bool:
            actions.pop(description, lambda: None)()
            return False

        server.knobs.reject = look

    @variation
    def test_a_folder_that_changes_while_it_is_sent_is_held_back_and_then_completed(self) -> None:
        cases = ("comes", "comes-deeper", "series-comes", "goes", "changes", "grows")
        for case in cases + ("touched", "good"):
            self.series(f"{case}/pre/{case}", files=3)
        changes: Dict[str, Callable[[], Any]] = {
            "comes": lambda: self.image("comes/pre/comes/IM0004.dcm", 4),
            "comes-deeper": lambda: self.image("comes-deeper/pre/comes-deeper/x/IM9", 9),
            "series-comes": lambda: self.series("series-comes/pre/more"),
            "goes": lambda: (self.root / "goes/pre/goes/IM0003.dcm").unlink(),
            "changes": lambda: self.image("changes/pre/changes/IM0002.dcm", 2, pixels=b"\1" * 512),
            "grows": lambda: self.image("grows/pre/grows/IM0002.dcm", 2, rows=32),
            "touched": lambda: [os.utime(str(path), (1e9, 1e9)) for path in
                                (self.root / "touched/pre/touched").iterdir()],
        }
        first = {case: self.tree(case) for case in cases}
        with self.xnat() as server:
            self.at_import(server, dict(changes))
            ran = self.run_it(server, status=1)
            self.assertEqual({label for _, label in server.archive}, {"touched_pre", "good_pre"})
            for case in cases:
                with self.subTest(case):
                    self.assert_told(ran, f"{case}_pre", "held back")
                    self.assert_held_back(server, f"{case}_pre", first[case])
            self.run_it(server, status=0)
            self.assertEqual(len(server.archive), len(cases) + 2)
            for case in cases:
                with self.subTest(case):
                    # What has gone here stays there: more than ours is no failure.
                    self.assert_archived(server, f"{case}_pre",
                                         first[case] if case == "goes" else self.tree(case))
            self.run_it(server, status=0, posts=0)

    def test_files_that_come_while_another_session_is_sent_are_never_lost(self) -> None:
        self.series("007/pre/slow", files=1)
        self.series("008/pre/fast", files=2)
        with self.xnat() as server:
            self.at_import(server, {"slow": lambda: [
                self.image(f"008/pre/fast/new{number}", number) for number in (7, 8)]})
            ran = self.upload(server, "--procs", "1")
            if ran.status == 0:  # it was read late enough
                self.assert_archived(server, "008_pre", self.tree("008"))
            else:
                self.assertEqual(ran.status, 1, ran.text)
                self.assertNotIn(("BRAIN", "008_pre"), server.archive)
            self.assert_mended(server, "007_pre", "008_pre")

    @variation
    def test_other_times_alone_are_no_change(self) -> None:
        shifts: Dict[str, Callable[[int], int]] = {
            "summer": lambda moment: moment + 3600 * 10 ** 9,
            "winter": lambda moment: moment - 3600 * 10 ** 9,
            "tar": lambda moment: moment // 10 ** 9 * 10 ** 9,
            "fat": lambda moment: moment // (2 * 10 ** 9) * 2 * 10 ** 9,
            "copied": lambda moment: 1_700_000_000 * 10 ** 9 + 5,
            "one": lambda moment: moment,
        }
        paths: Dict[str, List[Path]] = {}
        for number, kind in enumerate(shifts):
            self.series(f"{kind}/pre/T1", files=3)
            self.series(f"{kind}/pre/T2", files=1)
            paths[kind] = sorted((self.root / kind).rglob("*.dcm"))
            for path in paths[kind]:
                moment = 1_600_000_001_234_567_890 + number
                os.utime(str(path), ns=(moment, moment))
        with self.xnat() as server:
            self.run_it(server, status=0, posts=2 * len(shifts))
            before = server.tree()
            for kind, shift in shifts.items():
                for path in paths[kind][:1] if kind == "one" else paths[kind]:
                    moment = shift(path.stat().st_mtime_ns) + (99 if kind == "one" else 0)
                    os.utime(str(path), ns=(moment, moment))
            commits = len(server.commits())
            self.dry_run(server, status=0)
            ran = self.run_it(server, "-v", status=0, posts=0)
            self.run_it(server, status=0, posts=0)
            self.assertEqual((server.tree(), len(server.commits())), (before, commits))
        for kind in shifts:
            self.assert_told(ran, f"{kind}_pre", "already there")

    @variation
    def test_what_is_added_to_an_archived_session_is_sent_alone_and_merges(self) -> None:
        added: Dict[str, List[str]] = {}
        for subject in ("file", "files", "deeper", "folder"):
            self.series(f"{subject}/pre/T1", files=4)
        with self.xnat() as server:
            self.run_it(server, status=0, posts=4)
            for path in ("file/pre/T1/IM0005.dcm", "files/pre/T1/IM0006.dcm",
                         "files/pre/T1/IM0007.dcm", "deeper/pre/T1/more/IM0008",
                         "folder/pre/T1_more/IM0009.dcm"):
                subject, name = path.split("/")[0], path.rpartition("/")[2]
                self.image(path, int(name[2:6]), series=uid(uid(subject, "pre"), "T1"))
                added.setdefault(f"{subject}_pre", []).append(name)
            self.series("file/pre/T2", name="a{}.dcm")
            added["file_pre"] += ["a1.dcm", "a2.dcm"]
            before = {label: Counter(self.entries(server, label)) for label in added}
            self.dry_run(server, status=0)
            self.run_it(server, status=0, posts=5)
            for label, names in added.items():
                with self.subTest(label):
                    sent = Counter(self.entries(server, label)) - before[label]
                    self.assertEqual(sorted(sent.elements()), sorted(names))
                    self.assert_archived(server, label, self.tree(label.partition("_")[0]))
                    scans = server.archive["BRAIN", label].scans
                    self.assertEqual(len(scans), 2 if label == "file_pre" else 1)
            self.run_it(server, status=0, posts=0)


class Opening(ReadTest):
    """Which files are opened, and when."""

    def test_a_rerun_over_what_is_archived_opens_no_file(self) -> None:
        for subject in ("007", "008"):
            self.series(f"{subject}/pre/T1", name=f"{subject}_a{{}}.dcm")
            self.series(f"{subject}/post/T1", name=f"{subject}_b{{}}.dcm", files=1)
        self.put("007/pre/T1/notes.txt", NOTES)
        self.put("007/pre/PAPERS/papers.txt", NOTES)
        self.put("007/pre/T1/007_copy.dcm", (self.root / "007/pre/T1/007_a1.dcm").read_bytes())
        with self.xnat() as server:
            self.run_it(server, environment=self.watched(), status=0, posts=4)
            self.assertGreaterEqual(len({each.name for each in self.opened()}), 6)
            for _ in range(2):
                self.run_it(server, environment=self.watched(), status=0, posts=0)
                self.assertEqual(self.opened(), [])
            # One session that differs is read, and no other.
            self.image("008/post/T1/new.dcm", 9)
            self.run_it(server, environment=self.watched(), status=0, posts=1)
            self.assertEqual({each.name for each in self.opened()} - {"008_b1.dcm"}, {"new.dcm"})

    def test_the_first_byte_leaves_before_most_files_are_opened(self) -> None:
        sessions = 60
        for number in range(sessions):
            self.series(f"s{number:02}/pre/T1", files=1, name=f"s{number:02}.dcm")
        with self.xnat() as server:
            server.fail("stall", IMPORT, seconds=60, times=None)
            process = self.start(self.arguments(server.url, "--procs", "2"), self.watched())
            self.assertTrue(server.wait_for(server.imports, 20))
            first = server.imports()[0].started
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=20)
            self.assertEqual(process.returncode, 143, out + err)
        opened = {each.name for each in self.opened() if each.moment < first}
        self.assertTrue(0 < len(opened) <= sessions // 3, f"{len(opened)} opened")

    def test_files_that_are_waited_for_are_read_several_at_a_time(self) -> None:
        share = Share(self.folder, 4 * READERS)
        found = [header for _, _, header in read_files(share.files, lambda: None)]
        self.assertEqual([getattr(each, "sop", each) for each in found], share.sops)
        self.assertEqual(set(share.at_once[:READERS]), {1})  # it is not known yet
        self.assertEqual(max(share.at_once), READERS)

    def test_files_of_a_quick_disk_are_read_one_after_another(self) -> None:
        """Threads would only be in each other's way."""
        self.series("007/pre/T1", files=4 * READERS)
        readers: Set[int] = set()

        def tick() -> None:
            readers.add(threading.get_ident())

        series = Series("T1", str(self.root / "007/pre/T1"))
        found = list(read_files([(series, File(each.name, each.stat().st_size, 0))
                                 for each in os.scandir(series.folder)], tick))
        self.assertEqual((len(found), readers), (4 * READERS, {threading.get_ident()}))


class Share:
    """Files that are waited for: pipes, each with a writer that takes a millisecond, or until
    as many are read at a time as ever will be."""

    def __init__(self, folder: Path, files: int) -> None:
        self.at_once: List[int] = []  # how many were being read when this one was opened
        self.sops = [uid("share", number) for number in range(files)]
        self.files: List[Tuple[Series, File]] = []
        self._going = 0
        self._change = threading.Condition()
        for number, sop in enumerate(self.sops):
            data = dicom_file(study=uid("share"), series=uid("share", "T1"), sop_instance=sop)
            self.files.append((Series("T1", str(folder)), File(f"{number}.dcm", len(data), 0)))
            os.mkfifo(folder / f"{number}.dcm")
            threading.Thread(target=self._write, args=(folder / f"{number}.dcm", data),
                             daemon=True).start()

    def _write(self, path: Path, data: bytes) -> None:
        with path.open("wb") as pipe:  # once somebody reads
            with self._change:
                self._going += 1
                self.at_once.append(self._going)
                self._change.notify_all()
                alone = len(self.at_once) <= READERS
                self._change.wait_for(lambda: max(self.at_once) >= READERS,
                                      0.001 if alone else 10)
                self._going -= 1
            pipe.write(data)


if __name__ == "__main__":
    unittest.main()
