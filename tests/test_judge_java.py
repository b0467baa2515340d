"""Java's own ZipInputStream reads every zip that the uploader posts, as XNAT will.

XNAT reads the stream from its beginning and never sees the directory at the end, so Python's
zipfile is no judge of what arrives there. One JVM reads all zips of this module.
"""

import hashlib
import random
import shutil
import subprocess
import tempfile
import unittest
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from tests.dicom import dicom_file, uid, write_series
from tests.support import UploadTest, missing, need, sealed_environment, variation
from tests.xnat_standin import Standin

ONCE = True  # the Python that it runs on makes no difference

JAVA = r"""
import java.io.*;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.zip.*;

/** Reads paths of zips, a line each; answers with a line for each entry, then one with a dot. */
public class ReadZips {
    static String hex(byte[] bytes) {
        StringBuilder text = new StringBuilder();
        for (byte each : bytes)
            text.append(Character.forDigit(each >> 4 & 15, 16)).append(
                Character.forDigit(each & 15, 16));
        return text.toString();
    }

    public static void main(String[] none) throws Exception {
        BufferedReader paths = new BufferedReader(new InputStreamReader(System.in, "UTF-8"));
        PrintStream out = new PrintStream(new BufferedOutputStream(System.out), false, "UTF-8");
        MessageDigest digest = MessageDigest.getInstance("SHA-256");
        byte[] buffer = new byte[1 << 16];
        for (String path; (path = paths.readLine()) != null; out.flush()) {
            try (ZipInputStream zip = new ZipInputStream(new FileInputStream(path))) {
                for (ZipEntry entry; (entry = zip.getNextEntry()) != null; ) {
                    long size = 0;
                    for (int count; (count = zip.read(buffer)) > 0; size += count)
                        digest.update(buffer, 0, count);
                    out.println(hex(entry.getName().getBytes(StandardCharsets.UTF_8)) + " " + size
                        + " " + hex(digest.digest()) + " " + entry.getMethod());
                }
            } catch (Exception wrong) {
                out.println("! " + wrong);
            }
            out.println(".");
        }
    }
}
"""
STORED, DEFLATED = "0", "8"
NAMES = (  # one file each; scripts, forms and characters that zips, shells and Java stumble over
    "plain.dcm", "2.25.7.1", "with blank", " at the ends ", "Größe", "Gro\u0308ße", "Ελληνικά",
    "Русский", "עברית", "العربية", "हिन्दी", "ไทย", "日本語", "中文", "한국어", "ქართული", "ᚠᛇᚻ",
    "😀🧠", "\U00020000", "\u202eabc", "a\u200bb", "\ufeffbom", "-r", "--", "@", "-@", "*?[a]{b}",
    "a\\b", "a:b|c<d>", "'\"`$(x)`", ";,&=+%20#", "a\tb", "\x01\x1b[31m\x85", "dots..", "~",
    "e\u0301" * 60, "ü" * 127, "語" * 85, "NUL", "con.dcm", "deep/" * 20 + "x",
    "ß/ü/日本/y", "same/z", "other/z")


class Entry(NamedTuple):
    """One file, as Java finds it in a zip."""

    name: str
    size: int
    sha256: str


class Reader:
    """A JVM that reads zips."""

    def __init__(self, javac: str, java: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dicomUpload-test-"))
        environment = sealed_environment(self.folder)
        (self.folder / "ReadZips.java").write_text(JAVA, encoding="utf-8")
        subprocess.run([javac, "-J-XX:TieredStopAtLevel=1", "-d", str(self.folder),
                        str(self.folder / "ReadZips.java")], check=True, env=environment)
        self.process = subprocess.Popen(
            [java, "-XX:+UseSerialGC", "-Xmx128m", "-cp", str(self.folder), "ReadZips"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment)

    def read(self, path: Path) -> Tuple[List[Entry], "Counter[str]"]:
        """What is in a zip, and how often each method. AssertionError where Java stumbles."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        entries: List[Entry] = []
        methods: "Counter[str]" = Counter()
        for line in iter(self.process.stdout.readline, ".\n"):
            assert line and not line.startswith("!"), f"Java on {path.name}: {line}"
            name, size, sha256, method = line.split()
            entries.append(Entry(bytes.fromhex(name).decode(), int(size), sha256))
            methods[method] += 1
        return entries, methods

    def close(self) -> None:
        self.process.communicate()
        shutil.rmtree(str(self.folder))


READER: Optional[Reader] = None


def tearDownModule() -> None:
    if READER:
        READER.close()


def entry(name: str, content: bytes) -> Entry:
    return Entry(name, len(content), hashlib.sha256(content).hexdigest())


class WhatJavaReads(UploadTest):

    def setUp(self) -> None:
        global READER
        super().setUp()
        self.kept = self.folder / "kept"
        self.kept.mkdir()
        javac, java = need(self, "javac"), need(self, "java")
        READER = READER or Reader(javac, java)
        self.reader: Reader = READER

    def series(self, path: Path) -> List[Entry]:
        """The files of a series, as they should come out."""
        return sorted(entry(each.relative_to(path).as_posix(), each.read_bytes())
                      for each in path.rglob("*") if each.is_file())

    def write(self, path: Path, names: Tuple[str, ...]) -> None:
        """A series of files with these names: some that deflate well, some that hardly do."""
        draw = random.Random(path.name)
        for number, name in enumerate(names, 1):
            count = 1 << draw.randrange(14)
            noise = bytes(draw.getrandbits(8) for _ in range(count))
            pixels = draw.choice((b"\0" * 2 * count, noise, noise * 20))
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(dicom_file(study=uid("names"), series=uid("names", path.name),
                                        instance=number, pixels=pixels))

    @variation
    def test_names_and_bytes_come_out_at_every_compression(self) -> None:
        session = self.root / "007" / "pre"
        self.write(session / "A_0001", NAMES)
        write_series(session / "B_0002", study=uid("names"), files=120, rows=64, columns=64)
        wanted = {each.name: self.series(each) for each in session.iterdir()}
        for level in "0", "1", "6", "9":
            with self.subTest(compression=level):
                found: Dict[str, List[Entry]] = {"A_0001": [], "B_0002": []}
                used: "Counter[str]" = Counter()
                with Standin(keep=str(self.kept)) as server:
                    ran = self.upload(server, "--compression", level, "--max-files", "50",
                                      "--again")
                    self.assertEqual((ran.status, server.abuses), (0, []), ran.text)
                    self.assertEqual(len(server.kept()), 4)
                    for _, copy in server.kept():
                        entries, methods = self.reader.read(copy)
                        name = "B_0002" if entries[0].name.startswith("IM") else "A_0001"
                        found[name] += entries
                        used += methods
                        copy.unlink()
                self.assertEqual({name: sorted(each) for name, each in found.items()}, wanted)
                self.assertEqual(set(used) - {STORED}, set() if level == "0" else {DEFLATED})

    def test_a_name_that_zip_itself_spoils_fails_its_series_by_name(self) -> None:
        # zip 3.0 writes DEL as the bytes C1 BF, which are no UTF-8, and its directory is off by
        # one: neither Java nor Python reads such a zip.
        session = self.root / "007" / "pre"
        self.write(session / "A_0001", ("good", "bad\x7fname"))
        self.write(session / "B_0002", ("good",))
        with self.xnat(keep=str(self.kept)) as server:
            ran = self.upload(server)
            self.assertEqual(ran.status, 1, ran.text)
            self.assertRegex(ran.out, r"\n  007_pre A_0001: bad\\x7fname .*DEL in its name\n"
                             " +rename it")
            for _, copy in server.kept():
                self.assertEqual([each.name for each in self.reader.read(copy)[0]], ["good"])

    @variation
    def test_more_than_65535_files_in_one_part_come_out(self) -> None:
        folder = self.root / "007" / "pre" / "M_0001"
        folder.mkdir(parents=True)
        content = dicom_file(study=uid("many"), series=uid("many", 1), rows=1, columns=1,
                             sop_instance="2.25.100000")
        wanted = []
        for number in range(66000):
            name, data = f"{number:05}", content.replace(b".100000", b".1%05d" % number)
            (folder / name).write_bytes(data)
            wanted.append(entry(name, data))
        with self.xnat(keep=str(self.kept), drain=True) as server:
            ran = self.upload(server, "--compression", "0", "--max-files", "999999999",
                              timeout=300)
            self.assertEqual(ran.status, 0, ran.text)
            (_, copy), = server.kept()
        entries, methods = self.reader.read(copy)
        self.assertEqual(sorted(entries), wanted)
        self.assertEqual(methods, {STORED: 66000})

    @variation  # takes a core for half a minute
    def test_a_file_of_more_than_4_gib_comes_out(self) -> None:
        if shutil.disk_usage(str(self.folder)).free < 5 * 10 ** 9:
            missing(self, "no 5 GB free in the folder for temporary files")
        size = 2 ** 32 + 10 ** 6
        first, head, last = (dicom_file(study=uid("large"), series=uid("large", 1), instance=number)
                             for number in (1, 2, 3))
        folder = self.root / "007" / "pre" / "L_0001"
        folder.mkdir(parents=True)
        (folder / "small.dcm").write_bytes(first)
        with (folder / "large.dcm").open("wb") as file:
            file.write(head)
            file.truncate(size)
        (folder / "last.dcm").write_bytes(last)
        digest, zeros = hashlib.sha256(head), b"\0" * 2 ** 20
        for at in range(len(head), size, len(zeros)):
            digest.update(zeros[:size - at])
        with self.xnat(keep=str(self.kept), drain=True) as server:
            ran = self.upload(server, "--compression", "1", timeout=300)
            self.assertEqual(ran.status, 0, ran.text)
            (_, copy), = server.kept()
        entries, _ = self.reader.read(copy)
        self.assertEqual(entries, [Entry("large.dcm", size, digest.hexdigest()),
                                   entry("last.dcm", last), entry("small.dcm", first)])


if __name__ == "__main__":
    unittest.main()
