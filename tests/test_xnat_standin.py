"""The stand-in for XNAT, held against the notes on XNAT's source that it is made from."""
import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union
from urllib.parse import parse_qsl, urlencode, urlsplit
from xml.etree import ElementTree

from tests import xnat_standin
from tests.dicom import README_TREE, dicom_file, dicomdir_file, digests, readme_tree, uid
from tests.support import load_tests as load_tests  # they mostly wait: several at a time
from tests.support import variation
from tests.xnat_standin import Fault, Project, Standin, User

TOP = Path(__file__).resolve().parent.parent
IMPORT = "/data/services/import"
STUDY = uid("a study")
ALICE = ("alice", "s3cret")
BOUNDARY = "a-boundary-of-these-tests"


class Reply(NamedTuple):
    """An answer."""
    status: int
    text: str
    headers: http.client.HTTPMessage

    @property
    def lines(self) -> List[str]:
        """The addresses in it."""
        return self.text.split()

    @property
    def rows(self) -> List[Dict[str, str]]:
        """The rows of a JSON table."""
        return json.loads(self.text)["ResultSet"]["Result"]


def images(count: int, *, number: int = 1, first: int = 1, study: str = STUDY,
           name: str = "s%d/IM%04d.dcm", **more: Any) -> Dict[str, bytes]:
    """Some files of one series, by their names in a zip."""
    more.setdefault("series", uid(study, number))
    return {name % (number, instance): dicom_file(study=study, number=number, instance=instance,
                                                  **more)
            for instance in range(first, first + count)}


class Pipe(io.RawIOBase):
    """A file that cannot seek, so that zipfile writes data descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += bytes(data)
        return len(data)


def zipped(files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED,
           pipe: bool = False) -> bytes:
    """A zip of these files."""
    file = Pipe() if pipe else io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.data if isinstance(file, Pipe) else file.getvalue()


def form(parts: List[Tuple[str, Optional[str], bytes]]) -> bytes:
    """A multipart form of (field, file name, value)."""
    lines = b""
    for field, name, value in parts:
        extra = "" if name is None else '; filename="%s"' % name
        lines += ('--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
                  % (BOUNDARY, field, extra)).encode() + value + b"\r\n"
    return lines + ("--%s--\r\n" % BOUNDARY).encode()


class Case(unittest.TestCase):
    """Starts a stand-in and talks to it as an uploader would."""

    xnat: Standin

    def start(self, **knobs: Any) -> Standin:
        """A fresh stand-in, closed when the test ends."""
        self.xnat = Standin(**knobs)
        self.xnat.__enter__()
        self.addCleanup(self.xnat.__exit__, None, None, None)
        return self.xnat

    def call(self, method: str, path: str, body: Any = None,
             headers: Any = None, timeout: Any = 20, login: Any = ALICE,
             **params: str) -> Reply:
        """One request on a connection of its own."""
        headers = dict(headers or {})
        if login:
            headers["Authorization"] = "Basic " + base64.b64encode(
                ":".join(login).encode()).decode()
        place = urlsplit(self.xnat.url)
        if params:
            path += "?" + urlencode(params)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=timeout)
        try:
            connection.request(method, place.path + path, body, headers)
            answer = connection.getresponse()
            return Reply(answer.status, answer.read().decode(), answer.headers)
        finally:
            connection.close()

    def send(self, content: Union[bytes, Mapping[str, bytes]], *, file_name: str = "x.zip",
             in_body: str = "", login: Any = ALICE, timeout: Any = 20, headers: Any = None,
             **params: str) -> Reply:
        """One import, as a form, or in the body with the content type `in_body`."""
        data = content if isinstance(content, bytes) else zipped(content)
        params = {"import-handler": "DICOM-zip", "PROJECT_ID": "BRAIN", "SUBJECT_ID": "007",
                  "EXPT_LABEL": "007_pre", **params}
        params = {name: value for name, value in params.items() if value}
        kind = in_body or "multipart/form-data; boundary=" + BOUNDARY
        body = data if in_body else form([("file", file_name, data)])
        return self.call("POST", IMPORT, body, {"Content-Type": kind, **(headers or {})},
                         login=login, timeout=timeout, **params)

    def commit(self, address: str, login: Any = ALICE, **params: str) -> Reply:
        """Commit a session."""
        return self.call("POST", address, b"", login=login, action="commit", **params)

    def archived(self, content: Mapping[str, bytes], **params: str) -> Reply:
        """Send and commit."""
        return self.commit(self.send(content, **params).lines[0])

    def refused(self, reply: Reply, status: int, text: str) -> None:
        """The reply is an error page with this sentence."""
        self.assertEqual(reply.status, status, reply.text)
        found = re.search("<h3>(.*?)</h3>", reply.text, re.DOTALL)
        self.assertIsNotNone(found, reply.text)
        self.assertIn(text, found.group(1) if found else "")

    def count(self, label: str = "007_pre") -> int:
        """How many files the server has."""
        return len(self.xnat.stored(label))


class TheSelfChecksOfSection11(Case):

    def test_two_series_of_one_study_join_in_one_row_and_get_one_address(self) -> None:
        xnat = self.start()
        first, second = self.send(images(3)), self.send(images(2, number=2))
        self.assertEqual(first.text, second.text)
        self.assertRegex(first.text, r"^/data/prearchive/projects/BRAIN/\d{8}_\d{9}/007_pre\r\n$")
        self.assertEqual(first.headers.get_content_type(), "text/uri-list")
        self.assertEqual(len(xnat.prearchive), 1)
        self.assertEqual(self.count(), 5)

    def test_a_commit_in_a_manual_project_is_200_with_the_import_s_address(self) -> None:
        xnat = self.start()
        address = self.send(images(2), PROJECT_ID="MANUAL").lines[0]
        reply = self.commit(address)
        self.assertEqual((reply.status, reply.text), (200, address))
        self.assertEqual(xnat.prearchive[0].status, "READY")

    def test_a_commit_with_aa_archives_in_a_manual_project(self) -> None:
        self.start()
        reply = self.commit(self.send(images(2), PROJECT_ID="MANUAL").lines[0], AA="true")
        self.assertEqual(reply.status, 301)
        self.assertEqual(
            reply.text, "/data/archive/projects/MANUAL/subjects/007/experiments/007_pre")
        self.assertIsNone(reply.headers["Location"])

    def test_a_text_in_the_zip_is_400_and_keeps_what_came_before(self) -> None:
        self.start()
        reply = self.send({**images(2), "notes.txt": b"hello", **images(2, number=2)})
        self.refused(reply, 400, "unable to read DICOM object notes.txt")
        self.assertEqual(self.count(), 2)

    def test_ignore_unparsable_passes_over_a_text(self) -> None:
        self.start()
        reply = self.send({**images(2), "notes.txt": b"hello", **images(2, number=2)},
                          **{"Ignore-Unparsable": "true"})
        self.assertEqual((reply.status, self.count()), (200, 4))

    def test_eleven_and_five_files_in_two_zips_are_sixteen(self) -> None:
        xnat = self.start()
        self.send(images(11))
        self.assertEqual(self.archived(images(5, number=2)).status, 301)
        session = xnat.archive["BRAIN", "007_pre"]
        self.assertEqual({scan: len(files) for scan, files in session.scans.items()},
                         {"1": 11, "2": 5})

    def test_the_same_instances_again_conflict_unless_overwriting(self) -> None:
        xnat = self.start()
        self.archived(images(3))
        address = self.send(images(4)).lines[0]
        reply = self.commit(address)
        self.refused(reply, 500, "FAILED: Unable to archive 007_pre: Operation Failed: "
                                 "Session already exists with matching files.")
        self.assertEqual(xnat.prearchive[0].status, "CONFLICT")
        self.assertIn("matching files", self.call("GET", address + "/logs/last").text)
        self.assertEqual(self.commit(address, overwrite_files="true").status, 301)
        self.assertEqual(self.count(), 4)

    def test_a_wrong_password_is_401_without_a_challenge(self) -> None:
        self.start()
        reply = self.call("POST", "/data/JSESSION", login=("alice", "wrong"))
        self.assertEqual(reply.status, 401)
        self.assertIn("Your login attempt failed", reply.text)
        self.assertIsNone(reply.headers["WWW-Authenticate"])

    def test_an_alias_token_works_until_it_is_invalidated(self) -> None:
        self.start()
        token = json.loads(self.call("GET", "/data/services/tokens/issue").text)
        login = token["alias"], token["secret"]
        self.assertEqual(self.call("GET", "/data/auth", login=login).text,
                         "User 'alice' is logged in")
        self.call("GET", "/data/services/tokens/invalidate/" + token["alias"])
        self.assertEqual(self.call("GET", "/data/auth", login=login).status, 401)

    def test_another_user_s_private_project_is_404(self) -> None:
        self.start()
        reply = self.call("GET", "/data/projects/SECRET?format=json")
        self.refused(reply, 404, "Unable to find the specified experiment.")
        self.assertEqual(self.call("GET", "/data/projects/NONE?format=json").text, reply.text)


class HowTheBodyIsTaken(Case):
    """Section 2."""

    def test_a_content_type_of_zip_is_taken_as_the_file(self) -> None:
        xnat = self.start()
        self.assertEqual(self.send(zipped(images(2)), in_body="application/zip").status, 200)
        self.assertEqual(xnat.imports()[0].file_name, "upload.zip")
        self.assertEqual(self.count(), 2)

    def test_curl_s_data_binary_is_a_format_unknown_since_1_8_3(self) -> None:
        form_type = "application/x-www-form-urlencoded"
        for version, status in ("1.7.5", 200), ("1.8.2", 200), ("1.8.3", 400), ("1.10.0", 400):
            with self.subTest(version):
                self.start(version=version)
                reply = self.send(zipped(images(2)), in_body=form_type, inbody="true")
                self.assertEqual(reply.status, status)
                if status == 400:
                    self.refused(reply, 400, "Unsupported format UNKNOWN")

    def test_chunked_bodies_are_for_zips_and_from_1_8_on(self) -> None:
        for version, kind, status in (("1.7.5", "application/zip", 400),
                                      ("1.8.0", "application/zip", 200),
                                      ("1.8.0", "application/octet-stream", 400)):
            with self.subTest(version=version, kind=kind):
                self.start(version=version)
                data = zipped(images(2))
                reply = self.call("POST", IMPORT + "?import-handler=DICOM-zip",
                                  iter([data[:100], data[100:]]),
                                  {"Content-Type": kind})
                self.assertEqual(reply.status, status)
                if status == 400:
                    self.refused(reply, 400, "In-body File posts must include the file directly")

    def test_a_form_needs_exactly_one_file(self) -> None:
        self.start()
        one: Tuple[str, Optional[str], bytes] = ("file", "x.zip", zipped(images(1)))
        cases: List[Tuple[List[Tuple[str, Optional[str], bytes]], str]] = [
            ([], "Unable to identify upload format."),
            ([("a", None, b"b")], "Unable to identify upload format."),
            ([one, one], "Importer is limited to one uploaded resource at a time."),
            ([one, ("reference", None, b"x")], "Unable to identify upload format.")]
        for parts, text in cases:
            reply = self.call("POST", IMPORT, form(parts), {
                "Content-Type": "multipart/form-data; boundary=" + BOUNDARY})
            self.refused(reply, 400, text)

    def test_form_fields_are_parameters_and_the_query_wins(self) -> None:
        xnat = self.start()
        parts = [("PROJECT_ID", None, b"MANUAL"), ("EXPT_LABEL", None, b"from_the_form"),
                 ("file", "x.zip", zipped(images(1)))]
        reply = self.call("POST", IMPORT, form(parts), {
            "Content-Type": "multipart/form-data; boundary=" + BOUNDARY}, PROJECT_ID="BRAIN")
        self.assertIn("/projects/BRAIN/", reply.text)
        self.assertTrue(reply.text.endswith("/from_the_form\r\n"))
        self.assertEqual(xnat.imports()[0].params["EXPT_LABEL"], "from_the_form")

    def test_the_ending_of_a_form_s_file_counts_and_its_case_too(self) -> None:
        self.start()
        for name, status in ("x.zip", 200), ("X.ZIP", 400), ("x.bin", 400):
            self.assertEqual(self.send(images(1), file_name=name).status, status, name)

    def test_a_form_that_is_cut_imports_nothing(self) -> None:
        xnat = self.start()
        body = form([("file", "x.zip", zipped(images(3)))])[:-60]
        reply = self.call("POST", IMPORT, body, {
            "Content-Type": "multipart/form-data; boundary=" + BOUNDARY})
        self.assertEqual((reply.status, xnat.prearchive), (400, []))

    def test_a_body_that_breaks_off_keeps_the_entries_before_the_cut(self) -> None:
        xnat = self.start()
        data = zipped(images(3), zipfile.ZIP_STORED)
        with socket.create_connection(("127.0.0.1", xnat.port)) as line:
            line.sendall(("POST %s?PROJECT_ID=BRAIN&EXPT_LABEL=007_pre HTTP/1.1\r\nHost: x\r\n"
                          "Authorization: Basic %s\r\nContent-Type: application/zip\r\n"
                          "Content-Length: %d\r\n\r\n" % (
                              IMPORT, base64.b64encode(b"alice:s3cret").decode(), len(data))
                          ).encode() + data[:len(data) * 2 // 3 - 400])
        self.assertTrue(xnat.wait_for(lambda: xnat.requests and xnat.requests[0].answered))
        self.assertIsNone(xnat.requests[0].status)
        self.assertEqual(self.count(), 1)

    def test_curl_gets_its_100_continue(self) -> None:
        xnat = self.start()
        with tempfile.TemporaryDirectory() as folder:
            data = dicom_file(study=STUDY, series=uid(1), pixels=os.urandom(3 << 20))
            Path(folder, "x.zip").write_bytes(zipped({"a": data}))
            done = curl("-v", "-u", "alice:s3cret", "-F", "file=@x.zip",
                        xnat.url + IMPORT + "?import-handler=DICOM-zip&PROJECT_ID=BRAIN",
                        folder=folder)
        self.assertIn("100 Continue", done.stderr)
        self.assertIn("/data/prearchive/projects/BRAIN/", done.stdout)

    def test_get_and_put_are_not_allowed(self) -> None:
        self.start()
        for method in "GET", "PUT":
            self.assertEqual(self.call(method, IMPORT).status, 405)

    def test_an_unknown_handler_is_404(self) -> None:
        self.start()
        self.refused(self.send(images(1), **{"import-handler": "FTP"}), 404,
                     "Unknown importer implementation specified: FTP")

    def test_format_html_turns_errors_into_200(self) -> None:
        self.start()
        self.assertEqual(self.send({"notes.txt": b"x"}, format="html").status, 200)

    def test_format_txt_drops_the_end_of_the_line(self) -> None:
        self.start()
        self.assertFalse(self.send(images(1), format="txt").text.endswith("\n"))

    def test_overwrite_with_prearchive_code_is_400(self) -> None:
        self.start()
        reply = self.send(images(1), overwrite="append", prearchive_code="1")
        self.assertEqual(reply.status, 400)

    def test_several_requests_share_a_connection_and_errors_do_not_end_it(self) -> None:
        xnat = self.start()
        connection = http.client.HTTPConnection("127.0.0.1", xnat.port, timeout=20)
        self.addCleanup(connection.close)
        for _ in range(3):
            connection.request("POST", IMPORT, zipped(images(3)),
                               {"Content-Type": "application/zip"})  # no login
            answer = connection.getresponse()
            self.assertEqual((answer.status, answer.headers["Connection"]), (401, None))
            answer.read()


class HowAZipIsRead(Case):
    """The table of section 3."""

    def test_directories_are_skipped_and_the_last_part_is_the_name(self) -> None:
        xnat = self.start()
        self.send({"a/": b"", "a/b/": b"", **images(1, name="a/b/%d_%d")})
        self.assertEqual(list(xnat.prearchive[0].files), [("1", "1_1")])

    def test_what_is_no_dicom_is_named(self) -> None:
        self.start()
        for name, data, text in (
                ("a/.DS_Store", b"\0\0\0\1Bud1", "unable to read DICOM object .DS_Store"),
                ("__MACOSX/._x", b"\0\5\26\7", "unable to read DICOM object ._x"),
                ("empty", b"", "unable to read DICOM object empty"),
                ("cut.dcm", dicom_file(study=STUDY, series=uid(1))[:450],
                 "unable to read DICOM object cut.dcm"),
                ("DICOMDIR", dicomdir_file(), "object DICOMDIR contains no SOP Class UID")):
            self.refused(self.send({name: data}), 400, text)

    def test_no_zip_and_an_empty_zip_are_200_with_nothing(self) -> None:
        xnat = self.start()
        for data in b"", b"not a zip", b"junk before" + zipped(images(1)), zipped({}):
            reply = self.send(data)
            self.assertEqual((reply.status, reply.text), (200, ""))
        self.assertEqual(xnat.prearchive, [])

    def test_an_end_between_entries_or_in_a_header_is_silent(self) -> None:
        data = zipped(images(3), zipfile.ZIP_STORED)
        second = data.index(b"PK\3\4", 4)
        for cut in second, second + 29, data.index(b"PK\1\2"):
            with self.subTest(cut):
                self.start()
                self.assertEqual(self.send(data[:cut]).status, 200)
                self.assertEqual(self.count(), 3 if cut > second + 29 else 1)

    def test_an_end_inside_an_entry_is_400_and_leaves_a_part(self) -> None:
        for method in zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED:
            with self.subTest(method):
                xnat = self.start()
                files = images(2, rows=64, columns=64)
                data = zipped(files, method)
                cut = data.index(b"PK\1\2") - 50
                self.refused(self.send(data[:cut]), 400, "unable to read DICOM object IM0002.dcm")
                self.assertEqual([file.damaged for file in xnat.files("007_pre")], [False, True])
                self.assertEqual(self.send(data).status, 200)
                self.assertEqual(xnat.stored("007_pre"), sorted(
                    sha256(content) for content in files.values()))

    def test_flipped_bytes_are_400(self) -> None:
        for method in zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED:
            with self.subTest(method):
                self.start()
                data = bytearray(zipped(images(2, rows=64, columns=64), method))
                data[data.index(b"PK\3\4", 4) - 20] ^= 255
                self.refused(self.send(bytes(data)), 400, "unable to read DICOM object IM0001.dcm")
                self.assertEqual(self.count(), 1)

    def test_zips_written_to_a_pipe(self) -> None:
        for version, method, status, text in (
                ("1.8.11", zipfile.ZIP_DEFLATED, 200, ""),
                ("1.8.11", zipfile.ZIP_STORED, 400, "unable to read data from file"),
                ("1.8.2", zipfile.ZIP_STORED, 400, "unable to read data from zip file")):
            with self.subTest(version=version, method=method):
                self.start(version=version)
                reply = self.send(zipped(images(2), method, pipe=True))
                self.assertEqual((reply.status, self.count()), (status, 2 if status == 200 else 0))
                self.assertIn(text, reply.text)

    @unittest.skipUnless(shutil.which("zip"), "needs zip")
    def test_zips_as_zip_writes_them(self) -> None:
        self.start()
        with tempfile.TemporaryDirectory() as folder:
            for name, data in images(3, name="%d_%d").items():
                Path(folder, name).write_bytes(data)
            for options, status in (["-0"], 400), (["-1"], 200), (["-9", "-fz"], 400):
                made = subprocess.run(["zip", "-qr", *options, "-", "."], cwd=folder,
                                      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
                self.assertEqual(self.send(made.stdout).status, status, options)
            for number, option in enumerate(("-0", "-1", "-fz")):
                name = str(number)
                subprocess.run(["zip", "-qr", option, name + ".zip", "1_1", "1_2", "1_3"],
                               cwd=folder, check=True)
                reply = self.send(Path(folder, name + ".zip").read_bytes(), EXPT_LABEL=name)
                self.assertEqual((reply.status, self.count(name)), (200, 3), option)

    def test_names_that_are_not_utf_8_are_400(self) -> None:
        self.start()
        data = zipped(images(2, name="%d_%d_name"))
        data = data.replace(b"1_2_name", b"1_2_n\xe4me")
        self.assertEqual(self.send(data).status, 400)
        self.assertEqual(self.count(), 1)
        self.assertEqual(self.send(images(2, name="%d_%d_ä")).status, 200)

    def test_tars_are_read_since_1_8_3(self) -> None:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for name, data in images(3).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for version, count in ("1.8.2", 0), ("1.8.3", 3):
            with self.subTest(version):
                self.start(version=version)
                self.assertEqual(self.send(file.getvalue(), file_name="x.tgz").status, 200)
                self.assertEqual(self.count(), count)

    def test_zips_in_zips_are_read_since_1_8_10(self) -> None:
        for version, status in ("1.8.9", 400), ("1.8.10", 200):
            with self.subTest(version):
                self.start(version=version)
                reply = self.send({"inner.zip": zipped(images(2)), **images(1, number=2)})
                self.assertEqual((reply.status, self.count()), (status, 3 if status == 200 else 0))
        self.refused(self.send({"x.gz": b"x"}), 400, "Unsupported format GZ")

    def test_a_zip_of_two_studies_gets_two_addresses(self) -> None:
        xnat = self.start()
        other = images(1, number=2, study=uid("another study"))
        self.assertEqual(len(set(self.send({**images(1), **other}).lines)), 2)
        self.assertEqual(len(xnat.prearchive), 2)

    def test_series_that_a_filter_rejects_are_not_kept_and_not_an_error(self) -> None:
        self.start(reject={"SCOUT"})
        reply = self.send(images(2, description="SCOUT"))
        self.assertEqual((reply.status, reply.text, self.count()), (200, "", 0))
        self.send({**images(2, description="SCOUT"), **images(1, number=2)})
        self.assertEqual(self.count(), 1)
        self.xnat.knobs.reject = lambda description: description.startswith("SC")
        self.assertEqual(self.send(images(2, description="SC2")).text, "")

    def test_dicom_in_all_forms_is_read(self) -> None:
        self.start()
        files = {}
        for number in range(1, 5):
            files.update(images(1, number=number, description="D%d" % number,
                                explicit=number % 2 == 0, preamble=number > 2))
        self.assertEqual(self.send(files).status, 200)
        self.assertEqual({(file.scan, file.description) for file in self.xnat.files("007_pre")},
                         {(str(number), "D%d" % number) for number in range(1, 5)})

    def test_a_bare_data_set_in_the_other_byte_order_is_read(self) -> None:
        def element(number: int, vr: bytes, value: bytes) -> bytes:
            return b"\0\x08" + struct.pack(">H", number) + vr + struct.pack(
                ">H", len(value)) + value

        image = xnat_standin.read_image(
            element(0x05, b"CS", b"ISO_IR 192") + element(0x16, b"UI", b"1.2.3\0") +
            element(0x18, b"UI", b"2.25.7\0\0"))
        self.assertEqual((image.sop_class, image.sop_instance), ("1.2.3", "2.25.7"))

    def test_what_deflates_well_is_read_whole_whatever_its_size(self) -> None:
        piece = xnat_standin.PIECE
        for size in 8 * piece - 1, 8 * piece, 8 * piece + 1, 2 << 20, (3 << 20) + 7:
            for unit in b"\0", b"\0" * 31 + b"x", os.urandom(4000):
                data = (unit * (size // len(unit) + 1))[:size]
                for pipe in False, True:  # without and with a data descriptor
                    packed = zipped({"a": data, "b": b"the next"}, pipe=pipe)
                    for step in piece, 1000:
                        more = iter(packed[at:at + step] for at in range(0, len(packed), step))
                        stream = xnat_standin.Stream(partial(next, more, b""))
                        found = [(entry.name, b"".join(entry.chunks) in (data, b"the next"))
                                 for entry in xnat_standin.zip_entries(stream)]
                        self.assertEqual(found, [("a", True), ("b", True)], (size, unit[:9], pipe))

    def test_a_large_image_that_deflates_well_is_taken(self) -> None:
        self.start()
        for pipe in False, True:
            data = zipped(images(1, pixels=bytes(2 << 20)), pipe=pipe)
            self.assertEqual(self.send(data).status, 200)
        self.assertEqual([file.damaged for file in self.xnat.files("007_pre")], [False])

    def test_a_copy_of_each_posted_file_is_kept_where_that_is_asked_for(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.start(keep=folder)
            self.assertEqual(self.send(images(2)).status, 200)
            (request, copy), = self.xnat.kept()
            with zipfile.ZipFile(str(copy)) as archive:
                self.assertEqual(tuple(archive.namelist()), request.entries)

    def test_sequences_of_undefined_length_are_stepped_over(self) -> None:
        whole = dicom_file(study=STUDY, series=uid(1), number=7)
        # (0008,1140) with one item of undefined length, which holds (0008,1155)
        sequence = (b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" b"\xfe\xff\0\xe0\xff\xff\xff\xff"
                    b"\x08\0\x55\x11UI\x04\x001.2\0" b"\xfe\xff\x0d\xe0\0\0\0\0"
                    b"\xfe\xff\xdd\xe0\0\0\0\0")
        at = whole.index(b"\x10\0\x10\0PN")
        image = xnat_standin.read_image(whole[:at] + sequence + whole[at:])
        self.assertEqual((image.number, image.series), ("7", uid(1)))


class WhatIgnoreUnparsablePassesOver(Case):
    """Section 3, by version."""

    def send_with(self, version: str, bad: Mapping[str, bytes], *faults: Fault) -> Reply:
        """One good file, a bad one, one good file."""
        self.start(version=version, faults=faults)
        return self.send({**images(1), **bad, **images(1, number=2)},
                         **{"Ignore-Unparsable": "true"})

    def test_a_text(self) -> None:
        for version, status in ("1.8.2", 400), ("1.8.3", 200), ("1.8.9", 200), ("1.10.0", 200):
            with self.subTest(version):
                self.assertEqual(self.send_with(version, {"n.txt": b"x"}).status, status)

    def test_a_dicomdir(self) -> None:
        for version, status in ("1.8.9", 400), ("1.8.10", 200), ("1.10.0", 200):
            with self.subTest(version):
                self.assertEqual(self.send_with(version, {"D": dicomdir_file()}).status, status)

    def test_a_full_disk_is_lost_data_in_1_8_10_and_an_error_elsewhere(self) -> None:
        full = Fault("disk full", entry=2)
        for version, status in ("1.8.9", 400), ("1.8.10", 200), ("1.9.2", 200), ("1.10.0", 400):
            with self.subTest(version):
                reply = self.send_with(version, images(1, number=3), full)
                self.assertEqual(reply.status, status)
                self.assertEqual(self.count(), 2 if status == 200 else 1)

    def test_nothing_at_all_is_an_error_all_the_same(self) -> None:
        self.start()
        self.refused(self.send({"a": b"x", "b": b"y"}, **{"Ignore-Unparsable": "true"}), 400,
                     "unable to read DICOM object b")

    def test_action_commit_implies_it(self) -> None:
        self.start()
        self.assertEqual(self.send({**images(1), "n.txt": b"x"}, action="commit").status, 200)

    def test_1_10_2_marks_the_session_of_a_client_that_has_gone_as_an_error_too(self) -> None:
        for version, status in ("1.10.1", "RECEIVING"), ("1.10.2", "ERROR"):
            with self.subTest(version):
                data = zipped(images(3), zipfile.ZIP_STORED)
                xnat = self.start(version=version, faults=[
                    Fault("reset during", after_bytes=data.rindex(b"PK\3\4"))])
                with self.assertRaises(ConnectionError):
                    self.send(data, in_body="application/zip")
                self.assertEqual(xnat.prearchive[0].status, status)

    def test_1_10_2_marks_a_partial_session_as_an_error(self) -> None:
        for version, status in (("1.9.2", "RECEIVING"), ("1.10.1", "RECEIVING"),
                                ("1.10.2", "ERROR"), ("1.11", "ERROR")):
            with self.subTest(version):
                xnat = self.start(version=version)
                self.send({**images(1), "n.txt": b"x"})
                self.assertEqual(xnat.prearchive[0].status, status)


class NamesAndPlaces(Case):
    """Sections 1.2, 4.3, 4.4, 5 and 9."""

    def test_the_same_zip_again_replaces_its_files(self) -> None:
        xnat = self.start()
        self.send(images(3))
        self.send(images(3))
        self.assertEqual((self.count(), len(xnat.prearchive)), (3, 1))

    def test_another_instance_of_the_same_name_gets_a_name_of_its_own(self) -> None:
        xnat = self.start()
        self.send(images(1, name="x%.0s%.0s"))
        self.send(images(1, first=2, name="x%.0s%.0s"))
        self.assertEqual(self.count(), 2)
        self.assertEqual(sorted(xnat.instances("007_pre").values()), [1, 1])

    def test_the_same_instance_under_two_names_is_kept_twice_unless_renamed(self) -> None:
        xnat = self.start()
        self.send(images(1, name="x%d%d"))
        self.send(images(1, name="y%d%d"))
        self.assertEqual(list(xnat.instances("007_pre").values()), [2])
        self.send(images(1, name="x%d%d"), EXPT_LABEL="other", rename="true")
        self.send(images(1, name="y%d%d"), EXPT_LABEL="other", rename="true")
        self.assertEqual(list(xnat.instances("other").values()), [1])

    def test_odd_characters_in_a_name_become_underscores(self) -> None:
        xnat = self.start()
        self.send(images(1, name="s/a b(%d)%d+ä.dcm"))
        self.assertEqual(list(xnat.prearchive[0].files), [("1", "a_b_1_1__.dcm")])

    def test_a_scan_without_a_proper_number_is_named_by_its_series(self) -> None:
        xnat = self.start()
        data = dicom_file(study=STUDY, series="1.2.3").replace(
            b"\x20\0\x11\0IS\2\x001 ", b"\x20\0\x11\0IS\2\0  ")
        self.send({"x": data})
        self.assertEqual(list(xnat.prearchive[0].files), [("1_2_3", "x")])

    def test_two_series_of_one_number_are_told_apart_when_built(self) -> None:
        xnat = self.start()
        self.send({**images(2), **images(3, name="z%d/Z%d", series=uid("other"))})
        self.assertEqual({scan for scan, _ in xnat.prearchive[0].files}, {"1"})
        self.commit(xnat.prearchive[0].uri.replace("/prearchive", "/data/prearchive"))
        scans = xnat.archive["BRAIN", "007_pre"].scans
        self.assertEqual({scan: len(files) for scan, files in scans.items()},
                         {"1": 2, "1-MR1": 3})

    def test_an_alias_is_answered_with_the_real_id(self) -> None:
        self.start()
        self.assertIn("/projects/BRAIN/", self.send(images(1), PROJECT_ID="brainy").text)

    def test_an_unknown_or_unreadable_project_is_200_and_unassigned(self) -> None:
        self.start()
        for project in "NONE", "SECRET", "brain":
            reply = self.send(images(1), PROJECT_ID=project)
            self.assertEqual(reply.status, 200)
            self.assertIn("/prearchive/projects/Unassigned/", reply.text)

    def test_a_header_may_route_an_unknown_project(self) -> None:
        self.start(route_by_header=True,
                   projects=[Project("SYNTHETIC STUDY", members={"alice": "owner"})])
        self.assertIn("/projects/SYNTHETIC STUDY/", self.send(images(1)).text)

    def test_without_labels_the_patient_or_a_fixed_word_names_the_session(self) -> None:
        self.start()
        empty = {"SUBJECT_ID": "", "EXPT_LABEL": ""}
        self.assertTrue(self.send(images(1), **empty).text.endswith("/dicom_upload\r\n"))
        reply = self.send(images(1, patient="P1"), **empty)
        self.assertTrue(reply.text.endswith("/P1\r\n"))

    def test_lowercase_names_count_only_since_1_8_10(self) -> None:
        for version, project in ("1.8.9", "Unassigned"), ("1.8.10", "BRAIN"):
            with self.subTest(version):
                self.start(version=version)
                reply = self.send(images(1), PROJECT_ID="", EXPT_LABEL="", project="BRAIN",
                                  session="low")
                self.assertIn("/projects/%s/" % project, reply.text)
                self.assertEqual(reply.text.endswith("/low\r\n"), version == "1.8.10")

    def test_the_default_handler_changed_in_1_8_10(self) -> None:
        for version, status in ("1.8.9", "READY"), ("1.8.10", "RECEIVING"):
            with self.subTest(version):
                xnat = self.start(version=version)
                self.send(images(1), PROJECT_ID="MANUAL", **{"import-handler": ""})
                self.assertEqual(xnat.prearchive[0].status, status)

    def test_labels_are_escaped_at_once_and_cleaned_when_archived(self) -> None:
        xnat = self.start()
        self.assertTrue(self.send(images(1), EXPT_LABEL="weird&label").text
                        .endswith("/weird&amp;label\r\n"))
        self.send(images(1), EXPT_LABEL="a.b")
        for row in xnat.prearchive:
            self.assertEqual(self.commit("/data" + row.uri).status, 301)
        self.assertEqual(xnat.labels(), ["a_b", "weird_amp_label"])

    def test_labels_that_cannot_be_cleaned_are_refused(self) -> None:
        xnat = self.start()
        self.refused(self.archived(images(1), EXPT_LABEL="a!"), 500,
                     "Identifiers cannot use special characters.")
        self.assertEqual(xnat.prearchive[0].status, "ERROR")

    def test_the_first_post_of_a_session_fixes_its_subject(self) -> None:
        xnat = self.start()
        self.send(images(1))
        self.send(images(1, number=2), SUBJECT_ID="other", prevent_auto_commit="true")
        self.assertEqual((xnat.prearchive[0].subject, xnat.prearchive[0].prevent_auto_commit),
                         ("007", False))


class Access(Case):
    """Sections 4.3, 7 and the order of section 11."""

    def test_jsession_answers_an_id_that_is_the_cookie(self) -> None:
        self.start()
        reply = self.call("POST", "/data/JSESSION")
        self.assertRegex(reply.text, "^[0-9A-F]{32}$")
        cookies = reply.headers.get_all("Set-Cookie") or []
        self.assertTrue(cookies[0].startswith("JSESSIONID=%s;" % reply.text))
        self.assertTrue(cookies[1].startswith("SESSION_EXPIRATION_TIME="))

    def log_in(self) -> Dict[str, str]:
        """The header of a new session."""
        return {"Cookie": "JSESSIONID=" + self.call("POST", "/data/JSESSION").text}

    def test_a_cookie_is_enough_until_it_is_deleted(self) -> None:
        self.start()
        cookie = self.log_in()
        self.assertEqual(self.call("GET", "/data/auth", headers=cookie, login=None).status, 200)
        self.call("DELETE", "/data/JSESSION", headers=cookie, login=None)
        self.assertEqual(self.call("GET", "/data/auth", headers=cookie, login=None).status, 401)

    def test_a_live_cookie_passes_over_the_password_and_a_dead_one_does_not(self) -> None:
        self.start()
        cookie = self.log_in()
        wrong = "alice", "wrong"
        self.assertEqual(self.call("GET", "/data/auth", headers=cookie, login=wrong).status, 200)
        self.xnat.knobs.session_timeout = 0
        self.assertEqual(self.call("GET", "/data/auth", headers=cookie, login=wrong).status, 401)
        self.assertEqual(self.call("GET", "/data/auth", headers=cookie).status, 200)

    def test_a_cookie_of_one_user_with_the_password_of_another_is_the_other(self) -> None:
        self.start()
        reply = self.call("GET", "/data/auth", headers=self.log_in(), login=("bob", "b0b"))
        self.assertEqual(reply.text, "User 'bob' is logged in")

    def test_a_password_may_hold_colons(self) -> None:
        self.start(users=[User("dora", "a:b:c")])
        self.assertEqual(self.call("GET", "/data/auth", login=("dora", "a:b:c")).status, 200)

    def test_a_basic_header_without_a_colon_is_500(self) -> None:
        self.start()
        self.assertEqual(self.call("GET", "/data/auth", login=("alice",)).status, 500)

    def test_nobody_is_asked_for_a_login(self) -> None:
        self.start()
        reply = self.call("GET", "/data/projects", login=None)
        self.assertEqual((reply.status, reply.headers["WWW-Authenticate"]),
                         (401, 'Basic realm="XNAT"'))

    def test_a_browser_is_sent_to_the_login_page(self) -> None:
        self.start(context_path="/xnat")
        reply = self.call("GET", "/data/projects", login=None, headers={"User-Agent": "Mozilla/5"})
        self.assertEqual(reply.status, 302)
        self.assertEqual(reply.headers["Location"], self.xnat.url + "/app/template/Login.vm")
        page = self.call("GET", "/app/template/Login.vm", login=None)
        self.assertEqual(page.status, 200)
        self.assertIn("<!-- BEGIN xnat-templates/screens/Login.vm -->", page.text)

    def test_an_open_site_has_a_guest(self) -> None:
        self.start(require_login=False)
        self.assertIn("guest", self.call("GET", "/data/auth", login=None).text)
        names = [row["ID"] for row in self.call("GET", "/data/projects", login=None).rows]
        self.assertEqual(names, ["PUBLIC"])

    def test_an_expired_password_redirects_every_request(self) -> None:
        self.start(users=[User("alice", "s3cret", expired=True)])
        reply = self.call("POST", "/data/JSESSION")
        self.assertEqual((reply.status, reply.text), (302, ""))
        self.assertTrue(reply.headers["Location"].endswith("/XDATScreen_UpdateUser.vm"))

    def test_twenty_wrong_logins_lock_the_account(self) -> None:
        self.start(max_failed_logins=3)
        for _ in range(3):
            self.call("GET", "/data/auth", login=("alice", "wrong"))
        self.assertEqual(self.call("GET", "/data/auth").status, 401)
        self.assertEqual(self.call("GET", "/data/auth", login=("bob", "b0b")).status, 200)

    def test_too_many_sessions_look_like_a_wrong_password(self) -> None:
        self.start(max_sessions=2)
        cookie = self.log_in()
        self.log_in()
        reply = self.call("GET", "/data/auth")
        self.assertEqual(reply.status, 401)
        self.assertIn("maximum number of user sessions", reply.text)
        self.assertEqual(self.call("GET", "/data/auth", headers=cookie).status, 200)

    def test_a_disabled_account_is_401_by_cookie_too(self) -> None:
        xnat = self.start()
        cookie = self.log_in()
        xnat.accounts.users["alice"].disabled = True
        for login in None, ALICE:
            reply = self.call("GET", "/data/auth", headers=cookie, login=login)
            self.assertEqual(reply.status, 401)

    def test_a_browser_with_a_cookie_needs_the_csrf_token(self) -> None:
        self.start()
        session, token = self.call("POST", "/data/JSESSION?CSRF=true").text.split("; XNAT_CSRF=")
        browser = {"User-Agent": "Mozilla/5", "Cookie": "JSESSIONID=" + session}
        self.assertEqual(self.call("DELETE", "/data/JSESSION", headers=browser,
                                   login=None).status, 500)
        self.assertEqual(self.call("DELETE", "/data/JSESSION", headers=browser, login=None,
                                   XNAT_CSRF=token).status, 200)

    def test_who_may_edit_what(self) -> None:
        self.start()
        for login, expected in ((ALICE, ["BRAIN", "MANUAL", "OVER"]), (("bob", "b0b"), []),
                                (("carol", "car0l"), ["SECRET"]),
                                (("admin", "adm1n"),
                                 ["BRAIN", "MANUAL", "OVER", "SECRET", "PUBLIC"])):
            reply = self.call("GET", "/data/projects", login=login, permissions="edit",
                              dataType="xnat:subjectData", format="json")
            self.assertEqual([row["id"] for row in reply.rows], expected)

    def test_a_collaborator_s_import_is_200_and_his_commit_403(self) -> None:
        self.start()
        bob = "bob", "b0b"
        reply = self.send(images(1), login=bob)
        self.assertEqual(reply.status, 200)
        self.assertIn("/projects/BRAIN/", reply.text)
        self.assertEqual(self.commit(reply.lines[0], login=bob).status, 403)
        self.assertEqual(self.call("GET", reply.lines[0] + "?format=json", login=bob).status, 403)
        listed = self.call("GET", "/data/prearchive/projects/BRAIN?format=json", login=bob)
        self.assertEqual(len(listed.rows), 1)

    def test_the_version_needs_a_login(self) -> None:
        self.start(version="1.8.7-SNAPSHOT")
        self.assertEqual(json.loads(self.call("GET", "/xapi/siteConfig/buildInfo").text)
                         ["version"], "1.8.7-SNAPSHOT")
        self.assertEqual(self.call("GET", "/xapi/siteConfig/buildInfo", login=None).status, 401)
        self.assertFalse(self.xnat.since(1, 8, 8))

    def test_a_site_under_a_context_path_is_nowhere_else(self) -> None:
        xnat = self.start(context_path="/xnat")
        self.assertTrue(self.send(images(1)).text.startswith("/data/prearchive/"))
        self.xnat.url = xnat.url.replace("/xnat", "")
        self.assertEqual(self.call("GET", "/data/projects").status, 404)

    def test_rest_is_another_name_for_data(self) -> None:
        self.start()
        self.assertEqual(self.call("GET", "/REST/projects/BRAIN").status, 200)


class CommitsAndTheArchive(Case):
    """Section 6."""

    def test_conflicts_were_409_before_1_7_6(self) -> None:
        self.start(version="1.7.5")
        self.archived(images(1))
        self.refused(self.archived(images(1)), 409, "Session already exists with matching files.")

    def test_a_label_of_another_subject_is_refused_but_case_does_not_matter(self) -> None:
        xnat = self.start()
        self.archived(images(1), SUBJECT_ID="Sub")
        self.assertEqual(self.archived(images(1, number=2), SUBJECT_ID="sUB").status, 301)
        self.refused(self.archived(images(1, number=3), SUBJECT_ID="x"), 500,
                     "007_pre Already Exists for another Subject")
        self.assertEqual(xnat.archive["BRAIN", "007_pre"].subject, "Sub")

    def test_another_study_under_the_same_label_is_refused(self) -> None:
        self.start()
        self.archived(images(1))
        self.refused(self.archived(images(1, study=uid("another"))), 500,
                     "Invalid modification of session UID via archive process.")

    def test_new_scans_merge_into_an_archived_session(self) -> None:
        self.start()
        self.archived(images(2))
        self.assertEqual(self.archived(images(3, number=2)).status, 301)
        self.assertEqual(self.archived(images(2, first=3)).status, 301)  # the rest of a series
        self.assertEqual(self.count(), 7)

    def test_code_5_replaces_equal_instances(self) -> None:
        self.start()
        self.archived(images(2), PROJECT_ID="OVER")
        self.assertEqual(self.archived(images(3), PROJECT_ID="OVER").status, 301)
        self.assertEqual(self.count(), 3)

    def test_a_second_commit_is_404_and_a_locked_one_409(self) -> None:
        xnat = self.start(build_delay=30)
        address = self.send(images(1)).lines[0]
        first = threading.Thread(target=self.try_commit, args=(address,))
        first.start()
        self.assertTrue(xnat.wait_for(lambda: xnat.prearchive[0].status == "_BUILDING"))
        self.refused(self.commit(address), 409, "session document locked")
        xnat._stopping.set()  # ends the delay
        first.join(10)
        self.assertEqual(self.commit(address).status, 404)

    def try_commit(self, address: str) -> None:
        """A commit whose answer does not matter."""
        try:
            self.commit(address)
        except OSError:
            pass

    def test_a_commit_gives_up_waiting_while_the_archiving_goes_on(self) -> None:
        xnat = self.start(archive_seconds=0.2, archive_timeout=0.05)
        self.refused(self.archived(images(2)), 500, "did not return a valid data URI within")
        self.assertTrue(xnat.wait_for(lambda: ("BRAIN", "007_pre") in xnat.archive))

    def test_an_action_is_needed(self) -> None:
        self.start()
        address = self.send(images(1)).lines[0]
        self.refused(self.call("POST", address, b""), 400, "No action parameter")

    def test_build_move_and_delete(self) -> None:
        xnat = self.start()
        address = self.send(images(1)).lines[0]
        self.assertEqual(self.call("POST", address + "?action=build").status, 200)
        self.assertEqual(xnat.prearchive[0].status, "READY")
        moved = self.call("POST", address + "?action=move&newProject=MANUAL")
        self.assertEqual(moved.status, 301)
        self.assertIn("/projects/MANUAL/", moved.text)
        self.assertEqual(self.call("DELETE", moved.text).status, 200)
        self.assertEqual(xnat.prearchive, [])

    def test_an_old_row_of_the_same_key_is_reopened(self) -> None:
        xnat = self.start()
        address = self.send(images(1), PROJECT_ID="MANUAL").lines[0]
        self.commit(address)
        self.assertEqual(self.send(images(1, number=2), PROJECT_ID="MANUAL").lines, [address])
        self.assertEqual(xnat.prearchive[0].status, "RECEIVING")

    def test_the_idle_thread_archives_what_it_finds(self) -> None:
        xnat = self.start(idle_seconds=1, tick_seconds=0.02)
        self.send(images(3))
        self.send(images(2), PROJECT_ID="MANUAL", EXPT_LABEL="by_hand")
        self.assertTrue(xnat.wait_for(lambda: len(xnat.archived_by_idle) == 2))
        self.assertEqual({(each.label, each.files, each.archived)
                          for each in xnat.archived_by_idle},
                         {("007_pre", 3, True), ("by_hand", 2, False)})

    def test_prevent_auto_commit_keeps_the_idle_thread_away(self) -> None:
        xnat = self.start(idle_seconds=0.0)
        self.send(images(3), prevent_auto_commit="true")
        self.send(images(3), EXPT_LABEL="x", SOURCE="uploader")
        xnat.store.archive_idle()
        self.assertEqual(xnat.archived_by_idle, [])
        self.assertEqual([row.status for row in xnat.prearchive], ["RECEIVING"] * 2)

    def test_an_idle_half_session_conflicts_or_merges_later(self) -> None:
        xnat = self.start(idle_seconds=0.0)
        self.send(images(2))
        xnat.store.archive_idle()
        self.assertEqual(self.archived(images(2, number=2)).status, 301)
        self.send(images(1))
        xnat.store.archive_idle()
        self.assertEqual(xnat.prearchive[0].status, "CONFLICT")

    def test_commit_inside_the_import_since_1_8_10(self) -> None:
        xnat = self.start()
        reply = self.send(images(2), action="commit", PROJECT_ID="MANUAL", AA="true")
        self.assertTrue(reply.text.startswith("/data/archive/projects/MANUAL/subjects/007/"))
        self.refused(self.send(images(2), action="commit", PROJECT_ID="MANUAL", AA="true"), 400,
                     "unable to archive for the Prearchive session")
        xnat.knobs.version = "1.8.9"
        reply = self.send(images(2), action="commit", AA="true")
        self.assertTrue(reply.text.startswith("/data/prearchive/"))

    def test_the_archive_service_needs_a_built_session(self) -> None:
        self.start()
        address = self.send(images(2)).lines[0]
        self.assertEqual(self.call("POST", "/data/services/archive", src=address).status, 500)
        self.call("POST", address + "?action=build")
        reply = self.call("POST", "/data/services/archive", src=address)
        self.assertEqual((reply.status, reply.text),
                         (200, "/data/archive/projects/BRAIN/subjects/007/experiments/007_pre\r\n"))

    def test_the_archive_service_takes_a_plain_form_too(self) -> None:
        xnat = self.start()
        address = self.send(images(2)).lines[0]
        self.call("POST", address + "?action=build")
        reply = self.call("POST", "/data/services/archive", urlencode({"src": address}), {
            "Content-Type": "application/x-www-form-urlencoded"})
        self.assertEqual((reply.status, len(xnat.archive)), (200, 1))

    def test_si_builds_a_folder_of_its_own_for_every_post(self) -> None:
        xnat = self.start()
        si = {"import-handler": "SI", "PROJECT_ID": "MANUAL"}
        first = self.send({**images(2), "notes.txt": b"x"}, **si)
        second = self.send(images(2, number=2), **si)
        self.assertNotEqual(first.text, second.text)
        self.assertEqual([row.status for row in xnat.prearchive], ["READY"] * 2)
        self.refused(self.send({"n.txt": b"x"}, **si), 400,
                     "Upload did not include parsable files for session generation.")
        other = images(1, number=3, study=uid("another"))
        self.refused(self.send({**images(1), **other}, **si), 400,
                     "Upload included files for multiple imaging sessions.")
        si["PROJECT_ID"] = "BRAIN"
        self.assertIn("/data/archive/", self.send(images(2), **si).text)
        self.refused(self.send(images(2), **si), 409, "matching files")

    def test_gradual_dicom_takes_one_file(self) -> None:
        self.start()
        data = dicom_file(study=STUDY, series=uid(1))
        self.assertEqual(self.send(data, in_body="application/dicom",
                                   **{"import-handler": ""}).status, 200)
        self.assertEqual(self.count(), 1)

    def test_files_sent_into_a_session_that_is_archived_are_lost(self) -> None:
        xnat = self.start(archive_seconds=0.3)
        address = self.send(images(2)).lines[0]
        commit = threading.Thread(target=self.commit, args=(address,))
        commit.start()
        self.assertTrue(xnat.wait_for(lambda: xnat.prearchive[0].status == "_ARCHIVING"))
        self.assertEqual(self.send(images(2, number=2)).status, 200)
        commit.join()
        self.assertEqual(self.count(), 2)
        self.assertIn("an import into 007_pre while it was committed", xnat.abuses[0])


class WhatCanBeRead(Case):
    """Section 8."""

    def test_the_prearchive_list_has_nineteen_columns_of_text(self) -> None:
        self.start()
        address = self.send(images(2)).lines[0]
        [row] = self.call("GET", "/data/prearchive/projects/BRAIN?format=json").rows
        self.assertEqual(len(row), 19)
        self.assertEqual(("/data" + row["url"], row["status"], row["prevent_auto_commit"]),
                         (address, "RECEIVING", "false"))
        self.assertEqual(self.call("GET", "/data/prearchive/projects/SECRET").status, 403)
        self.assertEqual(self.call("GET", address + "?format=json").rows, [row])

    def test_nothing_can_be_counted_before_the_build(self) -> None:
        self.start()
        address = self.send(images(2)).lines[0]
        for what in "", "/scans", "/resources", "/scans/1/resources", \
                "/scans/1/resources/DICOM/files":
            self.refused(self.call("GET", address + what), 404, "Unable to locate prearc resource")

    def test_counts_in_the_prearchive_after_the_build(self) -> None:
        self.start()
        self.send(images(3, number=2, description="T2"), PROJECT_ID="MANUAL")
        address = self.send(images(2), PROJECT_ID="MANUAL").lines[0]
        self.commit(address)
        rows = self.call("GET", address + "/resources?format=json").rows
        self.assertEqual({row["cat_id"]: row["file_count"] for row in rows}, {"2": "3", "1": "2"})
        self.assertEqual({row["label"] for row in rows}, {"DICOM"})
        scans = self.call("GET", address + "/scans?format=json").rows
        self.assertEqual(scans[0], {"ID": "2", "xsiType": "xnat:mrScanData",
                                    "series_description": "T2"})
        [row] = self.call("GET", address + "/scans/1/resources?format=json").rows
        self.assertEqual(row["file_count"], "2")
        files = self.call("GET", address + "/scans/1/resources/DICOM/files?format=json").rows
        self.assertEqual({row["Name"] for row in files}, {"IM0001.dcm", "IM0002.dcm"})
        self.assertEqual(self.call("GET", address + "/scans/9/resources").status, 404)
        self.call("DELETE", address)
        self.assertEqual(self.call("GET", address + "?format=json").rows, [])

    def test_counts_in_the_archive(self) -> None:
        self.start(snapshots=True)
        place = "/data/projects/brainy/subjects/007/experiments/007_pre"
        self.assertEqual(self.call("GET", place + "?format=json").status, 404)
        self.archived(images(3))
        data = json.loads(self.call("GET", place + "?format=json").text)
        self.assertEqual(data["items"][0]["data_fields"]["label"], "007_pre")
        self.assertEqual([row["ID"] for row in self.call("GET", place + "/scans").rows], ["1"])
        rows = self.call("GET", place + "/scans/1/resources").rows
        self.assertEqual([(row["label"], row["file_count"]) for row in rows],
                         [("DICOM", "3"), ("SNAPSHOTS", "2")])
        rows = self.call("GET", place + "/scans/ALL/resources").rows
        self.assertEqual([(row["cat_id"], row["label"], row["file_count"]) for row in rows],
                         [("1", "DICOM", "3"), ("1", "SNAPSHOTS", "2")])
        files = self.call("GET", place + "/scans/1/resources/DICOM/files").rows
        self.assertEqual(len(files), 3)
        self.assertEqual(set(files[0]), {"Name", "Size", "URI", "collection", "file_tags",
                                         "file_format", "file_content", "cat_ID", "digest"})
        for wrong in place.replace("007/", "008/"), place + "/scans/9/resources":
            self.assertEqual(self.call("GET", wrong).status, 404)

    def test_lists_for_people_and_other_clients(self) -> None:
        self.start()
        self.archived(images(1))
        brain = "/data/projects/BRAIN"
        for path, column, value in (
                (brain + "/subjects", "label", "007"), (brain + "/experiments", "label", "007_pre"),
                (brain + "/subjects/007/experiments", "label", "007_pre"),
                ("/data/experiments", "project", "BRAIN")):
            self.assertEqual([row[column] for row in self.call("GET", path).rows], [value], path)
        self.assertEqual(self.call("GET", brain + "/subjects/007").status, 200)
        self.assertEqual(self.call("GET", brain + "/subjects/008").status, 404)
        self.assertEqual(self.call("GET", brain + "/prearchive_code").text, "4")
        self.assertEqual(self.call("GET", "/data/prearchive").rows, [])
        self.assertEqual(self.call("GET", "/data/version").status, 404)
        self.assertEqual(self.call("GET", brain + "/experiments?format=csv").text.split("\n")[0],
                         "ID,project,date,xsiType,label,insert_date,URI")
        self.assertEqual(self.call("GET", "/xapi/users/username").text, "alice")

    def test_sessions_are_found_by_label_within_a_project_and_by_id_anywhere(self) -> None:
        self.start()
        self.archived(images(2))
        long = "/data/archive/projects/BRAIN/subjects/XNAT_S_007/experiments/007_pre"
        between, short = "/data/projects/BRAIN/experiments/007_pre", "/data/experiments/XNAT_E00001"
        for path in long, between, short:
            data = json.loads(self.call("GET", path + "?format=json").text)
            self.assertEqual(data["items"][0]["data_fields"]["ID"], "XNAT_E00001", path)
        self.assertEqual(self.call("GET", "/data/experiments/007_pre").status, 404)
        for path in long, short:
            [row] = self.call("GET", path + "/scans/1/resources").rows
            files = self.call("GET", "%s/scans/1/resources/%s/files" % (
                path, row["xnat_abstractresource_id"])).rows
            self.assertEqual(len(files), 2, path)
            self.assertEqual(self.call("GET", path + "/scans/1/resources/9/files").status, 404)
            self.assertEqual(self.call("GET", path + "/resources").rows, [])
            self.assertEqual(self.call("GET", path + "/scans/1").status, 200)
        self.assertEqual(self.call("GET", between + "/scans").status, 404)
        self.assertEqual(self.call("GET", short, login=("carol", "car0l")).status, 404)

    def test_a_list_has_the_columns_that_were_asked_for(self) -> None:
        self.start()
        self.archived(images(1))
        path = "/data/projects/BRAIN/experiments?columns=ID,subject_label,xnat:a/subject_id&"
        [row] = self.call("GET", path + "label=007_pre").rows
        self.assertEqual(row, {"ID": "XNAT_E00001", "subject_label": "007",
                               "subject_ID": "XNAT_S_007", "URI": "/data/experiments/XNAT_E00001"})
        self.assertEqual(self.call("GET", path + "label=other").rows, [])

    def test_no_two_resources_have_the_same_number(self) -> None:
        self.start(snapshots=True)
        self.archived({**images(1), **images(1, number=2)})
        place, numbers = "/data/experiments/XNAT_E00001/scans", []
        for scan in self.call("GET", place).rows:
            rows = self.call("GET", "%s/%s/resources" % (place, scan["ID"])).rows
            numbers += [row["xnat_abstractresource_id"] for row in rows]
        self.assertEqual(len(set(numbers)), 4)

    def test_what_is_on_disk_outlives_a_restart_and_logins_do_not(self) -> None:
        xnat = self.start()
        self.archived(images(1))
        login = self.call("POST", "/data/JSESSION").text
        with xnat.down():
            with self.assertRaises(OSError):
                self.call("GET", "/data/auth")
        self.assertEqual(len(xnat.stored("007_pre")), 1)
        self.assertNotIn(login, xnat.accounts.sessions)
        self.assertEqual(self.call("GET", "/data/auth").status, 200)

    def test_the_login_of_pypi_s_xnat_has_the_password_in_its_body(self) -> None:
        self.start()
        self.assertEqual(self.call("GET", "/", login=None).status, 200)
        for password, status in ("s3cret", 200), ("wrong", 401):
            reply = self.call("PUT", "/data/services/auth", "username=alice&password=" + password,
                              login=None)
            self.assertEqual(reply.status, status)
            self.assertEqual("Set-Cookie" in reply.headers, status == 200)


SESSION = "/data/projects/BRAIN/subjects/007/experiments/007_pre"


class WhatASessionHolds(Case):
    """Section 13.1."""

    def get(self, path: str, **params: str) -> List[Dict[str, str]]:
        """The rows of a table."""
        reply = self.call("GET", path, format="json", **params)
        self.assertEqual(reply.status, 200, reply.text)
        return reply.rows

    def counts(self, what: str = "/scans/ALL/resources",
               **params: str) -> List[Tuple[str, str, str]]:
        """Scan, count and size of each resource."""
        return [(row["cat_id"], row["file_count"], row["file_size"])
                for row in self.get(SESSION + what, **params)]

    def test_scans_tell_their_series_and_unknown_columns_are_passed_over(self) -> None:
        self.start()
        self.archived({**images(2, description="T1"), **images(1, number=2, description="T2")})
        for columns in "ID,UID,series_description", "ID,nonsense,UID,xnat:a/b,series_description":
            rows = self.get(SESSION + "/scans", columns=columns)
            self.assertEqual([[row["ID"], row["UID"], row["series_description"]] for row in rows],
                             [["1", uid(STUDY, 1), "T1"], ["2", uid(STUDY, 2), "T2"]])
            self.assertEqual(set(rows[0]), {"ID", "UID", "series_description", "URI"})
        self.assertNotIn("UID", self.get(SESSION + "/scans")[0])
        [row, _] = self.get(SESSION + "/scans", columns="ID,type,quality,xsiType,frames,modality")
        self.assertEqual((row["frames"], row["modality"]), ("2", "MR"))

    def test_the_resources_of_all_scans_come_in_one_answer(self) -> None:
        self.start()
        self.archived({**images(2), **images(1, number=2)})
        counts = self.counts()
        self.assertEqual([(scan, count) for scan, count, _ in counts], [("1", "2"), ("2", "1")])
        self.assertGreater(int(counts[0][2]), 1000)
        for what in "/scans/*/resources", "/scans/%2A/resources", "/resources?all=true":
            path, _, query = what.partition("?")
            self.assertEqual(self.counts(path, **dict(parse_qsl(query))), counts, what)
        self.assertEqual(self.counts("/resources"), [])

    def test_statistics_may_be_blank_until_they_are_asked_for(self) -> None:
        self.start(statistics="on request")
        self.archived({**images(2), **images(1, number=2)})
        blank = [("1", "", ""), ("2", "", "")]
        for what in "/scans/ALL/resources", "/resources":
            self.assertEqual(self.counts(what, all="true"), blank)
        self.assertEqual(self.counts("/scans/1/resources"), blank[:1])
        asked = self.counts(cache_file_stats="true")
        self.assertEqual([count for _, count, _ in asked], ["2", "1"])
        self.assertEqual(self.counts(), asked)  # they are kept...
        self.archived(images(1, first=3))
        self.assertEqual(self.counts(), [blank[0], asked[1]])  # ...until the scan changes

    def test_statistics_may_stay_blank_and_the_names_are_there_all_the_same(self) -> None:
        xnat = self.start(statistics="never")
        self.archived(images(2))
        self.assertEqual(self.counts(cache_file_stats="true"), [("1", "", "")])
        names = SESSION + "/scans/1/resources/DICOM/files"
        self.assertEqual([row["Name"] for row in self.get(names)], ["IM0001.dcm", "IM0002.dcm"])
        xnat.knobs.file_names = False
        self.assertEqual(self.get(names), [])

    def test_a_project_s_sessions_tell_label_subject_and_study(self) -> None:
        xnat = self.start()
        self.archived(images(1))
        self.archived(images(1, study=uid("b")), EXPT_LABEL="b", SUBJECT_ID="008")
        self.archived(images(1), PROJECT_ID="OVER")
        wanted = {"project": "BRAIN", "xsiType": "xnat:imageSessionData",
                  "columns": "label,subject_label,UID"}
        rows = self.get("/data/experiments", **wanted)
        self.assertEqual([(row["label"], row["subject_label"], row["uid"]) for row in rows],
                         [("007_pre", "007", STUDY), ("b", "008", uid("b"))])
        xnat.knobs.refuse_lists = ["archive"]
        self.assertEqual(self.call("GET", "/data/experiments", **wanted).status, 403)
        self.assertEqual(self.call("GET", SESSION + "/scans").status, 200)

    def test_a_project_s_prearchive_may_be_refused(self) -> None:
        self.start(refuse_lists=["prearchive"])
        address = self.send(images(1)).lines[0]
        self.assertEqual(self.call("GET", "/data/prearchive/projects/BRAIN").status, 403)
        self.assertEqual(self.call("GET", address + "?format=json").status, 200)

    def test_what_people_made_by_hand_may_have_no_uid(self) -> None:
        xnat = self.start()
        xnat.make_session("BRAIN", "007_pre")
        xnat.make_scan("BRAIN", "007_pre", "1")
        xnat.make_scan("BRAIN", "007_pre", "2", uid="1.2.3")
        rows = self.get(SESSION + "/scans", columns="ID,UID")
        self.assertEqual([row["UID"] for row in rows], ["", "1.2.3"])
        self.assertEqual(self.counts(), [("1", "0", "0"), ("2", "0", "0")])


class WhatTheArchiveRefuses(Case):
    """Section 13.3."""

    def not_archived(self, text: str, content: Mapping[str, bytes], status: str = "CONFLICT",
                     **params: str) -> str:
        """The commit is a 500 with this text, which the row keeps; its address."""
        address = self.send(content, **params).lines[0]
        self.refused_commit(address, text, status)
        return address

    def refused_commit(self, address: str, text: str, status: str, **params: str) -> None:
        """The commit of this row is refused."""
        self.refused(self.commit(address, **params), 500,
                     "FAILED: Unable to archive 007_pre: Operation Failed: " + text)
        self.assertEqual([row.status for row in self.xnat.prearchive], [status])
        self.assertIn(text, self.call("GET", address + "/logs/last").text)

    def ids(self) -> Dict[str, int]:
        """How many files each scan in the archive has."""
        return {scan: len(files)
                for scan, files in self.xnat.archive["BRAIN", "007_pre"].scans.items()}

    def test_one_instance_twice_in_a_scan_is_an_error_that_only_a_new_row_mends(self) -> None:
        text = ("Scan 1 DICOM catalog contains duplicated SOP instance UIDs: "
                + uid(uid(STUDY, 1), 1))
        for version, knob, refused in (("1.8.6", True, False), ("1.8.7", True, True),
                                       ("1.10.2", True, True), ("1.10.2", False, False)):
            with self.subTest(version=version, knob=knob):
                self.start(version=version, unique_sop_uids=knob)
                files = {**images(2), **images(1, name="copy/%d_%d")}
                if not refused:
                    self.assertEqual((self.archived(files).status, self.ids()), (301, {"1": 3}))
                    continue
                address = self.not_archived(text, files, "ERROR")
                self.send(images(2), overwrite="delete")
                self.refused_commit(address, text, "ERROR", overwrite_files="true")
                self.call("DELETE", address)
                self.assertEqual(self.archived(images(2)).status, 301)

    def test_one_instance_in_two_scans_is_archived(self) -> None:
        self.start()
        again = images(1, number=2, sop_instance=uid(uid(STUDY, 1), 1))
        self.assertEqual(self.archived({**images(1), **again}).status, 301)

    def test_what_a_cut_upload_left_is_a_duplicate_or_no_dicom_or_is_replaced(self) -> None:
        cases = (  # where it is cut, whether hash names are used when it is sent again
            (b"\xe0\x7f\x10\0OW", True, "duplicated SOP instance UIDs"),
            (b"\x20\0\x52\0UI", True, "has 1 non-DICOM (or non-parsable DICOM) files"),
            (b"\x20\0\x52\0UI", False, ""))
        for mark, rename, text in cases:
            with self.subTest(mark=mark, rename=rename):
                self.start()
                again = {"rename": "true"} if rename else {}
                data = zipped(images(2), zipfile.ZIP_STORED)
                cut = data.rindex(mark) + 20
                self.refused(self.send(data[:cut]), 400, "unable to read DICOM object IM0002.dcm")
                files = images(2)
                del files["s1/IM0001.dcm"]
                if text:
                    self.not_archived("Scan 1 ", files, "ERROR", **again)
                    self.assertIn(text, self.xnat.prearchive[0].log)
                else:
                    self.assertEqual((self.archived(files).status, self.ids()), (301, {"1": 2}))

    def test_a_part_alone_is_refused_if_its_header_is_cut_or_the_parser_is_strict(self) -> None:
        header, pixels = b"\x20\0\x52\0UI", b"\xe0\x7f\x10\0OW"
        for mark, strict, status in ((header, False, 500), (pixels, False, 301),
                                     (pixels, True, 500)):
            with self.subTest(mark=mark, strict=strict):
                xnat = self.start(strict_parser=strict)
                data = zipped(images(2), zipfile.ZIP_STORED)
                self.send(data[:data.rindex(mark) + 20])
                reply = self.commit("/data" + xnat.prearchive[0].uri)
                self.assertEqual(reply.status, status)
                self.assertEqual("Scan 1 has 1 non-DICOM" in reply.text, status == 500)

    def test_a_twin_that_comes_later_is_renamed_and_refused_when_it_comes_again(self) -> None:
        self.start()
        twin: Dict[str, Any] = {"series": uid("twin"), "name": "t%d/T%d"}
        self.archived(images(2, number=5))
        self.assertEqual(self.archived(images(2, number=5, **twin)).status, 301)
        self.assertEqual(self.ids(), {"5": 2, "5-MR1": 2})
        text = "Session already contains a scan with the same UID, but a different number (5-MR1)."
        for first in 1, 3:
            address = self.not_archived(text, images(2, number=5, first=first, **twin))
            self.refused_commit(address, text, "CONFLICT", overwrite_files="true")
            self.call("DELETE", address)
        both = {**images(3, number=5), **images(3, number=5, **twin)}
        address = self.not_archived("Session already exists with matching files.", both)
        self.assertEqual(self.commit(address, overwrite_files="true").status, 301)
        self.assertEqual(self.ids(), {"5": 3, "5-MR1": 3})

    def test_twins_of_one_round_may_all_get_another_number(self) -> None:
        self.start(number_all_twins=True)
        self.archived({**images(1, number=5), **images(2, number=5, series=uid("t"), name="%d%d"),
                       **images(1, number=6)})
        self.assertEqual(self.ids(), {"5-MR1": 1, "5-MR2": 2, "6": 1})

    def test_another_modality_than_the_session_s_is_refused(self) -> None:
        self.start()
        ct, other = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7"
        self.archived(images(1))
        for sop_class in ct, other:
            address = self.not_archived("Invalid modification of session modality",
                                        images(1, number=2, sop_class=sop_class))
            self.call("DELETE", address)
        self.assertEqual(self.archived(images(1, sop_class=ct), EXPT_LABEL="ct").status, 301)
        [row] = self.call("GET", "/data/projects/BRAIN/experiments?label=ct").rows
        self.assertEqual(row["xsiType"], "xnat:ctSessionData")
        mixed = {**images(1, number=2), **images(1, number=3, sop_class=other)}
        self.assertEqual(self.archived(mixed).status, 301)

    def test_equal_names_in_one_scan_match_too_and_are_replaced(self) -> None:
        self.start()
        self.archived(images(2, name="s/%d_%d"))
        other = images(1, first=3, name="s/%d_%d")
        renamed = {"s/1_1": other["s/1_3"]}
        address = self.not_archived("Session already exists with matching files.", renamed)
        self.assertEqual(self.commit(address, overwrite_files="true").status, 301)
        self.assertEqual(sorted(self.xnat.instances("007_pre")),
                         sorted(uid(uid(STUDY, 1), instance) for instance in (2, 3)))

    def test_new_files_of_a_known_scan_merge_and_so_do_equal_names_of_other_scans(self) -> None:
        self.start()
        self.archived(images(2))
        self.assertEqual(self.archived({**images(2, first=3), **images(2, number=2)}).status, 301)
        self.assertEqual(self.ids(), {"1": 4, "2": 2})

    def test_a_scan_without_a_uid_takes_in_any_series(self) -> None:
        xnat = self.start()
        xnat.make_session("BRAIN", "007_pre")
        for scan, series in ("1", ""), ("2", "1.2.3"):
            xnat.make_scan("BRAIN", "007_pre", scan, series)
        self.assertEqual(self.archived({**images(2), **images(3, number=2)}).status, 301)
        self.assertEqual(self.ids(), {"1": 2, "2": 0, "2-MR1": 3})


class WhatThePrearchiveHolds(Case):
    """Section 13.2."""

    def test_its_list_tells_the_study(self) -> None:
        self.start()
        self.send(images(1))
        [row] = self.call("GET", "/data/prearchive/projects/BRAIN?format=json").rows
        self.assertEqual((row["name"], row["tag"], row["status"], row["autoarchive"]),
                         ("007_pre", STUDY, "RECEIVING", "4"))

    def scans(self, address: str) -> Dict[str, str]:
        """The UIDs of the scans, as the XML tells them."""
        reply = self.call("GET", address, format="xml")
        self.assertEqual((reply.status, reply.headers.get_content_type()), (200, "text/xml"))
        root = ElementTree.fromstring(reply.text)
        self.assertEqual((root.tag, root.get("UID"), root.get("label")),
                         ("{http://nrg.wustl.edu/xnat}MRSession", STUDY, "007_pre"))
        found = root.findall("x:scans/x:scan", {"x": "http://nrg.wustl.edu/xnat"})
        return {scan.get("ID", ""): scan.get("UID", "") for scan in found}

    def test_after_a_build_there_are_the_uids_and_counts_of_that_build(self) -> None:
        self.start()
        address = self.send(images(2, description="<T1 & \u00e4>")).lines[0]
        self.refused(self.call("GET", address, format="xml"), 404, "prearc resource")
        built = self.call("POST", address + "?action=build")
        self.assertEqual((built.status, built.text), (200, address))
        self.assertEqual(self.xnat.prearchive[0].status, "READY")
        self.assertEqual(self.scans(address), {"1": uid(STUDY, 1)})
        self.assertEqual(self.send(images(1, number=2)).lines, [address])
        for now in ["1"], ["1", "2"]:  # stale while it is RECEIVING again
            self.assertEqual(sorted(self.scans(address)), now)
            rows = self.call("GET", address + "/resources?format=json").rows
            self.assertEqual([row["cat_id"] for row in rows], now)
            rows = self.call("GET", address + "/scans?format=json&columns=ID,UID").rows
            self.assertEqual(([row["ID"] for row in rows], "UID" in rows[0]), (now, False))
            self.call("POST", address + "?action=build")

    def test_a_locked_row_is_not_built(self) -> None:
        xnat = self.start()
        address = self.send(images(1)).lines[0]
        xnat.prearchive[0].status = "_ARCHIVING"
        self.refused(self.call("POST", address + "?action=build"), 409, "session document locked")


class ACommitThatWaits(Case):
    """Section 13.4."""

    def statuses(self) -> List[str]:
        """The status of each row, as the list tells it."""
        rows = self.call("GET", "/data/prearchive/projects/BRAIN?format=json").rows
        return [row["status"] for row in rows]

    def test_a_row_in_the_queue_is_ready_and_a_second_commit_is_423(self) -> None:
        xnat = self.start(queue_seconds=30)
        address = self.send(images(2)).lines[0]
        replies: List[Reply] = []
        first = threading.Thread(target=lambda: replies.append(self.commit(address)))
        first.start()
        self.assertTrue(xnat.wait_for(lambda: xnat.prearchive[0].queued))
        self.assertEqual((self.statuses(), xnat.archive), (["READY"], {}))
        self.refused(self.commit(address), 423, "Duplicate archive attempt")
        xnat._stopping.set()  # ends the delay
        first.join(10)
        self.assertEqual(([reply.status for reply in replies], self.statuses()), ([301], []))

    def test_the_answer_may_be_lost_while_the_row_is_in_the_queue(self) -> None:
        xnat = self.start(faults=[Fault("queued", "action=commit", seconds=60)])
        with self.assertRaises(http.client.RemoteDisconnected):
            self.archived(images(2))
        self.assertEqual((self.statuses(), xnat.archive), (["READY"], {}))
        xnat._stopping.set()  # ends the delay
        self.assertTrue(xnat.wait_for(lambda: xnat.archive))
        self.assertEqual((self.statuses(), self.count(), xnat.abuses), ([], 2, []))

    def test_a_lost_answer_of_a_commit_that_is_not_queued_comes_to_an_end_too(self) -> None:
        self.start(faults=[Fault("queued", "action=commit", seconds=30)])
        began = time.monotonic()
        with self.assertRaises(http.client.RemoteDisconnected):
            self.archived(images(2), PROJECT_ID="MANUAL")
        self.assertEqual(self.xnat.prearchive[0].status, "READY")
        self.assertLess(time.monotonic() - began, 8)

    def test_it_gives_up_when_queue_and_archiving_take_too_long_together(self) -> None:
        xnat = self.start(queue_seconds=0.1, archive_seconds=0.1, archive_timeout=0.15)
        self.refused(self.archived(images(2)), 500, "did not return a valid data URI within")
        self.assertTrue(xnat.wait_for(lambda: xnat.archive))

    def test_the_texts_of_a_busy_server_come_with_any_status_and_nothing_is_done(self) -> None:
        xnat = self.start()
        address = self.send(images(1)).lines[0]
        for text in xnat_standin.BUSY:
            for status in 409, 423, 500:
                xnat.fail("error page", "action=commit", status=status, text=text)
                self.refused(self.commit(address), status, text)
        self.assertEqual(xnat.prearchive[0].status, "RECEIVING")
        self.assertEqual(self.commit(address).status, 301)


class Scripts(Case):
    """Sections 13.3 and 13.5."""

    def test_a_site_s_script_may_change_sizes(self) -> None:
        for knob in "site_script", "project_script":
            with self.subTest(knob):
                xnat = self.start(**{knob: ["sizes"]})
                files = images(2)
                self.send(files)
                self.archived(files)
                sizes = {file.size for file in xnat.files("007_pre")}
                self.assertFalse(sizes & set(map(len, files.values())))
                self.assertFalse(set(xnat.stored("007_pre")) & set(map(sha256, files.values())))
                self.assertEqual(set(xnat.instances("007_pre")),
                                 {uid(uid(STUDY, 1), 1), uid(uid(STUDY, 1), 2)})

    def seen(self) -> Tuple[str, List[str]]:
        """The Study UID and the scans' UIDs in the archive."""
        [session] = self.call("GET", "/data/experiments?project=BRAIN&columns=UID").rows
        scans = self.call("GET", SESSION + "/scans?columns=ID,UID").rows
        return session["uid"], [scan["UID"] for scan in scans]

    def test_a_site_s_script_may_change_uids_in_what_is_stored(self) -> None:
        xnat = self.start(site_script={"uids"})
        first = self.send(images(2)).lines
        self.assertEqual(self.send(images(1, number=2)).lines, first)
        self.assertFalse(set(xnat.instances("007_pre")) & {uid(uid(STUDY, 1), 1)})
        self.call("POST", first[0] + "?action=build")
        [row] = self.call("GET", "/data/prearchive/projects/BRAIN?format=json").rows
        self.assertEqual(row["tag"], xnat_standin.other_uid(STUDY))
        second = self.send(images(1, first=3)).lines  # no row has this study any longer
        self.assertNotEqual(first, second)
        self.assertEqual([self.commit(line).status for line in first + second], [301, 301])
        other = xnat_standin.other_uid
        self.assertEqual(self.seen(), (other(STUDY), [other(uid(STUDY, 1)), other(uid(STUDY, 2))]))
        self.assertEqual(self.count(), 4)

    def test_a_file_whose_uid_was_changed_is_kept_twice_when_it_comes_again(self) -> None:
        for rename, status in ("", 500), ("true", 301):
            self.start(site_script={"uids"})
            self.send(images(2), rename=rename)
            self.assertEqual(self.archived(images(2), rename=rename).status, status)

    def test_a_project_s_script_changes_uids_only_in_the_archive(self) -> None:
        xnat = self.start(project_script={"uids"})
        self.send(images(2))
        self.send(images(2))
        self.assertEqual(xnat.prearchive[0].tag, STUDY)
        self.assertIn(uid(uid(STUDY, 1), 1), xnat.instances("007_pre"))
        self.commit("/data" + xnat.prearchive[0].uri)
        other = xnat_standin.other_uid
        self.assertEqual(self.seen(), (other(STUDY), [other(uid(STUDY, 1))]))
        self.assertNotIn(uid(uid(STUDY, 1), 1), xnat.instances("007_pre"))
        self.refused(self.archived(images(1, number=2)), 500, "modification of session UID")


class Races(Case):
    """Section 5: parallel POSTs into one session."""

    def race(self, version: str, first: Mapping[str, bytes], second: Mapping[str, bytes]) -> Reply:
        """The answer to a second POST while a first one writes its first file."""
        xnat = self.start(version=version, write_delay=0.3)
        thread = threading.Thread(target=self.send, args=(first,))
        thread.start()
        self.assertTrue(xnat.wait_for(lambda: xnat.store.file_locks))
        try:
            return self.send(second)
        finally:
            thread.join()

    def test_equal_names_of_two_series_collide_before_1_8_8(self) -> None:
        for version, status in ("1.8.7", 400), ("1.8.8", 200):
            with self.subTest(version):
                reply = self.race(version, images(1), images(1, number=2))
                self.assertEqual(reply.status, status)
                self.assertEqual(len(self.xnat.abuses), 1 if status == 400 else 0)

    def test_the_same_file_at_once_collides_always(self) -> None:
        reply = self.race("1.8.11", images(1), images(1))
        self.refused(reply, 400, "Concurrent file sends of the same data is not supported.")
        self.assertIn("as request 1 did at the same time", self.xnat.abuses[0])

    def test_sessions_are_independent(self) -> None:
        all_in = threading.Barrier(4)  # each goes on only once four are being imported
        xnat = self.start(reject=lambda _: all_in.wait(20) < 0)
        threads = [threading.Thread(target=self.send, args=(images(1),),
                                    kwargs={"EXPT_LABEL": str(number)}) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertFalse(all_in.broken)
        self.assertEqual((len(xnat.prearchive), xnat.abuses), (4, []))


class FaultsToInject(Case):

    def inject(self, kind: str, where: str = "POST .*import", **more: Any) -> Standin:
        """A stand-in with a fault."""
        return self.start(faults=[Fault(kind, where, **more)])

    def test_a_status_instead_of_the_work(self) -> None:
        for kind in "status", "early status":
            xnat = self.inject(kind, status=503, retry_after="7")
            reply = self.send(images(2))
            self.assertEqual((reply.status, reply.headers["Retry-After"]), (503, "7"))
            self.assertIn("<center>nginx</center>", reply.text)
            self.assertEqual((xnat.prearchive, xnat.requests[0].fault), ([], kind))
            self.assertEqual(xnat.requests[0].body_bytes == 0, kind == "early status")
            self.assertEqual(self.send(images(2)).status, 200)

    def test_an_early_413_reaches_a_client_that_still_sends(self) -> None:
        xnat = self.inject("early status", status=413, times=None)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "x.zip").write_bytes(os.urandom(8 << 20))
            for extra in [], ["-H", "Expect:"]:
                done = curl("-u", "alice:s3cret", "-F", "file=@x.zip", "-w", "%{http_code}",
                            *extra, xnat.url + IMPORT, folder=folder)
                self.assertTrue(done.stdout.endswith("413"), done.stderr)

    def test_an_xnat_error_page(self) -> None:
        self.inject("error page", status=400, text="session processing in progress")
        self.refused(self.send(images(1)), 400, "session processing in progress")

    def test_a_status_after_the_work(self) -> None:
        self.inject("late status", status=504)
        self.assertEqual((self.send(images(2)).status, self.count()), (504, 2))

    def test_a_504_while_the_work_goes_on(self) -> None:
        xnat = self.inject("background")
        xnat.knobs.seconds_per_file = 0.3
        self.assertEqual((self.send(images(4)).status, self.count()), (504, 0))
        self.assertTrue(xnat.wait_for(lambda: xnat.imports()[0].address))
        self.assertEqual((self.count(), len(xnat.imports()[0].entries)), (4, 4))

    def test_a_commit_goes_on_behind_a_504_too(self) -> None:
        xnat = self.inject("background", "action=commit")
        self.assertEqual(self.archived(images(2)).status, 504)
        self.assertTrue(xnat.wait_for(lambda: xnat.archive))

    def hang_up_in(self, body: bytes, kind: str, sent: int) -> None:
        """Send so much of an import, then go."""
        head = ("POST %s?import-handler=DICOM-zip&PROJECT_ID=BRAIN&EXPT_LABEL=007_pre HTTP/1.1\r\n"
                "Host: x\r\nAuthorization: Basic %s\r\nContent-Type: %s\r\n"
                "Content-Length: %d\r\n\r\n" % (
                    IMPORT, base64.b64encode(b"alice:s3cret").decode(), kind, len(body)))
        with socket.create_connection(("127.0.0.1", self.xnat.port)) as line:
            line.sendall(head.encode() + body[:sent])

    def read(self, entries: int) -> bool:
        """Whether the first import has read so many entries."""
        return len(self.xnat.imports()[0].entries) >= entries

    def test_an_import_lands_late_after_its_client_has_gone(self) -> None:
        data = zipped(images(3), zipfile.ZIP_STORED)
        whole = form([("file", "x.zip", data)])
        form_type = "multipart/form-data; boundary=" + BOUNDARY
        for body, kind, sent, landed in (
                (data, "application/zip", data.rindex(b"PK\3\4"), 2),
                (data, "application/zip", len(data), 3),
                (whole, form_type, len(whole) - 2000, 0), (whole, form_type, len(whole), 3)):
            with self.subTest(kind=kind, sent=sent):
                xnat = self.inject("late landing", seconds=60)
                self.hang_up_in(body, kind, sent)
                self.assertTrue(xnat.wait_for(partial(getattr, xnat, "requests")))
                address = self.send(images(1, number=2)).lines[0]
                self.assertEqual(self.count(), 1)
                xnat._stopping.set()  # ends the delay
                self.assertTrue(xnat.wait_for(partial(self.read, landed)))
                self.assertEqual((self.count(), xnat.abuses), (1 + landed, []))
                self.assertEqual(["/data" + row.uri for row in xnat.prearchive], [address])

    def test_an_import_lands_late_after_a_reset_or_before_its_answer(self) -> None:
        data = zipped(images(3), zipfile.ZIP_STORED)
        xnat = self.inject("late landing", seconds=60, after_bytes=data.rindex(b"PK\3\4"))
        with self.assertRaises(ConnectionError):
            self.send(data, in_body="application/zip")
        self.assertEqual(self.count(), 0)
        xnat._stopping.set()  # ends the delay
        self.assertTrue(xnat.wait_for(lambda: self.count() == 2))
        self.inject("late landing", seconds=0.2)
        began = time.monotonic()
        self.assertEqual((self.send(data).status, self.count()), (200, 3))
        self.assertGreaterEqual(time.monotonic() - began, 0.2)

    def test_error_pages_have_no_heading_from_1_11_on(self) -> None:
        for version, heading in ("1.10.2", True), ("1.11.0", False):
            self.start(version=version, faults=[Fault("error page", "auth", status=423, text="b<")])
            for reply in (self.send({"notes.txt": b"x"}), self.call("GET", "/data/projects/NONE"),
                          self.call("GET", "/data/auth")):
                self.assertEqual("<h3>" in reply.text, heading)
                self.assertIn("<title>Status page</title>", reply.text)
            self.assertEqual("<p>b&lt;</p>" in reply.text, not heading)
            self.assertEqual(">Locked</p>" in reply.text, not heading)

    def test_resets(self) -> None:
        for kind, stored in ("reset before", 0), ("reset during", 0), ("reset after", 2):
            with self.subTest(kind):
                xnat = self.inject(kind, after_bytes=1000)
                with self.assertRaises(ConnectionResetError):
                    self.send(images(2))
                self.assertEqual((self.count(), xnat.requests[0].status), (stored, None))

    def test_an_end_without_an_answer(self) -> None:
        for kind, stored in ("close", 0), ("close after", 2):
            with self.subTest(kind):
                self.inject(kind)
                with self.assertRaises(http.client.RemoteDisconnected):
                    self.send(images(2))
                self.assertEqual(self.count(), stored)

    def test_stalls(self) -> None:
        for kind, stored in ("stall before", 0), ("stall", 2):
            with self.subTest(kind):
                self.inject(kind, seconds=60)
                with self.assertRaises(socket.timeout):
                    self.send(images(2), timeout=0.3)
                self.assertEqual(self.count(), stored)
                began = time.monotonic()
                self.xnat.__exit__(None, None, None)
                self.assertLess(time.monotonic() - began, 10)

    def test_a_truncated_answer(self) -> None:
        self.inject("truncate")
        with self.assertRaises(http.client.IncompleteRead):
            self.send(images(2))

    def test_answers_that_are_200_and_wrong(self) -> None:
        self.inject("login page")
        self.assertIn("Login.vm", self.send(images(1)).text)
        self.inject("empty")
        self.assertEqual((self.send(images(1)).text, self.count()), ("", 0))
        self.inject("other project", text="ELSE")
        self.assertIn("/prearchive/projects/ELSE/", self.send(images(1)).text)
        self.inject("extra line")
        self.assertEqual(len(self.send(images(1)).lines), 2)

    def test_lost_sessions(self) -> None:
        self.inject("drop sessions", "GET /data/auth")
        cookie = {"Cookie": "JSESSIONID=" + self.call("POST", "/data/JSESSION").text}
        self.assertEqual(self.call("GET", "/data/auth", headers=cookie, login=None).status, 401)

    def test_an_account_that_gets_disabled(self) -> None:
        self.inject("disable account", skip=1)
        self.assertEqual([self.send(images(1)).status for _ in range(3)], [200, 401, 401])

    def test_redirects(self) -> None:
        self.inject("redirect", status=301, location="https://elsewhere.example/")
        reply = self.send(images(1))
        self.assertEqual((reply.status, reply.headers["Location"]),
                         (301, "https://elsewhere.example/"))

    def test_what_is_not_http(self) -> None:
        self.inject("garbage")
        with self.assertRaises(http.client.BadStatusLine):
            self.send(images(1))

    def test_any_answer_at_all(self) -> None:
        self.inject("answer", status=418, headers=(("X-Tea", "yes"), ("Content-Type", "tea/pot")),
                    body=b"short")
        reply = self.send(images(1))
        self.assertEqual((reply.status, reply.text, reply.headers["X-Tea"],
                          reply.headers["Content-Type"]), (418, "short", "yes", "tea/pot"))

    def test_a_full_disk_is_400(self) -> None:
        self.inject("disk full", entry=2)
        self.refused(self.send(images(3)), 400, "unable to read DICOM object IM0002.dcm")
        self.assertEqual(self.count(), 1)

    def test_faults_meet_other_requests_too(self) -> None:
        self.start(faults=[Fault("status", "GET /data/projects/BRAIN"),
                           Fault("reset after", "action=commit")])
        self.assertEqual(self.call("GET", "/data/projects/BRAIN").status, 503)
        with self.assertRaises(ConnectionResetError):
            self.archived(images(1))
        self.assertEqual(len(self.xnat.archive), 1)

    def test_times_and_skip(self) -> None:
        xnat = self.start()
        xnat.fail("status", "auth", times=2, skip=1)
        xnat.fail("status", "projects", times=None, status=502)
        statuses = [self.call("GET", "/data/auth").status for _ in range(4)]
        self.assertEqual(statuses, [200, 503, 503, 200])
        self.assertEqual({self.call("GET", "/data/projects").status for _ in range(3)}, {502})
        xnat.faults.clear()
        self.assertEqual(self.call("GET", "/data/projects").status, 200)

    def test_a_kind_that_does_not_exist_is_an_error(self) -> None:
        with self.assertRaisesRegex(ValueError, "there are: "):
            Fault("explode")


class Abuse(Case):
    """What the stand-in holds against a client."""

    def assert_abuse(self, text: str) -> None:
        """One abuse, of this kind."""
        self.assertEqual(len(self.xnat.abuses), 1, self.xnat.abuses)
        self.assertIn(text, self.xnat.abuses[0])

    def test_a_good_client_is_held_nothing_against(self) -> None:
        xnat = self.start()
        self.call("GET", "/data/auth", login=("alice", "wrong"))
        self.archived(images(2), prevent_auto_commit="true", overwrite="append")
        self.archived(images(2, number=2))
        self.assertEqual(xnat.abuses, [])

    def test_wrong_logins_again_and_again(self) -> None:
        self.start()
        for _ in range(2):
            self.call("GET", "/data/auth", login=("alice", "wrong"))
        self.assert_abuse("wrong login number 2")

    def test_parameters_that_should_not_be_sent(self) -> None:
        self.start()
        self.send(images(1), prevent_anon="true")
        self.assert_abuse("prevent_anon")
        self.start()
        self.send(images(1), PROJECT_ID="", project="BRAIN")
        self.assert_abuse("project was sent without PROJECT_ID")
        self.start()
        self.assertEqual(self.send(images(1), inbody="true").status, 500)
        self.assert_abuse("inbody=true together with a form")

    def test_secrets_in_the_address(self) -> None:
        self.start()
        self.call("GET", "/data/auth?password=s3cret")
        self.assert_abuse("a password or a session id in the URL")
        self.start()
        session = self.call("POST", "/data/JSESSION").text
        self.call("GET", "/data/auth/%s" % session)
        self.assert_abuse("a password or a session id in the URL")

    def test_an_agent_like_a_browser(self) -> None:
        self.start()
        self.call("GET", "/data/auth", headers={"User-Agent": "Mozilla/5.0"})
        self.assert_abuse("browser")

    def test_a_commit_while_another_runs_or_an_import_does(self) -> None:
        xnat = self.start(archive_seconds=0.3)
        address = self.send(images(1)).lines[0]
        thread = threading.Thread(target=self.commit, args=(address,))
        thread.start()
        self.assertTrue(xnat.wait_for(lambda: xnat.prearchive[0].status == "_ARCHIVING"))
        self.commit(address)
        thread.join()
        self.assert_abuse("a second commit while request")
        xnat = self.start(write_delay=0.3)
        thread = threading.Thread(target=self.send, args=(images(1),))
        thread.start()
        self.assertTrue(xnat.wait_for(lambda: xnat.prearchive))
        self.commit("/data" + xnat.prearchive[0].uri)
        thread.join()
        self.assert_abuse("a commit while request 1 imports")


class TheLogAndTheTruth(Case):

    def test_the_log_tells_everything_but_secrets(self) -> None:
        xnat = self.start()
        address = self.archived(images(2), EXPT_LABEL="a+b", SUBJECT_ID="s").text
        sent, committed = xnat.imports()[0], xnat.commits()[0]
        self.assertEqual((sent.user, sent.auth, sent.status, sent.file_name),
                         ("alice", "basic", 200, "x.zip"))
        self.assertEqual(sent.params["EXPT_LABEL"], "a+b")
        self.assertEqual(sent.entries, ("s1/IM0001.dcm", "s1/IM0002.dcm"))
        self.assertNotIn("authorization", sent.headers)
        self.assertEqual(int(sent.headers["content-length"]), sent.body_bytes)
        self.assertIn("/prearchive/projects/BRAIN/", sent.address)
        self.assertEqual(committed.address, address)
        self.assertLessEqual(sent.started, sent.answered or 0)

    def test_one_can_wait_for_the_beginning_and_the_end_of_a_request(self) -> None:
        xnat = self.start(seconds_per_file=0.2)
        thread = threading.Thread(target=self.send, args=(images(1),))
        thread.start()
        self.assertTrue(xnat.wait_for(lambda: xnat.imports()))
        self.assertIsNone(xnat.imports()[0].answered)
        self.assertTrue(xnat.wait_for(lambda: xnat.imports()[0].answered))
        thread.join()
        self.assertFalse(xnat.wait_for(lambda: False, timeout=0.01))

    def test_what_is_stored_is_told_by_digest_instance_and_tree(self) -> None:
        xnat = self.start()
        files = images(2, description="T1")
        self.archived(files)
        self.send(images(1), EXPT_LABEL="new")
        self.assertEqual(xnat.stored("007_pre"), sorted(map(sha256, files.values())))
        self.assertEqual(xnat.instances("007_pre"),
                         {uid(uid(STUDY, 1), 1): 1, uid(uid(STUDY, 1), 2): 1})
        tree = "\n".join(xnat.tree())
        self.assertRegex(tree, "archive\n  BRAIN\n    007\n      007_pre  2 files\n"
                               "        1 T1  2 files\nprearchive\n  BRAIN .* new  RECEIVING  1 f")
        xnat.forget()
        self.assertEqual((xnat.labels(), xnat.requests), ([], []))

    def test_the_tests_own_tree_is_the_readme_s(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            readme_tree(Path(folder), files=2)
            made = digests(Path(folder))
        self.assertEqual(len(made), 2 * len(README_TREE))
        self.assertEqual(len(set(made.values())), len(made))
        self.assertIn("007/post/T1-MPRAGE_0011/IM0002.dcm", made)


class AnotherProcess(unittest.TestCase):
    """python3 -m tests.xnat_standin"""

    def start(self, *options: str) -> str:
        """Its address."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.xnat_standin", *options], cwd=str(TOP), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(self.stop)
        assert self.process.stdout
        self.told = [self.process.stdout.readline() for _ in range(3)]
        return self.told[0].split()[-1]

    def stop(self, number: int = signal.SIGTERM) -> Tuple[int, str]:
        """Its status and what it said at the end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        said = "".join(self.process.communicate(timeout=10)) if self.process.stdout and \
            not self.process.stdout.closed else ""
        return self.process.returncode, said

    def test_it_says_where_it_is_and_ends_quietly(self) -> None:
        for number in signal.SIGTERM, signal.SIGINT:
            url = self.start("--version", "1.7.5", "--code", "0", "--context-path", "/xnat")
            self.assertRegex(self.told[0], r"^XNAT stand-in 1.7.5 at http://127.0.0.1:\d+/xnat\n$")
            self.assertIn("alice s3cret", self.told[1])
            self.assertIn("dicomUpload.py %s alice s3cret BRAIN" % url, self.told[2])
            self.assertEqual(self.stop(number), (0, ""))

    def test_a_port_that_is_taken_is_told_in_one_line(self) -> None:
        port = self.start().rpartition(":")[2]
        done = subprocess.run([sys.executable, "-m", "tests.xnat_standin", "--port", port],
                              cwd=str(TOP), text=True, stderr=subprocess.PIPE, check=False)
        self.assertEqual(done.returncode, 3)
        self.assertRegex(done.stderr, rf"\Aport {port}: .*in use.*--port\n\Z")

    def test_it_can_be_asked_and_told_from_outside(self) -> None:
        url = self.start()
        admin = url + "/_standin/"
        curl("-d", json.dumps({"kind": "answer", "where": "auth", "status": 299, "body": "tea"}),
             admin + "faults")
        self.assertEqual(curl("-u", "alice:s3cret", url + "/data/auth").stdout, "tea")
        [request] = json.loads(curl(admin + "requests").stdout)
        self.assertEqual((request["path"], request["status"], request["user"]),
                         ("/data/auth", 299, "alice"))
        self.assertEqual(json.loads(curl(admin + "abuses").stdout), [])
        self.assertEqual(json.loads(curl(admin + "tree").stdout), ["archive", "prearchive"])
        self.assertEqual(json.loads(curl(admin + "instances").stdout), {})
        curl("-X", "POST", admin + "forget")
        self.assertEqual(json.loads(curl(admin + "requests").stdout), [])

    @variation
    @unittest.skipUnless(os.path.exists("/proc/self/status"), "needs /proc")
    def test_memory_stays_flat_whatever_is_sent(self) -> None:
        url = self.start() + IMPORT + "?import-handler=DICOM-zip&PROJECT_ID=BRAIN&EXPT_LABEL=big"
        with tempfile.TemporaryDirectory() as folder:
            pixels = os.urandom(30 << 20)
            with zipfile.ZipFile(os.path.join(folder, "x.zip"), "w", zipfile.ZIP_DEFLATED,
                                 compresslevel=0) as archive:
                for number in range(1, 6):
                    archive.writestr(str(number), dicom_file(
                        study=STUDY, series=uid("big"), instance=number, pixels=pixels))
            for options in (["-F", "file=@x.zip"],
                            ["-T", "x.zip", "-X", "POST", "-H", "Content-Type: application/zip"]):
                done = curl("-u", "alice:s3cret", *options, url, folder=folder)
                self.assertIn("/data/prearchive/projects/BRAIN/", done.stdout)
        status = Path("/proc/%d/status" % self.process.pid).read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
        self.assertLess(peak, 100, "MiB at the peak")
        told = json.loads(curl(self.told[0].split()[-1] + "/_standin/instances").stdout)
        self.assertEqual(list(told["big"].values()), [1] * 5)


class ForBenchmarks(Case):

    def test_the_line_is_shared_by_all(self) -> None:
        self.start(rate=1e6)
        data = os.urandom(200000)
        began = time.monotonic()
        threads = [threading.Thread(target=self.send, args=(data,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertGreater(time.monotonic() - began, 0.35)
        self.assertLess(time.monotonic() - began, 10)

    def test_drained_uploads_are_counted_by_their_names(self) -> None:
        xnat = self.start(drain=True)
        for in_body in "", "application/zip":
            files = {**images(1), "s1/2": b"never looked at", "s1/3": b"nor this"}
            reply = self.send(zipped(files), in_body=in_body)
            self.assertIn("/projects/BRAIN/", reply.text)
            self.assertEqual(self.count(), 3)
        self.assertEqual(self.send(b"no zip").text, "")
        self.assertEqual(self.commit(reply.lines[0]).status, 301)
        self.assertEqual(len(xnat.archive["BRAIN", "007_pre"].files), 3)

    def test_the_import_takes_its_time_for_every_file(self) -> None:
        for drain in False, True:
            self.start(seconds_per_file=0.05, drain=drain)
            began = time.monotonic()
            self.send(images(4))
            self.assertGreater(time.monotonic() - began, 0.2)


@unittest.skipUnless(shutil.which("openssl"), "needs openssl")
class OverTls(Case):

    def test_it_speaks_tls_and_a_plain_client_does_not_disturb_it(self) -> None:
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        cert, key = os.path.join(folder, "cert"), os.path.join(folder, "key")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
                        "-keyout", key, "-out", cert], check=True, stderr=subprocess.DEVNULL)
        xnat = self.start(tls=(cert, key), faults=[Fault("reset before", "projects")])
        with socket.create_connection(("127.0.0.1", xnat.port)) as line:
            line.sendall(b"GET / HTTP/1.0\r\n\r\n")
            line.settimeout(5)
            try:
                self.assertNotIn(b"HTTP/", line.recv(100))
            except ConnectionError:
                pass
        done = curl("--cacert", cert, "-u", "alice:s3cret", xnat.url + "/data/auth")
        self.assertEqual(done.stdout, "User 'alice' is logged in")
        done = curl("--cacert", cert, "-u", "alice:s3cret", xnat.url + "/data/projects")
        self.assertNotEqual(done.returncode, 0)
        context = ssl.create_default_context(cafile=cert)
        connection = http.client.HTTPSConnection("127.0.0.1", xnat.port, context=context,
                                                 timeout=10)
        connection.request("GET", "/data/auth")
        self.assertEqual(connection.getresponse().status, 401)
        connection.close()


def sha256(data: bytes) -> str:
    """A digest in hexadecimal."""
    return xnat_standin.hashlib.sha256(data).hexdigest()


def curl(*options: str, folder: Optional[str] = None) -> "subprocess.CompletedProcess[str]":
    """The real curl, without the user's settings and proxies."""
    env = {name: value for name, value in os.environ.items()
           if "proxy" not in name.lower() and "CURL" not in name and "SSL_CERT" not in name}
    return subprocess.run(["curl", "--disable", "-sS", "--max-time", "60", *options], cwd=folder,
                          env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


if __name__ == "__main__":
    unittest.main()
