"""What the first bytes of a file say: the UIDs of DICOM in every encoding, what is damaged, what is
blank, and what is something else. pydicom is the judge, on its own files."""

import contextlib
import json
import os
import random
import struct
import subprocess
import tempfile
import unittest
import zlib
from pathlib import Path
from typing import Any, Dict, List, Tuple

from dicomUpload import Header, header_of, read_header
from tests.dicom import DEFLATED_LE, EXPLICIT_LE, IMPLICIT_LE, dicom_file, dicomdir_file, element
from tests.support import WHOLE, missing, sealed_environment

SOP, STUDY, SERIES = "1.2.3", "1.2.3.4", "1.2.3.4.5"
OWN = Header("DICOM", SOP, STUDY, SERIES)
NONE = 0xFFFFFFFF
SOP_CLASS_TAG, SOP_TAG, STUDY_TAG, SERIES_TAG = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E
PIXEL_TAG = 0x7FE00010


def image(**more: Any) -> bytes:
    return dicom_file(sop_instance=SOP, study=STUDY, series=SERIES, **more)


def head(tag: int, vr: str, length: int, order: str = "<") -> bytes:
    """The beginning of an element with a 32-bit length; implicit without a value representation."""
    form = order + ("HH2sHI" if vr else "HHI")
    return struct.pack(form, tag >> 16, tag & 0xFFFF, *((vr.encode(), 0) if vr else ()), length)


def item(content: bytes, defined: bool = False, order: str = "<") -> bytes:
    if defined:
        return head(0xFFFEE000, "", len(content), order) + content
    return head(0xFFFEE000, "", NONE, order) + content + head(0xFFFEE00D, "", 0, order)


def sequence(content: bytes, vr: str = "SQ", defined: bool = False, order: str = "<") -> bytes:
    """A sequence that comes before the file's own UIDs, when sorted."""
    if defined:
        return head(0x00080006, vr, len(content), order) + content
    return head(0x00080006, vr, NONE, order) + content + head(0xFFFEE0DD, "", 0, order)


def others(explicit: bool = True, order: str = "<") -> bytes:
    """UIDs of other files, as they stand in the items of sequences."""
    return b"".join(element(tag, "UI", "9.9.9", explicit, order) for tag in (
        SOP_CLASS_TAG, SOP_TAG, 0x00081150, 0x00081155, STUDY_TAG, SERIES_TAG))


def implicit(*elements: Tuple[int, int]) -> bytes:
    """Implicit elements of these tags and lengths."""
    return b"".join(element(tag, "", bytes(length), False) for tag, length in elements)


def encapsulated(*lengths: int) -> bytes:
    """Pixel data in fragments of these lengths, after an empty offset table."""
    return head(PIXEL_TAG, "OB", NONE) + item(b"", True) + b"".join(
        item(bytes(length), True) for length in lengths)


class HeaderTest(unittest.TestCase):
    maxDiff = None

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "file")

    def read(self, content: bytes) -> Header:
        with contextlib.suppress(FileNotFoundError):  # ext4 writes out what is written over
            os.unlink(self.path)
        Path(self.path).write_bytes(content)
        return read_header(self.path, len(content))

    def check(self, rows: Dict[str, Tuple[bytes, Header]]) -> None:
        for name, (content, wanted) in rows.items():
            with self.subTest(name):
                self.assertEqual(self.read(content), wanted)

    def check_kind(self, rows: Dict[str, bytes], kind: str, why: str = "") -> None:
        for name, content in rows.items():
            with self.subTest(name):
                found = self.read(content)
                self.assertEqual((found.kind, found.why), (kind, why))


BIG = item(others(order=">"), order=">")
PLAIN = element(0x00070010, "LO", "SOME")
FIRST = {  # what may stand before the file's own UIDs, in an explicit data set
    "a sequence": sequence(item(others())),
    "a sequence of defined length": sequence(item(others(), True), defined=True),
    "defined length in undefined": sequence(item(others(), True) * 3),
    "an empty sequence": sequence(b""),
    "a sequence in a sequence": sequence(item(sequence(item(others()) * 2) + others())),
    "undefined in defined": sequence(item(sequence(item(others())), True), defined=True),
    "an UN of undefined length, implicit inside": sequence(item(others(False)), "UN"),
    "an UN in a sequence": sequence(item(sequence(item(others(False)), "UN") + others())),
    "an item without its end": sequence(head(0xFFFEE000, "", NONE) + others()),
    "an end of an item too many": sequence(item(others(), True) + head(0xFFFEE00D, "", 0)),
    "the same in an inner sequence": sequence(item(sequence(
        item(others(), True) + head(0xFFFEE00D, "", 0)) + others())),
    "an item with a length that reads DS": sequence(item(bytes(0x5344), True) + item(others())),
    "an implicit item": sequence(item(others(False))),
    "a private element": element(0x00070010, "LO", "PRIVATE") + element(0x00071001, "UN", b"12"),
    "a value longer than the first read": element(0x00070010, "OB", bytes(20000)),
    "a value longer than all reads": element(0x00070010, "OB", bytes(200000)),
    "a value that holds what looks like UIDs": element(0x00070010, "OB", others()),
    "many elements": b"".join(element(0x00070000 + each, "LO", "SOME") for each in range(4000)),
    "a new representation": head(0x00070011, "ZZ", 4) + b"1234",
    "a new representation, short": PLAIN.replace(b"LO", b"YY"),
    "an implicit element": PLAIN + element(0x00070011, "LO", "SOME", False),
    "what is out of order": element(0x00181000, "LO", "1") + element(0x00080014, "UI", "9.9"),
}


class DicomIsReadByParsing(HeaderTest):

    def test_the_uids_are_found_in_every_encoding(self) -> None:
        self.check({name: (content, OWN) for name, content in {
            "explicit": image(), "implicit": image(explicit=False), "big-endian": image(order=">"),
            "deflated": image(syntax=DEFLATED_LE),
            "deflated, long": image(syntax=DEFLATED_LE, rows=1024, columns=1024),
            "deflated, very long": image(syntax=DEFLATED_LE, rows=2048, columns=2048),
            "bare explicit": image(preamble=False),
            "bare implicit": image(preamble=False, explicit=False),
            "bare big-endian": image(preamble=False, order=">"),
            "bare implicit big-endian": image(preamble=False, explicit=False, order=">"),
            "bare meta elements": image()[132:],
            "no meta elements": bytes(128) + b"DICM" + image(preamble=False),
            "no meta elements, implicit": bytes(128) + b"DICM" + image(preamble=False,
                                                                       explicit=False),
            "says explicit, is implicit": image(explicit=False, syntax=EXPLICIT_LE),
            "says implicit, is explicit": image(syntax=IMPLICIT_LE),
            "says little-endian, is big": image(order=">", syntax=EXPLICIT_LE),
            "says nothing known": image(syntax="1.2"),
            "a preamble of its own": b"II*\0" + image()[4:],
        }.items()})

    def test_what_stands_before_the_uids_is_passed_over(self) -> None:
        self.check({f"{name}{', deflated' if syntax else ''}": (image(first=first, syntax=syntax),
                                                                OWN)
                    for name, first in FIRST.items() for syntax in ("", DEFLATED_LE)})

    def test_a_tag_may_lie_across_the_end_of_what_was_read(self) -> None:
        for size in range(7700, 7900, 2):
            first = element(0x00070010, "OB", bytes(size)) + element(0x00070011, "OB", others()) * 2
            with self.subTest(size):
                self.assertEqual(self.read(image(first=first)), OWN)

    def test_more_is_asked_for_until_the_uids_are_reached(self) -> None:
        for content in (image(), image(explicit=False), image(syntax=DEFLATED_LE)):
            kinds = [header_of(content[:count], len(content)).kind
                     for count in range(132, len(content))]
            self.assertEqual(kinds, sorted(kinds, reverse=True))
            self.assertEqual(set(kinds), {"more", "DICOM"})

    def test_so_it_is_in_the_other_encodings(self) -> None:
        plain = sequence(item(others(False)), "")
        self.check({
            "implicit": (image(explicit=False, first=plain), OWN),
            "nested": (image(explicit=False, first=sequence(item(plain * 3 + others(False)), "")),
                       OWN),
            "big-endian": (image(order=">", first=sequence(BIG, order=">")), OWN),
            "big-endian, UN": (image(order=">", first=head(0x00080006, "UN", NONE, ">") + item(
                others(False)) + head(0xFFFEE0DD, "", 0)), OWN),
        })

    def test_uids_lose_their_padding(self) -> None:
        for padding in (b"", b"\0", b" ", b"\0\0\0", b"   ", b"\\1.2"):
            first = element(SOP_TAG, "UI", b"1.2.3" + padding)
            with self.subTest(padding):
                self.assertEqual(self.read(image(first=first, without=(SOP_TAG,))), OWN)

    def test_a_wrong_or_missing_length_of_group_2_is_no_matter(self) -> None:
        good = image()
        self.check({"wrong": (good[:140] + b"\1\2\0\0" + good[144:], OWN),
                    "huge": (good[:140] + b"\xff" * 4 + good[144:], OWN),
                    "missing": (good[:132] + good[144:], OWN)})

    def test_only_the_data_set_counts_and_only_up_to_the_series_uid(self) -> None:
        self.check({
            "no series": (image(without=(SERIES_TAG,)), Header("DICOM", SOP, STUDY)),
            "no study": (image(without=(STUDY_TAG,)), Header("DICOM", SOP, "", SERIES)),
            "neither": (image(without=(STUDY_TAG, SERIES_TAG)), Header("DICOM", SOP)),
            "only the UIDs": (bytes(128) + b"DICM" + element(SOP_CLASS_TAG, "UI", "1.2") + element(
                SOP_TAG, "UI", SOP), Header("DICOM", SOP)),
        })

    def test_what_is_behind_the_pixels_is_not_looked_at(self) -> None:
        self.check({str(len(tail)): (image() + tail, OWN) for tail in (
            b"\0", bytes(3), bytes(9), bytes(600), b"\xff" * 600, element(0xFFFCFFFC, "OB", b""))})
        bare = image(without=(PIXEL_TAG,))
        self.check({"no pixels": (bare, OWN), "a byte behind": (bare + b"\0", OWN),
                    "no order": (bare + head(0x00080005, "OB", 9999), OWN)})

    def test_encapsulated_pixels_are_whole(self) -> None:
        bare = image(without=(PIXEL_TAG,))
        end = head(0xFFFEE0DD, "", 0)
        self.check({
            "one": (bare + encapsulated(500) + end, OWN),
            "three": (bare + encapsulated(500, 20000, 90000) + end, OWN),
            "no end": (bare + encapsulated(500), OWN),
        })

    def test_deflated_with_a_zlib_header_as_some_writers_do(self) -> None:
        deflated = image(syntax=DEFLATED_LE)
        start = deflated.index(b"SYNTHETIC ") + 10
        wrapped = zlib.compress(zlib.decompress(deflated[start:], -15), 9)
        self.assertEqual(self.read(deflated[:start] + wrapped), OWN)


class WhatIsDamagedSaysWhy(HeaderTest):

    def test_a_sop_uid_is_missing(self) -> None:
        for missing_one, why in ((SOP_CLASS_TAG, "has no SOP Class UID"),
                                 (SOP_TAG, "has no SOP Instance UID")):
            empty = element(missing_one, "UI", b"\0\0")
            nested = sequence(item(others()))
            gone = (missing_one,)
            self.check_kind({
                "explicit": image(without=gone), "implicit": image(without=gone, explicit=False),
                "deflated": image(without=gone, syntax=DEFLATED_LE),
                "empty": image(without=gone, first=empty),
                "in a sequence only": image(without=gone, first=nested),
                "bare": image(without=gone, preamble=False),
            }, "damaged", why)

    def test_an_old_file_of_acr_nema_has_no_sop_class(self) -> None:
        for order in "<>":
            content = b"".join(element(tag, "UL" if tag < 0x00080010 else "SH", value, False, order)
                               for tag, value in ((0x00080000, 100), (0x00080001, 5000),
                                                  (0x00080010, "ACR-NEMA 2.0"),
                                                  (0x00080020, "1990.01.02"), (0x00200010, "1")))
            self.check_kind({"with both lengths": content, "with one": content[12:]},
                            "damaged", "has no SOP Class UID")

    def test_a_file_ends_within_its_header(self) -> None:
        good = image()
        self.check_kind({
            "DICM": good[:131], "meta": good[:180], "UID": good[:500],
            "sequence": image(first=sequence(item(others())))[:450],
            "long value": image(first=element(0x00070010, "OB", bytes(90000)))[:50000],
            "declared too long": image(first=head(0x00070010, "OB", 90000)),
            "deflated": image(syntax=DEFLATED_LE)[:450],
            "behind an item": bytes(128) + b"DICM" + element(SOP_CLASS_TAG, "UI", "1.2") + element(
                SOP_TAG, "UI", SOP) + head(0x00081140, "SQ", NONE) + item(others()),
        }, "damaged", "ends within its header")

    def test_a_file_ends_within_its_pixels(self) -> None:
        bare = image(without=(PIXEL_TAG,))
        self.check_kind({
            "explicit": image()[:-2], "implicit": image(explicit=False)[:-2],
            "big-endian": image(order=">")[:-2], "none of them": image()[:-512],
            "large": image(rows=512, columns=512)[:-2],
            "deflated": image(syntax=DEFLATED_LE, rows=64, columns=64)[:-1000],
            "floats": bare + head(0x7FE00008, "OF", 100), "doubles": bare + head(
                0x7FE00009, "OD", 100),
            "group length": bare + element(0x7FE00000, "UL", 9) + head(PIXEL_TAG, "OW", 9),
            "offset table": bare + head(0x7FE00001, "OV", 8) + bytes(8) + encapsulated(50)[:-2],
            "encapsulated": bare + encapsulated(500)[:-2],
            "in a later fragment": bare + encapsulated(50, 500, 70000)[:-2],
        }, "damaged", "ends within its pixels")

    def test_what_is_not_deflated_though_it_says_so_is_damaged(self) -> None:
        lies = image(without=(PIXEL_TAG,), syntax=DEFLATED_LE)
        start = lies.index(b"SYNTHETIC ") + 10
        self.check_kind({"noise": lies[:start] + b"\xff" * 600}, "damaged", "cannot be inflated")

    def test_a_hole_in_the_header_is_damage(self) -> None:
        uids = element(SOP_CLASS_TAG, "UI", "1.2") + element(SOP_TAG, "UI", SOP)
        self.check_kind({"a hole": bytes(128) + b"DICM" + uids + bytes(90)}, "damaged",
                        "holds zeros where its header should go on")
        for size in (132, 400, 480):
            with self.subTest(size):
                self.assertEqual(self.read(image()[:size] + bytes(9000)).kind, "damaged")

    def test_cut_anywhere_a_file_is_never_taken_for_another(self) -> None:
        made = {"explicit": image(), "implicit": image(explicit=False), "big": image(order=">"),
                "bare": image(preamble=False), "old": image(preamble=False, explicit=False),
                "deflated": image(syntax=DEFLATED_LE),
                "nested": image(first=FIRST["a sequence in a sequence"]), "index": dicomdir_file()}
        for name, content in made.items():
            for size in range(0, len(content), 1 if WHOLE else 3):
                found = self.read(content[:size])
                for got, wanted in zip(found[1:4], OWN[1:4]):
                    self.assertIn(got, ("", wanted), (name, size))
                self.assertEqual(bool(found.why), found.kind in ("damaged", "blank"), (name, size))
                if found.kind == "DICOM":  # it lost whole elements: there is no telling
                    self.assertEqual(found.sop, SOP, (name, size))


class WhatIsBlankOrSomethingElse(HeaderTest):

    def test_a_blank_file_says_what_it_is(self) -> None:
        oid = b"oid sha256:" + b"0" * 64 + b"\nsize 5\n"
        self.check({str(content[:20]): (content, Header("blank", why=why)) for content, why in (
            (b"", "is empty"), (bytes(1), "holds only zeros"), (bytes(100), "holds only zeros"),
            (bytes(5000), "holds only zeros"), (bytes(90000), "begins with only zeros"),
            (b"\xff" * 5000, "holds only 0xFF"),
            (b"version https://git-lfs.github.com/spec/v1\n" + oid, "is a Git LFS pointer"),
            (b"/annex/objects/SHA256E-s5--00.dcm\n", "is a git-annex pointer"),
            (b"\n <!DOCTYPE html>\n<html>", "is a web page"), (b"<HTML><body>", "is a web page"),
            (b"\xef\xbb\xbf<?xml version='1.0'?>", "is XML"))})

    def test_an_index_of_other_files_is_no_image(self) -> None:
        self.check_kind({"DICOMDIR": dicomdir_file()}, "other")

    def test_other_files_are_not_taken_for_damaged_dicom(self) -> None:
        self.check_kind({
            "text": b"no DICOM at all\n" * 50, "one byte and another": b"\10\0",
            "DICM first": b"DICM" + image(), "DICM late": bytes(129) + b"DICM" + bytes(100),
            "129 bytes of text": b"x" * 128 + b"D", "png": b"\x89PNG\r\n\x1a\n" + bytes(600),
            "nifti": b"\x5c\1\0\0" + bytes(600), "json": b'{"a": 1}', "gzip": b"\x1f\x8b\x08" * 99,
            "numbers of 16 bits": struct.pack("<6H", 8, 5, 12, 0, 8, 9) * 40,
            "numbers of 32 bits": struct.pack("<99I", *range(8, 107)),
            "eights": b"\10\0" * 500, "big-endian eights": b"\0\10" * 500,
            "twos": b"\2\0\0\0" * 500, "a group length alone": b"\10\0\0\0\4\0\0\0" + bytes(600),
            "no group length": implicit((0x00080000, 6), (0x00080005, 6), (0x00080008, 6)),
            "a long first value": implicit((0x00080005, 2000), (0x00080008, 6), (0x00080010, 6)),
            "a late first tag": implicit((0x00080100, 6), (0x00080102, 6), (0x00080104, 6)),
            "a late third tag": implicit((0x00080005, 6), (0x00080008, 6), (0x00400008, 6)),
            "no order": implicit((0x00080005, 6), (0x00080008, 6), (0x00080006, 6)),
            "two tags": implicit((0x00080005, 6), (0x00080008, 6)),
            "a third value too long": implicit((0x00080005, 6), (0x00080008, 6),
                                               (0x00080010, 6))[:-2],
            "a late first tag, explicit": element(0x00080100, "SH", "SOME") * 9,
            "an unknown representation": element(0x00080005, "ZZ", "SOME") * 9,
            "._file": b"\0\5\x16\7\0\2\0\0" + bytes(600), "elf": b"\x7fELF\2\1\1\0" + bytes(99),
        }, "other")

    def test_random_bytes_and_flipped_bits_bring_no_exception_and_no_other_kind(self) -> None:
        dice = random.Random(5)
        seeds = [image(), image(explicit=False), image(preamble=False), image(order=">"),
                 image(syntax=DEFLATED_LE)]
        seeds += [image(first=first) for first in FIRST.values() if len(first) < 3000]
        for _ in range(3000 if WHOLE else 1000):
            noise = bytes(dice.randrange(256) for _ in range(dice.randrange(2, 60)))
            self.assertIn(self.read(noise).kind, ("other", "blank"), noise)
            content = bytearray(dice.choice(seeds))
            for _ in range(dice.choice((1, 2, 9))):
                at = dice.randrange(min(len(content), 1500))
                content[at:at + 1] = dice.choice((b"", b"\xff" * 4, bytes(8), noise[:3]))
            found = self.read(bytes(content))
            self.assertIn(found.kind, ("DICOM", "damaged", "other"))

    def test_a_header_without_end_is_given_up_soon(self) -> None:
        part = element(0x00070010, "LO", "")
        with open(self.path, "wb") as file:
            file.write(bytes(128) + b"DICM" + part * 100000 + head(0x00070010, "OB", 1 << 31))
            file.truncate(1 << 33)  # a hole: zeros
        found = read_header(self.path, 1 << 33)
        self.assertEqual((found.kind, found.why), ("damaged", "has a header without end"))
        self.assertEqual(self.read(image(first=sequence(item(part) * 200000))), OWN)

    def test_what_cannot_be_read_is_an_error_of_the_system(self) -> None:
        self.assertRaises(FileNotFoundError, read_header, self.path, 5)
        self.assertRaises(IsADirectoryError, read_header, os.path.dirname(self.path), 5)


# The files on which pydicom's UIDs do not make our kind, and why ours is right.
CUT_HERE = {"test_files/MR_truncated.dcm": "ends within its pixels",
            "test_files/rtplan_truncated.dcm": "ends within its header"}
ASK_PYDICOM = """
import json, logging, pathlib, sys, warnings
import pydicom
warnings.simplefilter("ignore")
logging.disable()
root = pathlib.Path(sys.argv[1])
found = {}
for path in root.rglob("*"):
    if path.is_file():
        try:
            # without DICM at 128 any bytes would do: those that ours takes for DICOM are tried
            data = pydicom.dcmread(path, stop_before_pixels=True,
                                   force=path.relative_to(root).as_posix() in sys.argv[2:])
            uids = [data.get(key, "") for key in (
                "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")]
            index = data.file_meta.get("MediaStorageSOPClassUID") == "1.2.840.10008.1.3.10"
            found[path.relative_to(root).as_posix()] = uids + [index]
        except Exception:
            pass
json.dump(found, sys.stdout)
"""


class WhatPydicomSays(unittest.TestCase):

    def test_it_finds_the_same_uids_in_its_own_files(self) -> None:
        folder, python = (os.environ.get(f"DICOMUPLOAD_TEST_{name}", "")
                          for name in ("PYDICOM", "CLIENTS"))
        if not Path(folder, "test_files").is_dir() or not python:
            missing(self, "no pydicom: DICOMUPLOAD_TEST_PYDICOM and _CLIENTS are not set "
                          "(.ci/run sets them)")
        ours = {path.relative_to(folder).as_posix(): read_header(str(path), path.stat().st_size)
                for path in Path(folder).rglob("*") if path.is_file()}
        theirs = self.pydicom(python, folder, [name for name, found in ours.items()
                                               if found.kind in ("DICOM", "damaged")])
        self.assertGreater(len(theirs), 100)
        for name, found in ours.items():
            sop_class, sop, study, series, index = theirs.get(name, ("", "", "", "", True))
            kind, why = "DICOM", CUT_HERE.get(name, "")
            if index and not sop_class:
                # No DICOM at all, a DICOMDIR, which XNAT refuses, or a DICOM file within a gzip.
                kind = "packed" if name.endswith("zipMR.gz") else "other"
            elif not sop_class or not sop:
                why = "has no SOP Instance UID" if sop_class else "has no SOP Class UID"
            with self.subTest(name):
                self.assertEqual(found, (("damaged" if why else kind), sop, study, series, why))

    def pydicom(self, python: str, folder: str, names: List[str]) -> Dict[str, List[Any]]:
        done = subprocess.run([python, "-c", ASK_PYDICOM, folder, *names], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True,
                              env=sealed_environment(Path(folder)))
        if "No module named 'pydicom'" in done.stderr:
            missing(self, "no pydicom in the venv of the clients")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return dict(json.loads(done.stdout))


if __name__ == "__main__":
    unittest.main()
