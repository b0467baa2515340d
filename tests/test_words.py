"""The small words: labels, sizes, durations, names on a screen and in a spreadsheet, wrapping.

Tables of what goes in and what comes out.
"""

import csv
import io
import os
import subprocess
import sys
import unittest
from typing import Any, List, Tuple

import dicomUpload
from tests.support import ROOT


class Words(unittest.TestCase):
    def table(self, function: Any, rows: List[Tuple[Any, Any]]) -> None:
        for given, wanted in rows:
            with self.subTest(given):
                self.assertEqual(function(*given) if isinstance(given, tuple) else function(given),
                                 wanted)


class Names(Words):
    """What becomes of names."""

    def test_labels_keep_what_xnat_keeps(self) -> None:
        self.table(dicomUpload.clean_label, [
            ("007_pre", "007_pre"), ("sub-01", "sub-01"), ("a b", "a_b"), ("a.b/c", "a_b_c"),
            ("\u00fc\u00df", "__"), ("u\u0308", "_"), ("\u0661", "_"), ("a\nb", "a_b"),
            ("\udcff", "_"), ("", ""), ("A" * 300, "A" * 300)])

    def test_a_session_is_labelled_by_its_subject_too(self) -> None:
        self.table(lambda *folders: dicomUpload.Session(*folders).label, [
            (("007", "pre"), "007_pre"), (("a b", "c.d"), "a_b_c_d"), (("007", ""), "007")])

    def test_names_that_neither_zip_nor_xnat_takes_say_why(self) -> None:
        for name, word in (("a\nb", "line break"), ("a\rb", "line break"), ("a\x7f", "DEL"),
                           ("in\nner/x", "line break"), ("\udcff", "UTF-8"), ("a.zip", "archive"),
                           ("a/b.log", "as a log"),
                           ("a.TGZ", "archive"), ("a.tar.gz", "archive"), ("x.xar", "archive"),
                           ("a.tar", "archive"), ("a.gz", "archive"), ("a.zar", "archive")):
            with self.subTest(name):
                self.assertIn(word, dicomUpload.why_unsendable(name))
        for name in ("a", "a.dcm", "\u00fc", "a\tb", "zip", "a.zip/b", "a.gzip", "\U0001f9e0"):
            with self.subTest(name):
                self.assertEqual(dicomUpload.why_unsendable(name), "")

    def test_names_of_what_is_being_written(self) -> None:
        for name in ("a.part", "a.dcm.filepart", "a.partial", "a.crdownload", "a.PART"):
            with self.subTest(name):
                self.assertTrue(dicomUpload.UNFINISHED.search(name))
        for name in ("part", "a.part1", "a.part.dcm", "filepart"):
            with self.subTest(name):
                self.assertFalse(dicomUpload.UNFINISHED.search(name))

    def test_names_that_are_no_data(self) -> None:
        for name in (".", ".git", "._x", "#recycle", "#RECYCLE", "@eaDir", "lost+found",
                     "Lost+Found", "System Volume Information", "__MACOSX", "$RECYCLE.BIN"):
            with self.subTest(name):
                self.assertTrue(dicomUpload.is_no_data(name))
        for name in ("recycle", "a.git", "lost found", "MACOSX", "#1", "@x", "~", ""):
            with self.subTest(name):
                self.assertFalse(dicomUpload.is_no_data(name))


class Screen(Words):
    """What is shown to people."""

    def test_nothing_that_moves_the_cursor_is_printed(self) -> None:
        self.table(dicomUpload.printable, [
            ("T1 \u00fc \u65e5\u672c", "T1 \u00fc \u65e5\u672c"), ("a\x1b[2Jb", "a\\x1b[2Jb"),
            ("a\rb\tc\x7f", "a\\rb\\tc\\x7f"), ("\x9b1m", "\\x9b1m"), ("\udcff", "\\udcff"),
            ("\u202egpj", "\\u202egpj"), ("\u2028", "\\u2028"), ("", "")])

    def test_no_cell_is_a_formula(self) -> None:
        for given, wanted in (("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@x", "'@x"),
                              ("a=1", "a=1"), ("\t=1", "\\t=1"), (7, "7"), ("", "")):
            with self.subTest(given):
                line = dicomUpload.csv_line(["x", given])
                self.assertEqual(list(csv.reader(io.StringIO(line))), [["x", wanted]])

    def test_a_row_is_read_back_as_it_was(self) -> None:
        row = ["a,b", 'c"d', "", "\u00fc", "'x", " x "]
        line = dicomUpload.csv_line(row)
        self.assertEqual(list(csv.reader(io.StringIO(line, newline=""))), [row])

    def test_sizes_are_for_people(self) -> None:
        self.table(dicomUpload.size, [
            (0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (9940, "9.9 kB"),
            (10_400, "10 kB"),
            (56_000, "56 kB"), (1_500_000, "1.5 MB"), (612_000_000, "612 MB"),
            (2_500_000_000, "2.5 GB"), (12_345_000_000_000, "12,345.0 GB")])

    def test_durations_are_for_people(self) -> None:
        self.table(dicomUpload.duration, [
            (0, "0 s"), (0.9, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"),
            (3600, "1 h 0 min"), (90_061, "25 h 1 min")])

    def test_one_is_one_and_two_are_two(self) -> None:
        self.table(dicomUpload.plural, [
            ((0, "file"), "0 files"), ((1, "file"), "1 file"), ((2, "file"), "2 files"),
            ((12_345, "file"), "12,345 files"), ((2, "copy", "copies"), "2 copies"),
            ((1, "copy", "copies"), "1 copy")])

    def test_a_long_list_shows_its_first_names_and_how_many_more(self) -> None:
        names = [f"n{number}" for number in range(2000)]
        self.table(dicomUpload.some, [
            (([], 3), ""), ((names[:1], 3), "n0"), ((names[:3], 3), "n0, n1, n2"),
            ((names[:4], 3), "n0, n1, n2 and 1 more"), ((names, 2), "n0, n1 and 1,998 more")])

    def test_letters_take_their_columns(self) -> None:
        self.table(dicomUpload.width_of, [
            ("", 0), ("abc", 3), ("\u00fc", 1), ("u\u0308", 1), ("\u65e5\u672c", 4),
            ("\uff21", 2), ("\uff71", 1)])

    def test_lines_break_between_words_and_no_word_is_lost(self) -> None:
        for text in ("", "a", "one two three four five six seven eight nine ten",
                     "007_pre  T1      sent       3 files", "    indented words that go on and on",
                     "x" * 100, "a " + "x" * 100 + " b", "\u65e5\u672c " * 20,
                     "word  two spaces   three spaces " * 4):
            for columns in (20, 40, 80):
                lines = dicomUpload.wrapped(text, columns)
                with self.subTest(text, columns=columns):
                    self.assertEqual(" ".join(lines).split(), text.split())
                    for line in lines:
                        if len(line.split()) > 1:
                            self.assertLessEqual(dicomUpload.width_of(line), columns)
                    indent = len(text) - len(text.lstrip())
                    for line in lines[1:]:
                        self.assertEqual(len(line) - len(line.lstrip()), indent + 4)
                    if dicomUpload.width_of(text) <= columns:
                        self.assertEqual(lines, [text])


class Given(Words):
    """What is given on the command line, in numbers."""

    def test_rates_may_have_a_unit(self) -> None:
        self.table(dicomUpload.bytes_per_second, [
            ("5M", 5 << 20), ("500k", 500 << 10), ("1.5m", 3 << 19), ("1G", 1 << 30),
            ("100", 100), ("999999999999G", 1 << 40)])
        for text in ("0", "M", "5MB", "-5", "1e6", "5 M", ".", "0.0000001", ""):
            with self.subTest(text), self.assertRaises(dicomUpload.Stop) as caught:
                dicomUpload.bytes_per_second(text)
            self.assertEqual(caught.exception.status, 2)
            self.assertIn("--limit-rate", str(caught.exception))

    def test_shards_are_two_numbers(self) -> None:
        self.table(dicomUpload.read_shard, [
            ("1/1", (1, 1)), ("2/10", (2, 10)), ("10/10", (10, 10)), ("007/0100", (7, 100))])

    def test_what_curl_and_the_server_get_is_text(self) -> None:
        for text in ("a", "\u00fc", "p\"a's \\w;#", "\U0001f9e0", " "):
            with self.subTest(text):
                self.assertTrue(dicomUpload.sendable(text))
        for text in ("", "a\nb", "a\0", "\x1b", "\x7f", "\udcff", "a\r"):
            with self.subTest(text):
                self.assertFalse(dicomUpload.sendable(text))


class TheFile(unittest.TestCase):
    def test_it_can_be_imported_without_doing_anything(self) -> None:
        done = subprocess.run([sys.executable, "-c", "import dicomUpload"], cwd=str(ROOT),
                              env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"), check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((done.returncode, done.stdout), (0, b""))

    def test_it_works_where_docstrings_are_dropped(self) -> None:
        done = subprocess.run([sys.executable, "-OO", "dicomUpload.py", "--version"],
                              cwd=str(ROOT), env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"),
                              check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((done.returncode, done.stdout.decode()),
                         (0, f"dicomUpload {dicomUpload.VERSION}\n"))

    def test_its_docstring_names_every_exit_status(self) -> None:
        for status in (0, 1, 2, 3, 130, 143):
            self.assertRegex(dicomUpload.__doc__ or "", rf"\b{status}\b")


if __name__ == "__main__":
    unittest.main()
