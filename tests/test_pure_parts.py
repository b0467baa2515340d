"""The parts that only compute: tables of what goes in and what comes out."""

import os
import re
import struct
import subprocess
import sys
import tempfile
import unittest
from typing import Any, List, Tuple

import dicomUpload
from tests.dicom import dicom_file, dicomdir_file, uid

FILE = dicom_file(study=uid("study"), series=uid("series"))
EXPLICIT = FILE[FILE.index(b"\x08\0\x05\0CS"):]
IMPLICIT = dicom_file(study=uid("study"), series=uid("series"), preamble=False, explicit=False)
ADDRESS = "/data/prearchive/projects/BRAIN/20200102_101500123/007_pre"


class IsDicom(unittest.TestCase):
    def decide(self, content: bytes) -> bool:
        return dicomUpload.is_dicom(content[:512], len(content))

    def test_dicom_is_known_by_its_bytes(self) -> None:
        group = struct.pack("<HHII", 8, 0, 4, 100)  # group length, as very old files begin
        for title, content in (
                ("a file", FILE),
                ("a preamble that is not zero", b"II*\0" + FILE[4:]),
                ("explicit, no preamble", EXPLICIT),
                ("implicit, no preamble", IMPLICIT),
                ("group length, implicit", group + IMPLICIT),
                ("group length, explicit", b"\x08\0\0\0UL\x04\0" + b"d\0\0\0" + EXPLICIT),
                ("meta group, no preamble", FILE[132:]),
                ("big endian, explicit", b"\0\x08\0\x05CS\0\x0aISO_IR 192" + b"\0" * 600),
                ("a class that begins like a DICOMDIR's", dicom_file(
                    study=uid("x"), series=uid("x"), sop_class="1.2.840.10008.1.3.100"))):
            with self.subTest(title):
                self.assertTrue(self.decide(content))

    def test_everything_else_is_not(self) -> None:
        zeros = b"\0" * 1000
        for title, content in (
                ("empty", b""), ("one byte", b"\x08"), ("short", b"\x08\0\x05\0CS\x0a\0"),
                ("DICOMDIR", dicomdir_file()), ("zeros", zeros),
                ("text", b"Scanned twice, the first one moved. " * 30),
                ("DICM elsewhere", b"DICM" + zeros), ("AppleDouble", b"\0\5\x16\7\0\2\0\0" + zeros),
                (".DS_Store", b"\0\0\0\1Bud1" + zeros), ("Thumbs.db", b"\xd0\xcf\x11\xe0" + zeros),
                ("zip", b"PK\3\4\x14\0\x08\0\x08\0" + zeros), ("gzip", b"\x1f\x8b\x08\0" + zeros),
                ("png", b"\x89PNG\r\n\x1a\n" + zeros), ("jpeg", b"\xff\xd8\xff\xe0" + zeros),
                ("NIfTI", struct.pack("<i", 348) + zeros), ("icon", b"\0\0\1\0\2\0" + zeros),
                ("TIFF", b"II*\0\x08\0\0\0" + zeros), ("TIFF, big", b"MM\0*\0\0\0\x08" + zeros),
                ("a number 8 and then nothing like it", b"\x08\0\0\0" + zeros),
                ("a length beyond the end", struct.pack("<HHI", 8, 5, 4000) + b"A" * 100),
                ("an odd length", struct.pack("<HHI", 8, 5, 11) + b"A" * 1000),
                ("another group first", struct.pack("<HHI", 16, 16, 4) + b"A" * 1000)):
            with self.subTest(title):
                self.assertFalse(self.decide(content))


class Words(unittest.TestCase):
    def table(self, function: Any, rows: List[Tuple[Any, Any]]) -> None:
        for given, wanted in rows:
            with self.subTest(given):
                self.assertEqual(function(given), wanted)

    def test_labels_keep_what_xnat_keeps(self) -> None:
        self.table(dicomUpload.clean_label, [
            ("007_pre", "007_pre"), ("sub-01", "sub-01"), ("a b", "a_b"), ("a.b/c", "a_b_c"),
            ("\u00fc\u00df", "__"), ("\u0661", "_"), ("a\nb", "a_b"), ("\udcff", "_"), ("", "")])

    def test_nothing_that_moves_the_cursor_is_printed(self) -> None:
        self.table(dicomUpload.printable, [
            ("T1 \u00fc \u65e5\u672c", "T1 \u00fc \u65e5\u672c"), ("a\x1b[2Jb", "a\\x1b[2Jb"),
            ("a\rb\tc\x7f", "a\\rb\\tc\\x7f"), ("\x9b1m", "\\x9b1m"), ("\udcff", "\\udcff"),
            ("\u202egpj", "\\u202egpj"), ("", "")])

    def test_no_cell_is_a_formula(self) -> None:
        self.table(dicomUpload.cell, [
            ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@x", "'@x"), ("a=1", "a=1"),
            ("\t=1", "\\t=1"), (7, "7"), ("", "")])

    def test_sizes_are_for_people(self) -> None:
        self.table(dicomUpload.size, [
            (0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (9940, "9.9 kB"),
            (56_000, "56 kB"), (1_500_000, "1.5 MB"), (612_000_000, "612 MB"),
            (2_500_000_000, "2.5 GB"), (12_345_000_000_000, "12,345.0 GB")])

    def test_rates_may_have_a_unit(self) -> None:
        def rate(text: str) -> int:
            url = "https://xnat.example.org"
            with tempfile.TemporaryDirectory() as root:
                return dicomUpload.read_options(
                    [url, "alice", "x", "BRAIN", root, "--limit-rate", text]).limit_rate

        self.table(rate, [("5M", 5 << 20), ("500k", 500 << 10), ("1.5m", 3 << 19), ("1G", 1 << 30),
                          ("100", 100)])
        for text in ("0", "M", "5MB", "-5", "1e6", "5 M", ".", "0.0000001"):
            with self.subTest(text), self.assertRaises(dicomUpload.Stop) as caught:
                rate(text)
            self.assertEqual(caught.exception.status, 2)
            self.assertIn("--limit-rate", str(caught.exception))


def answer(out: bytes, code: int = 0, err: bytes = b"") -> Any:
    """curl's output, as the program reads it."""
    return answers(out + b" mark\n" if out else b"", 1, code, err)[0]


def answers(out: bytes, count: int, code: int = 0, err: bytes = b"") -> Any:
    """curl's output for so many URLs."""
    done = subprocess.CompletedProcess(["curl"], code, out, err)
    return dicomUpload.read_answers(done, "mark", count)


class Answers(unittest.TestCase):
    def test_the_last_headers_and_the_body_are_taken_apart(self) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/uri-list\r\n\r\n"
        address = ADDRESS.encode() + b"\r\n"
        for title, out, status, body in (
                ("plain", head + address + b"\n200", 200, ADDRESS + "\r\n"),
                ("100 first", b"HTTP/1.1 100 Continue\r\n\r\n" + head + address + b"\n200", 200,
                 ADDRESS + "\r\n"),
                ("HTTP/2", b"HTTP/2 200 \r\ndate: x\r\n\r\n" + address + b"\n200", 200,
                 ADDRESS + "\r\n"),
                ("no body", head + b"\n200", 200, ""),
                ("line feeds only", b"HTTP/1.1 200 OK\nA: b\n\nbody\n200", 200, "body"),
                ("a blank line in the body", head + b"a\r\n\r\nb\n200", 200, "a\r\n\r\nb"),
                ("bytes that are no text", head + b"\xff\xfe\n200", 200, "\ufffd\ufffd"),
                ("nothing at all", b"", 0, ""), ("no answer", b"\n000", 0, "")):
            with self.subTest(title):
                found = answer(out)
                self.assertEqual((found.status, found.body), (status, body))

    def test_a_failed_transfer_has_no_status_whatever_curl_says(self) -> None:
        found = answer(b"HTTP/1.1 200 OK\r\n\r\nhalf\n200", 18, b"curl: (18) closed with 9 bytes\n")
        self.assertEqual((found.code, found.status), (18, 0))
        self.assertIn("closed with 9 bytes", dicomUpload.said(found))
        self.assertNotIn("curl: (18)", dicomUpload.said(found))

    def test_each_of_several_answers_keeps_its_own_status_and_body(self) -> None:
        head = b"HTTP/1.1 200 OK\r\n\r\n"
        whole = head + b"one\n200 mark\n" + b"\n000 mark\n" + head + b"three\n200 mark\n"
        for title, out, code, wanted in (
                ("all", whole, 0, [(200, "one", 0), (0, "", 0), (200, "three", 0)]),
                ("the last is cut short", whole, 18, [(200, "one", 0), (0, "", 0),
                                                      (0, "three", 18)]),
                ("curl was killed", head + b"one\n200 mark\n" + head + b"tw", -9,
                 [(200, "one", 0), (0, "", 0), (0, "", -9)])):
            with self.subTest(title):
                found = answers(out, 3, code)
                self.assertEqual([(each.status, each.body, each.code) for each in found], wanted)

    def test_curls_own_words_are_found_behind_its_progress(self) -> None:
        bars = b"\r##   4.0%\r#####  41.5%\ncurl: (56) Recv failure:\nConnection reset\n"
        self.assertEqual(answer(b"\n000", 56, bars).error, "Recv failure: Connection reset")

    def test_retry_after_is_seconds_and_has_an_end(self) -> None:
        for value, wanted in ((b"7", 7), (b" 120 ", 120), (b"999999", 600), (b"-1", 0),
                              (b"Fri, 31 Dec 1999 23:59:59 GMT", 0), (b"9" * 400, 0), (b"", 0)):
            with self.subTest(value):
                found = answer(b"HTTP/1.1 503 X\r\nRETRY-AFTER:" + value + b"\r\n\r\n\n503")
                self.assertEqual(found.retry_after, wanted)

    def test_the_servers_own_sentence_is_found(self) -> None:
        for title, body, wanted in (
                ("Restlet", b"<html><head><title>Status page</title></head><body>\n<h3>unable to "
                 b"read\nDICOM object a&amp;b.txt</h3><p>You can get details</p>",
                 "HTTP 400, unable to read DICOM object a&b.txt"),
                ("nginx", b"<html><head><title>413 Request Entity Too Large</title></head><body>"
                 b"<center><h1>413</h1></center>", "HTTP 400, 413 Request Entity Too Large"),
                ("words", b"  Session is\n locked ", "HTTP 400, Session is locked"),
                ("empty", b"", "HTTP 400"), ("tags only", b"<br><hr>", "HTTP 400")):
            with self.subTest(title):
                found = answer(b"HTTP/1.1 400 X\r\n\r\n" + body + b"\n400")
                self.assertEqual(dicomUpload.said(found), wanted)

    def test_a_sentence_without_end_is_cut(self) -> None:
        found = answer(b"HTTP/1.1 500 X\r\n\r\n" + b"x" * 100_000 + b"\n500")
        self.assertLess(len(dicomUpload.said(found)), 400)

    def test_html_is_known(self) -> None:
        for body, wanted in ((b"<!DOCTYPE html>", True), (b"\r\n <HTML lang=en>", True),
                             (b"<!-- BEGIN x -->", True), (ADDRESS.encode(), False), (b"", False),
                             (b"{}", False)):
            with self.subTest(body):
                self.assertIs(answer(b"HTTP/1.1 200 X\r\n\r\n" + body + b"\n200").is_html, wanted)


class Parts(unittest.TestCase):
    def left(self, files: int, most: int, *sent: Tuple[str, int, int]) -> List[Tuple[int, int]]:
        """What is left of a series of `files` files, after these parts were sent."""
        series = dicomUpload.Series("T1", "/dicom/007/pre/T1", files=files, fingerprint="now")
        session = dicomUpload.Session("007/pre", "007", "007_pre", (series,))
        memory = dicomUpload.Memory()
        for fingerprint, start, stop in sent:
            memory.take("sent", {"series": "T1", "files": fingerprint, "from": start, "to": stop,
                                 "address": ADDRESS})
        return [(part.start, part.stop) for part in memory.parts_left(session, series, most)]

    def test_what_is_left_is_what_was_not_sent_of_these_very_files(self) -> None:
        for sent, most, wanted in (
                ([], 3, [(0, 3), (3, 6), (6, 7)]),
                ([], 7, [(0, 7)]), ([], 500, [(0, 7)]), ([], 1, [(at, at + 1) for at in range(7)]),
                ([("now", 0, 7)], 3, []),
                ([("now", 0, 3)], 3, [(3, 6), (6, 7)]),
                ([("now", 3, 6)], 3, [(0, 3), (6, 7)]),
                ([("now", 6, 7), ("now", 0, 3)], 3, [(3, 6)]),
                ([("now", 0, 3)], 2, [(3, 5), (5, 7)]),
                ([("now", 0, 4), ("now", 2, 5)], 9, [(5, 7)]),
                ([("old", 0, 7)], 9, [(0, 7)])):
            with self.subTest(sent=sent, most=most):
                self.assertEqual(self.left(7, most, *sent), wanted)


class TheFile(unittest.TestCase):
    def test_it_can_be_imported_without_doing_anything(self) -> None:
        folder = os.path.dirname(os.path.abspath(dicomUpload.__file__))
        done = subprocess.run([sys.executable, "-c", "import dicomUpload"], cwd=folder,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        self.assertEqual((done.returncode, done.stdout), (0, b""))

    def test_its_docstring_names_every_exit_status(self) -> None:
        for status in (0, 1, 2, 3, 130, 143):
            self.assertTrue(re.search(rf"\b{status}\b", dicomUpload.__doc__ or ""), status)


if __name__ == "__main__":
    unittest.main()
