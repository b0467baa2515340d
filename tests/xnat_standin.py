"""A stand-in for XNAT's import service, for tests, demos and benchmarks.

It behaves as /data/services/import, the prearchive and the archive of a real XNAT do, as far as an
uploader can see and odd behaviour included, and it can be told to fail in all the known ways.
"Section N" below names the section of the notes on XNAT's source that a piece follows; the facts
carry over, none of XNAT's code does. It listens on loopback only, keeps digests and never images.

    with Standin(version="1.8.11", projects=...) as xnat:
        run("dicomUpload.py", xnat.url, "alice", "s3cret", "BRAIN", ...)
        xnat.stored("007_post"), xnat.imports(), xnat.abuses

or, as a process of its own: python3 -m tests.xnat_standin --port 8080

In this order: the words, bodies, zips, DICOM, accounts, the store, one import, the routes, the
faults, HTTP, the stand-in itself, the command line.
"""
import argparse
import contextlib
import csv
import hashlib
import hmac
import html
import io
import json
import re
import secrets
import shutil
import signal
import socket
import ssl
import struct
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from base64 import b64decode
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import (IO, Any, Callable, Collection, Dict, Iterable, Iterator, List, Mapping,
                    NamedTuple, Optional, Set, Tuple, Type, Union)
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import quoteattr

PIECE = 128 * 1024          # bytes per read
HEAD = 256 * 1024           # bytes of a file in which its DICOM header must lie
SWALLOW = 2 * 1024 * 1024   # unread body that Tomcat takes in before it closes (section 2)
ACCEPTED_NAME = re.compile(r"\.(zip|zar|tar|xar|tgz|tar\.gz)$")
TAR_NAME = re.compile(r"\.(tar|tgz|tar\.gz)$")
NESTED_NAME = re.compile(r"\.(zip|tar|tgz|tar\.gz)$")
BROWSER = re.compile(r"MSIE|Mozilla|AppleWebKit|Opera")
VALID_ID = re.compile(r"[A-Za-z0-9_-]+")
UNASSIGNED = "Unassigned"
IN_BODY_NAMES = {  # content types that XNAT takes as "the body is the file" (section 2)
    "application/zip": "upload.zip", "application/x-zip-compressed": "upload.zip",
    "application/x-tar": "upload.tar", "application/x-gtar": "upload.tar",
    "application/octet-stream": "upload", "application/dicom": "upload.dcm",
}
CONCURRENT = "Concurrent file sends of the same data is not supported."
BUSY = ("Session processing in progress", "Duplicate archive attempt",
        "Destination session in use")  # with 409, 423 or 500; waiting heals them (section 13.4)
NOT_FOUND = "Unable to find the specified experiment."  # for projects too (section 7)
LOGIN_FAILED = (
    "Your login attempt failed because the username and password combination you provided was "
    "invalid or your user already has the maximum number of user sessions open. After 20 failed "
    "login attempts, your user account will be locked.")
LOGIN_PAGE = ("<!DOCTYPE html>\n<html><head><title>XNAT</title></head><body>\n"
              "<!-- BEGIN xnat-templates/screens/Login.vm -->\n"
              "<form method='post'><input name='username'></form>\n</body></html>\n")


# ---- The words -------------------------------------------------------------------------------

@dataclass
class Knobs:
    """How this XNAT behaves; all may be changed while it runs."""
    version: str = "1.8.11"
    require_login: bool = True
    session_timeout: float = 900      # seconds an unused HTTP session lives
    max_sessions: int = 1000
    max_failed_logins: int = 20
    idle_seconds: float = 300         # a session idle for so long is built and archived...
    tick_seconds: float = 60          # ...by a thread that looks so often (section 6.1)
    archive_timeout: float = 600      # a commit gives up waiting after so long
    build_delay: float = 0            # seconds a build takes
    queue_seconds: float = 0          # seconds a row waits, READY, before that (section 13.4)
    archive_seconds: float = 0        # seconds the move into the archive takes
    write_delay: float = 0            # seconds each file's lock is held
    seconds_per_file: float = 0       # import time per file, inside the POST
    rate: float = 0                   # bytes a second that the line into the server carries
    drain: bool = False               # take the bytes, read only the first file: for benchmarks
    route_by_header: bool = False     # an unknown project: StudyDescription may name one
    snapshots: bool = False           # archived scans have a SNAPSHOTS resource too
    all_scans: bool = True            # scans/ALL, and *, stand for all of them, in the archive
    stored_count: int = 0             # of a resource's files, by what was stored earlier
    statistics: str = "stored"        # of resources; "on request" and "never": blank (13.1)
    file_names: bool = True           # False: scans/N/resources/DICOM/files is an empty list
    refuse_lists: Collection[str] = ()  # "archive", "prearchive": a project's list is a 403
    keep: str = ""                    # a folder that gets each file of a form, for other judges
    label_rule: str = ""              # a label for what is archived, unless its commit has one
    reject: Union[Collection[str], Callable[[str], bool]] = ()  # series XNAT's filter throws away
    unique_sop_uids: bool = True      # from 1.8.7: one SOP instance twice in a scan is refused
    strict_parser: bool = False       # a file that is cut in its pixels is non-parsable too
    number_all_twins: bool = False    # series of one number: n-MR1, n-MR2; not n, n-MR1
    site_script: Collection[str] = ()     # "sizes", "uids": changed in each file that is stored...
    project_script: Collection[str] = ()  # ...or when it is archived

    def since(self, *version: int) -> bool:
        """Whether this XNAT is that version or newer."""
        return tuple(map(int, re.findall(r"\d+", self.version)[:3])) >= version


@dataclass
class User:
    """One account; `expired` is its password."""
    name: str
    password: str
    admin: bool = False
    disabled: bool = False
    expired: bool = False
    failures: int = 0


@dataclass
class Project:
    """One project; members maps a user's name to owner, member or collaborator."""
    id: str
    aliases: Tuple[str, ...] = ()
    public: bool = False
    prearchive_code: int = 4          # 0 manual, 4 archive, 5 archive and overwrite
    members: Mapping[str, str] = field(default_factory=dict)


def default_users() -> List[User]:
    """The accounts of a stand-in that is not told otherwise."""
    return [User("alice", "s3cret"), User("bob", "b0b"), User("carol", "car0l"),
            User("admin", "adm1n", admin=True)]


def default_projects() -> List[Project]:
    """The projects of a stand-in that is not told otherwise."""
    return [
        Project("BRAIN", ("brainy",), members={"alice": "owner", "bob": "collaborator"}),
        Project("MANUAL", prearchive_code=0, members={"alice": "member"}),
        Project("OVER", prearchive_code=5, members={"alice": "owner"}),
        Project("SECRET", members={"carol": "owner"}),
        Project("PUBLIC", public=True),
    ]


@dataclass(frozen=True)
class Stored:
    """One file as the server keeps it: everything but its bytes."""
    scan: str
    name: str
    entry: str
    sop_class: str
    sop_instance: str
    series: str
    number: str
    description: str
    size: int
    sha256: str
    damaged: bool = False
    parsable: bool = True             # False: not even its header is whole
    study: str = ""

    def scripted(self, changes: Collection[str]) -> "Stored":
        """The file as a script leaves it that changes "sizes" or "uids"."""
        if not changes:
            return self
        file = replace(self, sha256=hashlib.sha256(self.sha256.encode()).hexdigest())
        if "sizes" in changes:
            file = replace(file, size=file.size + 130)
        if "uids" in changes:
            file = replace(file, study=other_uid(file.study), series=other_uid(file.series),
                           sop_instance=other_uid(file.sop_instance))
        return file


def other_uid(uid: str) -> str:
    """What a script makes of a UID: always the same."""
    return "2.25.%d" % int.from_bytes(hashlib.sha256(uid.encode()).digest()[:16], "big")


Scans = Dict[str, Dict[str, Stored]]  # scan id -> file name -> file


MODALITIES = {"1.2.840.10008.5.1.4.1.1." + end: modality for modality, ends in (
    ("PT", "128 128.1 130"), ("MR", "4 4.1 4.2 4.3 4.4"), ("CT", "2 2.1 2.2"))
    for end in ends.split()}
KINDS_OF_DATA = {"PT": "pet", "MR": "mr", "CT": "ct", "OT": "otherDicom"}


def modality_of(files: Iterable[Stored]) -> str:
    """The modality of a session or scan with these files, told from their SOP classes: the first
    of KINDS_OF_DATA; an MR if there are none."""
    found = {MODALITIES.get(file.sop_class, "OT") for file in files}
    return next((modality for modality in KINDS_OF_DATA if modality in found), "MR")


def data_type(modality: str, what: str) -> str:
    """The data type of a Session or a Scan of this modality."""
    return "xnat:%s%sData" % (KINDS_OF_DATA[modality], what)


def series_uid(files: Mapping[str, Stored]) -> str:
    """The Series Instance UID of a scan with these files."""
    return next((file.series for file in files.values()), "")


@dataclass
class Row:
    """One session in the prearchive (section 5)."""
    project: str
    timestamp: str
    name: str
    subject: str
    tag: str                          # the StudyInstanceUID
    prevent_auto_commit: bool = False
    prevent_anon: bool = False
    source: str = ""
    visit: str = ""
    status: str = "RECEIVING"
    log: str = ""
    lastmod: float = field(default_factory=time.monotonic)
    files: Dict[Tuple[str, str], Stored] = field(default_factory=dict)
    built: Optional[Scans] = None
    queued: bool = False              # for the archive; its status does not tell
    label: str = ""                   # as its commit says, see fixSessionLabel

    @property
    def uri(self) -> str:
        """Its address, without /data."""
        return "/prearchive/projects/%s/%s/%s" % (self.project, self.timestamp, self.name)


@dataclass
class Session:
    """One session in the archive."""
    project: str
    label: str
    subject: str
    uid: str
    number: int
    scans: Scans = field(default_factory=dict)
    by_hand: Dict[str, str] = field(default_factory=dict)  # UIDs of scans that somebody made
    counted: Set[str] = field(default_factory=set)  # scans whose statistics were asked for

    @property
    def id(self) -> str:
        """The name that XNAT gives it."""
        return "XNAT_E%05d" % self.number

    @property
    def uri(self) -> str:
        """Its address, without /data."""
        return "/archive/projects/%s/subjects/%s/experiments/%s" % (
            self.project, self.subject, self.label)

    @property
    def files(self) -> List[Stored]:
        """All its files."""
        return [file for files in self.scans.values() for file in files.values()]

    @property
    def modality(self) -> str:
        """Its modality."""
        return modality_of(self.files)

    def series(self, scan: str) -> str:
        """The Series Instance UID of a scan; one that was made by hand may have none."""
        return self.by_hand.get(scan, series_uid(self.scans[scan]))


@dataclass(frozen=True)
class Request:
    """One request as it came in; the fields after `started` are filled in when it is answered."""
    number: int
    method: str
    path: str                         # below the context path
    params: Mapping[str, str]         # query and form fields, decoded
    headers: Mapping[str, str]        # lower-case names, no secrets
    auth: str                         # "", "basic", "cookie" or "basic+cookie"
    started: float                    # monotonic seconds
    user: str = ""
    body_bytes: int = 0
    file_name: str = ""
    entries: Tuple[str, ...] = ()     # names in the zip, as far as it was read
    answered: Optional[float] = None
    status: Optional[int] = None      # None: no answer was sent
    fault: str = ""                   # the kind of fault that met it
    address: str = ""                 # the answer's first line, for imports and commits
    port: int = 0                     # the client's: one connection, one port


@dataclass(frozen=True)
class Archived:
    """What the idle thread did by itself (section 6.1)."""
    label: str
    files: int
    archived: bool                    # False: built only


@dataclass(frozen=True)
class Fault:
    """A failure to inject; KINDS lists the kinds and which arguments they heed."""
    kind: str
    where: str = ""                   # regex, searched in "METHOD /path?query" without context path
    times: Optional[int] = 1          # None: for ever
    skip: int = 0                     # so many matching requests pass first
    status: int = 503
    seconds: float = 0.0
    retry_after: str = ""
    text: str = ""
    after_bytes: int = 0
    entry: int = 1
    location: str = ""
    headers: Tuple[Tuple[str, str], ...] = ()
    body: bytes = b""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError("no such kind of fault: %s; there are: %s"
                             % (self.kind, ", ".join(KINDS)))


KINDS = {
    # before the body is read
    "early status": "nginx-like page with `status`, `retry_after`; then lingers as nginx does",
    "reset before": "RST before the body is read",
    "reset during": "RST after `after_bytes` of the body",
    "late landing": "the work begins `seconds` after the end of the body, be that because the "
                    "client has gone in the middle of it, or because of an RST after `after_bytes`",
    "stall before": "silent for `seconds` before it reads the body, then goes on as usual",
    "drop sessions": "all HTTP sessions are forgotten, then goes on as usual",
    "disable account": "the account in use is disabled: 401 from now on",
    # after the body is read, and instead of doing the work
    "status": "nginx-like page with `status`, `retry_after`",
    "error page": "XNAT's own page with `status` and `text`",
    "close": "FIN without an answer",
    "login page": "200 with the HTML of the login page",
    "empty": "200 without a body",
    "redirect": "`status` (302 unless it is 3xx) to `location`",
    "garbage": "something that is not HTTP",
    "answer": "`status`, `headers`, `body`",
    # the work is done, or goes on
    "background": "`status` (504 instead of 503) at once, while the work goes on",
    "queued": "FIN without an answer to a commit once it is queued; its row says READY for "
              "`seconds`, then it is archived",
    "late status": "the work is done, the answer is an nginx-like page with `status`",
    "reset after": "the work is done, then RST",
    "close after": "the work is done, then FIN without an answer",
    "stall": "the work is done, the answer comes `seconds` later",
    "truncate": "the answer's body is cut in half",
    "other project": "the addresses in the answer name the project `text` (OTHER)",
    "extra line": "the answer has another address line, `text`",
    "disk full": "entry number `entry` of the zip cannot be written",
}


class Answer(NamedTuple):
    """What goes back to the client."""
    status: int = 200
    body: bytes = b""
    type: str = "text/plain"
    headers: Tuple[Tuple[str, str], ...] = ()
    linger: bool = False              # as nginx: read on for a while after an early answer


class XnatError(Exception):
    """An answer that is an error page with a sentence (section 4.2)."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class NotDicom(XnatError):
    """dcm4che's DicomCodingException."""


class Refused(XnatError):
    """The archive step says no (section 6.2); 409 for conflicts."""


class ServerTrouble(XnatError):
    """A fault of the server, which XNAT hides in a 400."""


class ZipTrouble(Exception):
    """Where java.util.zip.ZipInputStream would throw."""


class ClientGone(ConnectionError):
    """The client hung up in the middle of its body."""


class Vanish(Exception):
    """End the connection without an answer."""

    def __init__(self, reset: bool, last_words: bytes = b"") -> None:
        super().__init__()
        self.reset, self.last_words = reset, last_words


def status_page(status: int, text: str, restlet: int = 1) -> Answer:
    """The error page of Restlet 1 (section 4.2) or of Restlet 2 (section 13.6)."""
    body, said = "<body>", "<h3>%s</h3>" % text
    if restlet > 1:
        body = '<body style="font-family: sans-serif;">'
        said = ('<p style="font-size: 1.2em;font-weight: bold;margin: 1em 0px;">%s</p>\n'
                "<p>%s</p>\n" % (responses.get(status, "Error"), html.escape(text)))
    page = ("<html>\n<head>\n   <title>Status page</title>\n</head>\n%s\n%s"
            "<p>You can get technical details <a href=\"http://www.w3.org/Protocols/rfc2616/"
            "rfc2616-sec10.html#sec10.4.%d\">here</a>.<br>\nPlease continue your visit at our "
            "<a href=\"/\">home page</a>.\n</p>\n</body>\n</html>\n"
            % (body, said, status % 100 + 1))
    return Answer(status, page.encode(), "text/html;charset=UTF-8")


def tomcat_page(status: int, text: str) -> Answer:
    """Tomcat's error page, for what XNAT's filters refuse."""
    page = ("<!doctype html><html lang=\"en\"><head><title>HTTP Status %d</title></head><body>"
            "<h1>HTTP Status %d</h1><p><b>Message</b> %s</p></body></html>"
            % (status, status, html.escape(text)))
    return Answer(status, page.encode(), "text/html;charset=utf-8")


def nginx_page(status: int, retry_after: str = "", linger: bool = False) -> Answer:
    """nginx's error page."""
    reason = {413: "Request Entity Too Large", 429: "Too Many Requests", 502: "Bad Gateway",
              503: "Service Temporarily Unavailable", 504: "Gateway Time-out"}
    title = "%d %s" % (status, reason.get(status, "Error"))
    page = ("<html>\r\n<head><title>%s</title></head>\r\n<body>\r\n<center><h1>%s</h1></center>"
            "\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n" % (title, title))
    headers = (("Retry-After", retry_after),) if retry_after else ()
    return Answer(status, page.encode(), "text/html", headers, linger)


def as_json(value: Any) -> Answer:
    """A JSON answer."""
    return Answer(200, json.dumps(value).encode(), "application/json;charset=UTF-8")


def table(rows: List[Dict[str, Any]], **meta: Any) -> Answer:
    """XNAT's JSON table (section 8): values are strings, the meta data come after Result."""
    texts = [{key: str(value) for key, value in row.items()} for row in rows]
    return as_json({"ResultSet": {"Result": texts, **meta}})


def as_csv(answer: Answer) -> Answer:
    """A JSON table in the form that pyxnat asks for."""
    rows = json.loads(answer.body)["ResultSet"]["Result"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["ID"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return Answer(200, text.getvalue().encode(), "text/csv")


def escaped(value: str) -> str:
    """What XNAT does to every parameter (section 1)."""
    for char, entity in ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), \
            ("'", "&apos;"):
        value = value.replace(char, entity)
    return value


def truthy(value: Optional[str]) -> bool:
    """A boolean parameter."""
    return value is not None and value.lower() not in ("", "false", "0")


# ---- Bodies ----------------------------------------------------------------------------------

class Line:
    """A line of so many bytes a second, shared by all connections."""

    def __init__(self, rate: float, pause: Callable[[float], None]) -> None:
        self.rate, self._pause = rate, pause
        self._free = 0.0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until the line has carried so many bytes more."""
        if not self.rate:
            return
        with self._lock:
            now = time.monotonic()
            if now - self._free > 0.1:  # idle; a reader that is only a little late catches up
                self._free = now
            self._free += count / self.rate
            wait = self._free - now
        self._pause(wait)


class Body:
    """A request's body, read once, by Content-Length or chunked."""

    def __init__(self, handler: "Handler", line: Line) -> None:
        headers = handler.headers
        self._handler, self._line = handler, line
        self.chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self.length = None if self.chunked else int(headers.get("Content-Length") or 0)
        self.unasked = headers.get("Expect", "").lower() == "100-continue"
        self.count = 0
        self.cut_after: Optional[int] = None  # "reset during"
        self._left = self.length or 0
        self.done = not self.chunked and not self._left
        self._piece = int(max(2048, min(PIECE, line.rate / 20))) if line.rate else PIECE

    def some(self) -> bytes:
        """The next bytes, as they come; none at the end."""
        if self.done:
            return b""
        if self.unasked:
            self.unasked = False
            self._handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.cut_after is not None and self.count >= self.cut_after:
            raise Vanish(reset=True)
        if not self._left and not self._next_chunk():
            return b""
        wanted = min(self._left, self._piece)
        if self.cut_after is not None:
            wanted = min(wanted, self.cut_after - self.count)
        data = self._handler.rfile.read1(wanted)  # type: ignore[attr-defined]
        if not data:
            raise ClientGone("%d bytes missing" % self._left)
        self.count += len(data)
        self._left -= len(data)
        if not self._left:
            self._end_of_piece()
        self._line.take(len(data))
        return bytes(data)

    def _next_chunk(self) -> bool:
        """Read a chunk's size; the chunk of size 0 is the end."""
        size = self._handler.rfile.readline(1024).split(b";")[0].strip()
        if not re.fullmatch(b"[0-9A-Fa-f]+", size):
            raise ClientGone("no chunk")
        self._left = int(size, 16)
        if not self._left:
            while self._handler.rfile.readline(1024).strip():
                pass  # trailers
            self.done = True
        return not self.done

    def _end_of_piece(self) -> None:
        """After a chunk comes an empty line; after a Content-Length, nothing."""
        if self.chunked:
            self._handler.rfile.readline(8)
        else:
            self.done = True

    def drain(self, limit: float = float("inf")) -> bool:
        """Throw away what is left; False if that is more than `limit`."""
        start = self.count
        while self.count - start <= limit and self.some():
            pass
        return self.done


class Spool:
    """A body in a temporary file, so that memory stays flat and the client is not needed."""

    def __init__(self, some: Callable[[], bytes]) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(prefix="xnat_standin")
        self.count = 0
        for data in iter(some, b""):
            self.count += self.file.write(data)
        self.file.seek(0)

    def some(self) -> bytes:
        """The next bytes; none at the end."""
        return self.file.read(PIECE)


class Remains:
    """A body that may break off: what there is of it, and how it ended."""

    def __init__(self, some: Callable[[], bytes]) -> None:
        self._some = some
        self.end: Optional[Exception] = None

    def some(self) -> bytes:
        """The next bytes; none at the end, or where it breaks off."""
        try:
            return self._some()
        except (OSError, Vanish) as end:
            self.end = end
            return b""


class Stream:
    """Bytes that come in pieces of any size, to be read in the sizes one needs."""

    def __init__(self, more: Callable[[], bytes]) -> None:
        self._more = more
        self._rest, self._at = b"", 0

    def some(self) -> bytes:
        """The next bytes, as they come; none at the end."""
        if self._at < len(self._rest):
            data = self._rest[self._at:] if self._at else self._rest
            self._rest, self._at = b"", 0
            return data
        return self._more()

    def push(self, data: bytes) -> None:
        """Give back what was read too far."""
        if data:
            self._rest, self._at = data + self._rest[self._at:], 0

    def read(self, count: int) -> bytes:
        """So many bytes, fewer only at the end."""
        while len(self._rest) - self._at < count:
            data = self._more()
            if not data:
                break
            self._rest, self._at = self._rest[self._at:] + data, 0
        data = self._rest[self._at:self._at + count]
        self._at += len(data)
        return data

    def exactly(self, count: int) -> bytes:
        """So many bytes, or trouble."""
        data = self.read(count)
        if len(data) < count:
            raise ZipTrouble("unexpected end of stream")
        return data


class Multipart:
    """A form, as commons-fileupload parses it: all of it first, files into temporary files, which
    whoever gave the list `opened` has to close."""

    def __init__(self, some: Callable[[], bytes], boundary: str, opened: List[IO[bytes]]) -> None:
        self._opened = opened
        self._stream = Stream(some)
        self._stream.push(b"\r\n")
        self.fields: Dict[str, str] = {}
        self.files: List[Tuple[str, IO[bytes]]] = []
        mark = b"\r\n--" + boundary.encode()
        self._until(mark, lambda data: None)
        while self._stream.read(2) == b"\r\n":
            self._part(mark)
        while self._stream.some():
            pass

    def _part(self, mark: bytes) -> None:
        """One field or file."""
        head: List[bytes] = []
        self._until(b"\r\n\r\n", head.append)
        words = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', b"".join(head).decode("utf-8")))
        if "filename" in words:
            file = tempfile.TemporaryFile(prefix="xnat_standin")
            self._opened.append(file)
            self._until(mark, file.write)
            file.seek(0)
            self.files.append((words["filename"], file))
        else:
            value: List[bytes] = []
            self._until(mark, value.append)
            self.fields[words.get("name", "")] = b"".join(value).decode("utf-8", "replace")

    def _until(self, mark: bytes, sink: Callable[[bytes], Any]) -> None:
        """Everything up to the mark goes to the sink; the mark is eaten."""
        keep, tail = len(mark) - 1, b""
        while True:
            more = self._stream.some()
            if not more:
                raise XnatError(400, "Processing of multipart/form-data request failed. "
                                     "Stream ended unexpectedly")
            data = tail + more
            at = data.find(mark)
            if at >= 0:
                sink(data[:at])
                self._stream.push(data[at + len(mark):])
                return
            sink(data[:-keep])
            tail = data[-keep:]


# ---- Zips ------------------------------------------------------------------------------------

class Entry(NamedTuple):
    """One file in an archive; its bytes come only once."""
    name: str
    chunks: Iterator[bytes]


class Local(NamedTuple):
    """A local file header."""
    flags: int
    method: int
    crc: int
    packed: int
    size: int


def zip_entries(stream: Stream) -> Iterator[Entry]:
    """The entries as java.util.zip.ZipInputStream finds them (section 3): local headers, one after
    the other; anything that is no local header is the silent end of the archive."""
    while True:
        head = stream.read(30)
        if len(head) < 30 or head[:4] != b"PK\3\4":
            return
        flags, method, crc, packed, size, name_length, extra_length = struct.unpack(
            "<2xHHxxxxIIIHH", head[4:])
        raw_name = stream.exactly(name_length)
        extra = stream.exactly(extra_length)
        try:
            name = raw_name.decode("utf-8")
        except UnicodeDecodeError:
            raise XnatError(400, "malformed input off : 0, length : 1") from None
        packed, size = _zip64_sizes(extra, packed, size)
        if flags & 1:
            raise ZipTrouble("encrypted ZIP entry not supported")
        if flags & 8 and method != 8:
            raise ZipTrouble("only DEFLATED entries can have EXT descriptor")
        local = Local(flags, method, crc, packed, size)
        chunks = _inflated(stream, local) if method == 8 else _plain(stream, local)
        if not name.endswith("/"):
            yield Entry(name, chunks)
        for _ in chunks:
            pass  # what the reader of the entry left; trouble at its end shows here at the latest


def _zip64_sizes(extra: bytes, packed: int, size: int) -> Tuple[int, int]:
    """The true sizes, from the zip64 extra field where there is one."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1 and length >= 16:
            true_size, true_packed = struct.unpack_from("<QQ", extra, at + 4)
            return (true_packed if packed == 0xFFFFFFFF else packed,
                    true_size if size == 0xFFFFFFFF else size)
        at += 4 + length
    return packed, size


def _plain(stream: Stream, local: Local) -> Iterator[bytes]:
    """The bytes of a stored entry."""
    if local.method != 0:
        raise ZipTrouble("unsupported compression method")
    left, crc = local.packed, 0
    while left:
        data = stream.some()
        if not data:
            raise ZipTrouble("unexpected end of stream")
        if len(data) > left:
            stream.push(data[left:])
            data = data[:left]
        left -= len(data)
        crc = zlib.crc32(data, crc)
        yield data
    if crc != local.crc:
        raise ZipTrouble("invalid entry CRC")


def _inflated(stream: Stream, local: Local) -> Iterator[bytes]:
    """The bytes of a deflated entry, its sizes and CRC checked at the end."""
    inflater = zlib.decompressobj(-15)
    crc = size = packed = 0
    while not inflater.eof:
        data = inflater.unconsumed_tail or stream.some()
        try:
            out = inflater.decompress(data, 8 * PIECE)
        except zlib.error as error:
            raise ZipTrouble(str(error)) from None
        if not data and not out:
            raise ZipTrouble("Unexpected end of ZLIB input stream")
        # At its end the inflater shows what is left in both places.
        packed += len(data) - len(inflater.unused_data or inflater.unconsumed_tail)
        size += len(out)
        crc = zlib.crc32(out, crc)
        if out:
            yield out
    stream.push(inflater.unused_data)
    expected = _descriptor(stream, size, packed) if local.flags & 8 else local[2:]
    if expected != (crc, packed, size):
        raise ZipTrouble("invalid entry size or CRC")


def _descriptor(stream: Stream, size: int, packed: int) -> Tuple[int, ...]:
    """The data descriptor; Java expects 64-bit sizes only where the entry is that large."""
    form = "<IQQ" if max(size, packed) > 0xFFFFFFFF else "<III"
    head = stream.exactly(4)
    if head == b"PK\7\10":
        head = stream.exactly(4)
    return struct.unpack(form, head + stream.exactly(struct.calcsize(form) - 4))


def tar_entries(stream: Stream) -> Iterator[Entry]:
    """The entries of a tar, packed or not."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:  # type: ignore[call-overload]
            for member in tar:
                file = tar.extractfile(member)
                if file:
                    yield Entry(member.name, iter(partial(file.read, PIECE), b""))
    except tarfile.TarError as error:
        raise ZipTrouble(str(error)) from None


# ---- DICOM -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Image:
    """What the importer wants to know of a DICOM file."""
    sop_class: str = ""
    sop_instance: str = ""
    study: str = ""
    series: str = ""
    number: str = ""
    description: str = ""
    study_description: str = ""
    patient: str = ""


WANTED = {0x00080016: "sop_class", 0x00080018: "sop_instance", 0x00081030: "study_description",
          0x0008103E: "description", 0x00100020: "patient", 0x0020000D: "study",
          0x0020000E: "series", 0x00200011: "number"}
LAST_WANTED = max(WANTED)
SHORT_VRS = b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
LONG_VRS = b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split()
ALL_VRS = frozenset(SHORT_VRS + LONG_VRS)
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


class DataSet:
    """Elements, one after the other, from the beginning of a data set."""

    def __init__(self, data: bytes, order: str, explicit: bool) -> None:
        self.data, self.order, self.explicit = data, order, explicit

    def element(self, at: int) -> Tuple[int, int, int, int]:
        """Its tag, where its value begins, where that ends, where the next element begins."""
        group, number = struct.unpack_from(self.order + "HH", self.data, at)
        vr = self.data[at + 4:at + 6]
        explicit = self.explicit and group != 0xFFFE
        if explicit and vr not in LONG_VRS:
            start = at + 8
            (length,) = struct.unpack_from(self.order + "H", self.data, at + 6)
        else:
            start = at + 12 if explicit else at + 8
            (length,) = struct.unpack_from(self.order + "I", self.data, start - 4)
        tag = group << 16 | number
        if length == UNDEFINED and tag not in (ITEM, ITEM_END, SEQUENCE_END):
            inner = DataSet(self.data, self.order, explicit and vr != b"UN")
            return tag, start, start, inner.after_items(start)
        return tag, start, start + length, start + length

    def after_items(self, at: int) -> int:
        """Where a sequence of undefined length ends."""
        while True:
            tag, start, end, _ = self.element(at)
            if tag == SEQUENCE_END:
                return start
            at = self.after_item(start) if end - start == UNDEFINED else end

    def after_item(self, at: int) -> int:
        """Where an item of undefined length ends."""
        while True:
            tag, start, _, at = self.element(at)
            if tag == ITEM_END:
                return start


def read_image(head: bytes) -> Image:
    """The header of a DICOM file, with or without preamble; ValueError if it is none."""
    if head[128:132] == b"DICM":
        at = 132
    elif head[:2] in (b"\2\0", b"\10\0") and (
            head[4:6] in ALL_VRS or len(head) > 8 and head[6:8] == b"\0\0"):
        at = 0
    elif head[:2] in (b"\0\2", b"\0\10") and head[4:6] in ALL_VRS:
        at = 0  # dcm4che looks the first tag up in both orders
    else:
        raise ValueError("not a DICOM stream")
    try:
        return _read_from(*_data_set(head, at))
    except struct.error:
        raise ValueError("the header is cut") from None


def _data_set(head: bytes, at: int) -> Tuple[DataSet, int]:
    """The data set and where it begins: the meta elements tell how to read it."""
    meta, syntax = DataSet(head, "<", True), b""
    while head[at:at + 2] == b"\2\0":
        tag, start, end, at = meta.element(at)
        if tag == 0x00020010:
            syntax = head[start:end].rstrip(b"\0 ")
    if syntax == b"1.2.840.10008.1.2.1.99":
        head, at = zlib.decompressobj(-15).decompress(head[at:], HEAD), 0
    turned = not at and head[:2] in (b"\0\2", b"\0\10")  # no meta elements told of it
    order = ">" if turned or syntax == b"1.2.840.10008.1.2.2" else "<"
    return DataSet(head, order, head[at + 4:at + 6] in ALL_VRS), at


def _read_from(data_set: DataSet, at: int) -> Image:
    """The elements that are wanted."""
    head = data_set.data
    found: Dict[str, str] = {}
    while at < len(head):
        tag, start, end, at = data_set.element(at)
        if tag > LAST_WANTED:
            break
        if end > len(head):
            raise ValueError("the header is cut")
        if tag in WANTED:
            found[WANTED[tag]] = head[start:end].decode("utf-8", "replace").strip("\0 ")
    return Image(**found)


def reaches_pixels(head: bytes) -> bool:
    """Whether what is left of a file is all that comes before its pixels; it has an Image."""
    try:
        data_set, at = _data_set(head, 132 if head[128:132] == b"DICM" else 0)
        while struct.unpack_from(data_set.order + "H", data_set.data, at)[0] != 0x7FE0:
            at = data_set.element(at)[3]
    except struct.error:
        return False
    return True


# ---- Accounts --------------------------------------------------------------------------------

GUEST = User("guest", "")


class Accounts:
    """Users, their HTTP sessions and alias tokens (sections 7 and 11)."""

    def __init__(self, knobs: Knobs, users: Iterable[User], lock: Any) -> None:
        self.knobs, self._lock = knobs, lock
        self.users = {user.name: replace(user) for user in users}
        self.sessions: Dict[str, Tuple[str, float]] = {}   # id -> user, last used
        self.tokens: Dict[str, Tuple[str, str]] = {}       # alias -> user, secret
        self.wrong_logins = 0

    def by_cookie(self, session: str) -> Optional[User]:
        """The user of a live session."""
        with self._lock:
            name, used = self.sessions.get(session, ("", 0.0))
            now = time.monotonic()
            if not name or now - used > self.knobs.session_timeout:
                self.sessions.pop(session, None)
                return None
            self.sessions[session] = name, now
            user = self.users[name]
            return None if user.disabled else user

    def by_password(self, name: str, password: str) -> Optional[User]:
        """The user of a right login; a wrong one counts, and too many lock the account."""
        with self._lock:
            owner, secret = self.tokens.get(name, ("", ""))
            user = self.users.get(owner or name)
            right = user is not None and hmac.compare_digest(
                (secret if owner else user.password).encode(), password.encode())
            if user is None or not right:
                self.wrong_logins += 1
                if user is not None:
                    user.failures += 1
                return None
            if user.disabled or user.failures >= self.knobs.max_failed_logins:
                return None
            if self._open_sessions(user) >= self.knobs.max_sessions:
                return None
            user.failures = 0
            return user

    def _open_sessions(self, user: User) -> int:
        """How many live sessions a user has."""
        oldest = time.monotonic() - self.knobs.session_timeout
        return sum(name == user.name and used >= oldest for name, used in self.sessions.values())

    def new_session(self, user: User) -> str:
        """A new HTTP session."""
        session = secrets.token_hex(16).upper()
        with self._lock:
            self.sessions[session] = user.name, time.monotonic()
        return session

    def new_token(self, user: User) -> Tuple[str, str]:
        """A new alias token and its secret."""
        alias, secret = secrets.token_hex(18), secrets.token_hex(32)
        with self._lock:
            self.tokens[alias] = user.name, secret
        return alias, secret


# ---- The store -------------------------------------------------------------------------------

class Store:
    """Projects, the prearchive and the archive (sections 4 to 6 and 8)."""

    def __init__(self, knobs: Knobs, projects: Iterable[Project], changed: threading.Condition,
                 pause: Callable[[float], None]) -> None:
        self.knobs, self.changed, self.pause = knobs, changed, pause
        self.projects = {project.id: replace(project) for project in projects}
        self.rows: Dict[str, Row] = {}                              # uri -> row
        self._by_key: Dict[Tuple[str, str, str], Row] = {}          # project, study, label -> row
        self.archive: Dict[Tuple[str, str], Session] = {}           # project, label -> session
        self.file_locks: Set[Tuple[str, str]] = set()               # row uri, file
        self.archived_by_idle: List[Archived] = []
        self._count = 0
        self._last_timestamp = ""

    # -- projects

    def project(self, user: User, name: str) -> Optional[Project]:
        """The project of that id or alias, if the user may read it."""
        for project in self.projects.values():
            if name == project.id or name in project.aliases:
                readable = user.admin or project.public or user.name in project.members
                return project if readable else None
        return None

    def may_edit(self, user: User, project: str) -> bool:
        """Whether the user may change the project's data; Unassigned is for administrators."""
        members = self.projects[project].members if project in self.projects else {}
        return user.admin or members.get(user.name) in ("owner", "member")

    def code(self, project: str) -> int:
        """Its prearchive code."""
        return self.projects[project].prearchive_code if project in self.projects else 0

    # -- the prearchive

    def timestamp(self) -> str:
        """The name of a new folder, never twice the same."""
        stamp = self._last_timestamp
        while stamp <= self._last_timestamp:
            now = time.time()
            stamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(now))
            stamp += "%03d" % (now * 1000 % 1000)
        self._last_timestamp = stamp
        return stamp

    def join(self, project: str, study: str, label: str, make: Callable[[str], Row]) -> Row:
        """The row of (project, StudyInstanceUID, label), made if need be (section 5): whatever its
        status, it is set to RECEIVING and joined."""
        with self.changed:
            row = self._by_key.get((project, study, label))
            if row is None:
                row = self.add(make(self.timestamp()))
                self._by_key[project, study, label] = row
            else:
                row.status = "RECEIVING_INTERRUPT" if row.status == "BUILDING" else "RECEIVING"
            return row

    def add(self, row: Row) -> Row:
        """A new row."""
        with self.changed:
            self.rows[row.uri] = row
            return row

    def remove(self, row: Row) -> None:
        """The row is gone: archived or deleted."""
        with self.changed:
            self.rows.pop(row.uri, None)
            if self._by_key.get((row.project, row.tag, row.name)) is row:
                del self._by_key[row.project, row.tag, row.name]

    def build(self, row: Row) -> None:
        """Catalogue the row's files: equal numbers of different series become n, n-MR1, ..."""
        with self.changed:
            folders: Dict[str, Dict[str, Dict[str, Stored]]] = {}
            for (folder, name), file in row.files.items():
                folders.setdefault(folder, {}).setdefault(file.series, {})[name] = file
            self._retag(row)
            row.built = {}
            for folder, twins in folders.items():
                first = 1 if self.knobs.number_all_twins and len(twins) > 1 else 0
                for number, files in enumerate(twins.values(), first):
                    scan = twin(folder, files, number) if number else folder
                    row.built[scan] = {name: replace(file, scan=scan)
                                       for name, file in files.items()}

    def _retag(self, row: Row) -> None:
        """A build takes the Study UID from the files; where a script has changed that, a later
        import finds no row of its own study and gets a new one (section 13.5)."""
        study = next((file.study for file in row.files.values()), row.tag)
        if study != row.tag:
            old, new = ((row.project, tag, row.name) for tag in (row.tag, study))
            if self._by_key.get(old) is row:
                self._by_key.setdefault(new, self._by_key.pop(old))
            row.tag = study

    def commit(self, row: Row, archive: bool, overwrite: bool, idle: bool = False,
               queue_seconds: float = 0) -> Union[Row, Session]:
        """Build the row, then archive it if the project or the caller wants it (section 6.2)."""
        queue_seconds = queue_seconds or self.knobs.queue_seconds
        with self.changed:
            if row.queued:
                raise XnatError(423, "Duplicate archive attempt")
            if row.status.startswith("_"):
                raise XnatError(409, "session document locked")
            row.status = "_BUILDING"
            self.changed.notify_all()
        self.pause(self.knobs.build_delay)
        self.build(row)
        with self.changed:
            if not (archive or self.code(row.project) in (4, 5)):
                row.status = "READY"
                return row
            row.queued = queue_seconds > 0
            row.status = "READY" if row.queued else "_ARCHIVING"
            self.changed.notify_all()
        whole = queue_seconds + self.knobs.archive_seconds
        if idle or whole <= self.knobs.archive_timeout:
            return self._archive_slowly(row, overwrite, queue_seconds)
        threading.Thread(target=self._archive_unheard, args=(row, overwrite, queue_seconds),
                         daemon=True).start()
        self.pause(self.knobs.archive_timeout)
        raise XnatError(500, "FAILED: %s did not return a valid data URI within the timeout "
                             "interval of %d seconds." % (row.uri, self.knobs.archive_timeout))

    def _archive_unheard(self, row: Row, overwrite: bool, queue_seconds: float) -> None:
        """The archiving that goes on after its commit gave up."""
        with contextlib.suppress(XnatError):
            self._archive_slowly(row, overwrite, queue_seconds)

    def _archive_slowly(self, row: Row, overwrite: bool, queue_seconds: float) -> Session:
        """Move the row into the archive, when its turn has come."""
        self.pause(queue_seconds)
        with self.changed:
            row.status, row.queued = "_ARCHIVING", False
            self.changed.notify_all()
        self.pause(self.knobs.archive_seconds)
        with self.changed:
            try:
                session = self._move(row, overwrite or self.code(row.project) == 5)
            except Refused as refused:
                row.status = "CONFLICT" if refused.status == 409 else "ERROR"
                row.log = refused.text
                raise
            finally:
                self.changed.notify_all()
            return session

    def _move(self, row: Row, overwrite: bool) -> Session:
        """The archive step of section 11; conflicts are 409."""
        label = clean(row.label or self.knobs.label_rule or row.name)
        subject = clean(row.subject)
        if not VALID_ID.fullmatch(label) or not VALID_ID.fullmatch(subject):
            raise Refused(500, "Identifiers cannot use special characters.")
        subject = self._known_subject(row.project, subject)
        session = self.archive.get((row.project, label))
        scans = row.built or {}
        if session:
            self._refuse_session(row, session, subject)
        self._refuse_catalogs(scans)
        if session:
            scans = self._placed(session, scans)
            self._refuse_files(session, {} if overwrite else scans)
        else:
            session = self.new_session(row.project, label, subject, row.tag)
            if "uids" in self.knobs.project_script:
                session.uid = other_uid(row.tag)
        self._merge(session, {
            scan: {name: file.scripted(self.knobs.project_script) for name, file in files.items()}
            for scan, files in scans.items()})
        self.remove(row)
        return session

    def new_session(self, project: str, label: str, subject: str, uid: str) -> Session:
        """A new session in the archive."""
        self._count += 1
        session = Session(project, label, subject, uid, self._count)
        self.archive[project, label] = session
        return session

    def _known_subject(self, project: str, subject: str) -> str:
        """The archive's spelling of a subject: it is looked up regardless of case."""
        for session in self.archive.values():
            if session.project == project and session.subject.lower() == subject.lower():
                return session.subject
        return subject

    @staticmethod
    def _refuse_session(row: Row, session: Session, subject: str) -> None:
        """Why a row may not be merged into a session at all."""
        if session.subject != subject:
            raise Refused(409, "Invalid modification of session subject via archive process.: "
                               "%s Already Exists for another Subject" % session.label)
        if session.uid not in ("", row.tag):
            raise Refused(409, "Invalid modification of session UID via archive process.")
        sent = [file for files in (row.built or {}).values() for file in files.values()]
        if session.files and modality_of(sent) != modality_of(session.files):
            raise Refused(409, "Invalid modification of session modality via archive process.")

    def _refuse_catalogs(self, scans: Scans) -> None:
        """What makes a scan unfit for any archive, from 1.8.7 on; overwriting does not help
        (section 13.3)."""
        if not self.knobs.since(1, 8, 7):
            return
        for scan, files in scans.items():
            bad = sum(not file.parsable or file.damaged and self.knobs.strict_parser
                      for file in files.values())
            if bad:
                raise Refused(500, "Scan %s has %d non-DICOM (or non-parsable DICOM) files"
                              % (scan, bad))
            counts = Counter(file.sop_instance for file in files.values())
            twice = [instance for instance, count in counts.items() if count > 1]
            if twice and self.knobs.unique_sop_uids:
                raise Refused(500, "Scan %s DICOM catalog contains duplicated SOP instance UIDs: "
                                   "%s" % (scan, ", ".join(twice)))

    @staticmethod
    def _placed(session: Session, scans: Scans) -> Scans:
        """The scans by the ids that they get in a session: an id that another series has there
        becomes n-MR1; a scan without a UID, made by hand, takes in any series."""
        placed: Scans = {}
        for scan, files in scans.items():
            series = series_uid(files)
            for other in session.scans:
                if other != scan and series == session.series(other):
                    raise Refused(409, "Session already contains a scan with the same UID, but a "
                                       "different number (%s)." % other)
            number, place = 0, scan
            while place in placed or place in session.scans and (
                    session.series(place) not in ("", series)):
                number += 1
                place = twin(scan, files, number)
            placed[place] = files
        return placed

    @staticmethod
    def _refuse_files(session: Session, scans: Scans) -> None:
        """Equal instances, or equal names, in one scan are a conflict."""
        for scan, files in scans.items():
            held = session.scans.get(scan, {})
            instances = {file.sop_instance for file in held.values()}
            if any(name in held or file.sop_instance in instances
                   for name, file in files.items()):
                raise Refused(409, "Session already exists with matching files.")

    @staticmethod
    def _merge(session: Session, scans: Scans) -> None:
        """Put the scans into the session; equal instances and equal names are replaced."""
        for scan, files in scans.items():
            sent = {file.sop_instance for file in files.values()}
            held = {name: file for name, file in session.scans.get(scan, {}).items()
                    if file.sop_instance not in sent}
            held.update((name, replace(file, scan=scan)) for name, file in files.items())
            session.scans[scan] = held
            session.counted.discard(scan)

    def archive_idle(self) -> None:
        """What the idle thread does at each tick (section 6.1)."""
        with self.changed:
            oldest = time.monotonic() - self.knobs.idle_seconds
            locked = {uri for uri, _ in self.file_locks}
            idle = [row for row in self.rows.values()
                    if row.status == "RECEIVING" and not row.prevent_auto_commit
                    and row.source != "uploader" and row.lastmod <= oldest
                    and row.uri not in locked]
        for row in idle:
            try:
                archived = isinstance(self.commit(row, False, False, idle=True), Session)
            except XnatError:
                archived = False
            with self.changed:
                self.archived_by_idle.append(Archived(row.name, len(row.files), archived))
                self.changed.notify_all()


def clean(label: str) -> str:
    """A label as the archive makes it (section 4.4)."""
    return re.sub(r"[`~@#$%^&*()+=\[\]{}|\\/?:;',.<>\" ]", "_", label)


def twin(scan: str, files: Mapping[str, Stored], number: int) -> str:
    """The id of a scan whose own id another one has: n-MR1."""
    return "%s-%s%d" % (scan, modality_of(files.values()), number)


def hash_name(sop_instance: str, scan: str) -> str:
    """The name of a file that cannot keep its own (section 9)."""
    digest = hashlib.sha1(sop_instance.encode()).hexdigest()[:8]
    return "%s-%s-%s.dcm" % (sop_instance, scan, digest)


# ---- One import ------------------------------------------------------------------------------

@dataclass
class Exchange:
    """One request on its way through the server, and what becomes known of it."""
    number: int
    method: str
    path: str                         # below the context path, as sent
    query: str
    params: Dict[str, str]
    headers: Dict[str, str]
    body: Union[Body, Spool]
    site: str                         # the address that the client used
    port: int                         # the client's
    outside: bool = False             # not below the context path
    chunked: bool = False
    started: float = field(default_factory=time.monotonic)
    user: User = field(default_factory=lambda: GUEST)
    cookie: str = ""                  # the HTTP session in use
    new_session: bool = False
    file_name: str = ""
    entries: List[str] = field(default_factory=list)
    address: str = ""
    fault: Optional[Fault] = None
    background: bool = False          # its client has had an answer already
    over: bool = False                # what went on in the background is done
    truncate: bool = False

    @property
    def line(self) -> str:
        """What Fault.where is searched in."""
        return "%s %s%s" % (self.method, self.path, "?" + self.query if self.query else "")


class Import:
    """One POST to /data/services/import (sections 1 to 5, 9 and 11)."""

    def __init__(self, xnat: "Standin", exchange: Exchange) -> None:
        self.xnat, self.exchange = xnat, exchange
        self.since = xnat.since
        self.params: Dict[str, str] = {}
        self.stream = Stream(exchange.body.some)
        self.file: Optional[IO[bytes]] = None    # the spooled file of a form
        self.opened: List[IO[bytes]] = []        # to be closed at the end
        self.rows: Dict[str, Row] = {}           # uri -> row, in the order first seen
        self.count = 0                           # entries so far

    def answer(self) -> Answer:
        """Receive, import, and answer with the addresses."""
        try:
            self._receive()
            uris = self._handler()()
        except XnatError as refused:
            if self.params.get("format") == "html":
                return self.xnat.page(200, refused.text)  # sic (section 1.1)
            raise
        finally:
            self.xnat.leave(self.exchange)
            for file in self.opened:
                file.close()
        lines = ["/data%s\r\n" % uri for uri in uris]
        text = "".join(lines)
        if len(lines) == 1 and self.params.get("format") == "txt":
            text = text.strip()
        return Answer(200, text.encode(), "text/uri-list")

    # -- receiving (section 2)

    def _receive(self) -> None:
        """Find the file and the parameters in the request."""
        exchange = self.exchange
        kind = exchange.headers.get("content-type", "")
        media = kind.split(";")[0].strip().lower()
        if truthy(exchange.params.get("inbody")) and media == "multipart/form-data":
            self.xnat.abuse(exchange, "inbody=true together with a form")
            raise XnatError(500, "java.lang.NullPointerException")
        if truthy(exchange.params.get("inbody")) or media in IN_BODY_NAMES:
            if exchange.chunked and (media != "application/zip" or not self.since(1, 8)):
                raise XnatError(400, "In-body File posts must include the file directly as the "
                                     "body of the message.")
            exchange.file_name = IN_BODY_NAMES.get(media, "upload.unsupported")
        elif media == "multipart/form-data":
            self._receive_form(kind)
        else:
            raise XnatError(400, "Unable to identify upload format.")
        self._read_params()

    def _receive_form(self, kind: str) -> None:
        """The one file of a form."""
        boundary = re.search(r'boundary="?([^";]+)', kind)
        form = Multipart(self.exchange.body.some, boundary.group(1) if boundary else "",
                         self.opened)
        self.exchange.params = {**form.fields, **self.exchange.params}  # the query wins
        if form.files:
            self.exchange.file_name, self.file = form.files[0]
            self.xnat.keep(self.exchange, self.file)
            self.stream = Stream(lambda: form.files[0][1].read(PIECE))
        if "reference" in form.fields or not form.files:
            raise XnatError(400, "Unable to identify upload format.")
        if len(form.files) > 1:
            raise XnatError(400, "Importer is limited to one uploaded resource at a time.")

    def _read_params(self) -> None:
        """The parameters as this version sees them (section 1.2)."""
        sent = self.exchange.params
        if "prevent_anon" in sent:
            self.xnat.abuse(self.exchange, "prevent_anon was sent")
        aliases = {"project": "PROJECT_ID", "subject": "SUBJECT_ID", "session": "EXPT_LABEL"}
        for alias, name in aliases.items():
            if alias in sent and name not in sent:
                self.xnat.abuse(self.exchange, "%s was sent without %s" % (alias, name))
        self.params = {name: escaped(value) for name, value in sent.items()}
        for alias in (*aliases, "dest", "action"):
            value = self.params.get(alias)
            if not self.since(1, 8, 10):
                self.params.pop(alias, None)
            elif alias in aliases and value:
                self.params[aliases[alias]] = value
        if "prearchive_code" in sent and "overwrite" in sent:
            raise XnatError(400, "Invalid value for overwrite")  # sic (section 1.1)
        if sent.get("src"):
            raise XnatError(404, "Specified src could not be found.")

    def _handler(self) -> Callable[[], List[str]]:
        """The importer that was asked for."""
        default = "DICOM-zip" if self.since(1, 8, 10) else "SI"
        if self.exchange.headers.get("content-type", "").startswith("application/dicom"):
            default = "gradual-DICOM"
        name = self.params.get("import-handler") or default
        if name == "DICOM-zip":
            return self._drained if self.xnat.knobs.drain else self._dicom_zip
        if name == "gradual-DICOM":
            return self._gradual_dicom
        if name == "SI":
            return self._session_importer
        raise XnatError(404, "Unknown importer implementation specified: %s" % name)

    # -- the importers

    def _dicom_zip(self) -> List[str]:
        """One file after the other; a fault leaves what came before it (section 3)."""
        if self.since(1, 8, 3) and not ACCEPTED_NAME.search(self.exchange.file_name):
            raise XnatError(400, "Unsupported format UNKNOWN")
        failure: Optional[XnatError] = None
        try:
            for entry in self._entries(self.exchange.file_name, self.stream):
                try:
                    self._take(entry)
                except XnatError as problem:
                    if not self._ignored(problem):
                        raise
                    failure = problem
        except (XnatError, OSError, Vanish):
            self._mark_error()
            raise
        except ZipTrouble:
            self._mark_error()
            raise XnatError(400, "unable to read data from %sfile"
                            % ("" if self.since(1, 8, 3) else "zip ")) from None
        if failure and not self.rows:
            raise failure
        return self._finished()

    def _entries(self, name: str, stream: Stream) -> Iterator[Entry]:
        """The files in an archive, and from 1.8.10 on those in archives inside it."""
        tar = self.since(1, 8, 3) and TAR_NAME.search(name)
        for entry in (tar_entries if tar else zip_entries)(stream):
            self.exchange.entries.append(entry.name)
            base = entry.name.rpartition("/")[2]
            if self.since(1, 8, 10) and NESTED_NAME.search(base):
                yield from self._entries(base, Stream(partial(next, entry.chunks, b"")))
            elif self.since(1, 8, 10) and base.endswith(".gz"):
                raise XnatError(400, "Unsupported format GZ")
            else:
                yield entry

    def _ignored(self, problem: XnatError) -> bool:
        """Whether this version's Ignore-Unparsable passes over the problem (section 3)."""
        commits = self.params.get("action") == "commit"
        if not self.since(1, 8, 3) or not truthy(
                self.params.get("Ignore-Unparsable", "true" if commits else "false")):
            return False
        if not self.since(1, 8, 10):
            return isinstance(problem, NotDicom)
        return not (self.since(1, 10) and isinstance(problem, ServerTrouble))

    def _mark_error(self) -> None:
        """From 1.10.2 on a partial upload is an ERROR and so is not archived by itself."""
        for row in self.rows.values() if self.since(1, 10, 2) else ():
            row.status = "ERROR"

    def _gradual_dicom(self) -> List[str]:
        """The body is one DICOM file."""
        self._take(Entry(self.exchange.file_name, iter(self.stream.some, b"")))
        return self._finished()

    def _drained(self) -> List[str]:
        """For benchmarks: the bytes are taken, the first file stands for all others."""
        spooled = self.file or Spool(self.stream.some).file
        self.opened.append(spooled)
        try:
            with zipfile.ZipFile(spooled) as archive:
                names = [info.filename for info in archive.infolist() if not info.is_dir()]
        except zipfile.BadZipFile:
            names = []
        spooled.seek(0)
        for entry in zip_entries(Stream(lambda: spooled.read(PIECE))):
            image = read_image(next(entry.chunks, b""))
            break
        else:
            return []
        self.exchange.entries += names
        row = self._row(image)
        self.xnat.pause(self.xnat.knobs.seconds_per_file * len(names))
        with self.xnat.changed:
            for name in names:
                base = name.rpartition("/")[2]
                fake = replace(image, sop_instance=image.series + ":" + base)
                self._keep(row, Stored(self._scan(image), base, name, image.sop_class,
                                       fake.sop_instance, image.series, image.number,
                                       image.description, 0, "", study=image.study))
        return self._finished()

    def _session_importer(self) -> List[str]:
        """All at once into a folder of its own, which is built at once (section 1.3)."""
        found: List[Tuple[Image, Stored]] = []
        try:
            for entry in self._entries(self.exchange.file_name, self.stream):
                with contextlib.suppress(ValueError):
                    image, file, trouble = self._read(entry)
                    if image.sop_class and not trouble:
                        found.append((image, file))
        except ZipTrouble:
            raise XnatError(400, "unable to read data from file") from None
        if not found:
            raise XnatError(400, "Upload did not include parsable files for session generation.")
        if len({image.study for image, _ in found}) > 1:
            raise XnatError(400, "Upload included files for multiple imaging sessions.")
        row = self._row(found[0][0], new=True)
        for _, file in found:
            self._keep(row, replace(file, name=self._safe_name(row, file)))
        self.xnat.store.build(row)
        row.status = "READY"
        dest = self.params.get("dest", "")
        if not (self._truthy("AA", "auto-archive") or dest.startswith("/archive")
                or self.xnat.store.code(row.project) >= 4):
            return [row.uri]
        return [self._committed(row, archive=True)]

    def _truthy(self, *names: str) -> bool:
        """Whether one of these parameters says yes."""
        return any(truthy(self.params.get(name)) for name in names)

    def _finished(self) -> List[str]:
        """The addresses; from 1.8.10 on action=commit commits what was sent."""
        dest = self.params.get("dest", "")
        if self.params.get("action") != "commit" and not dest:
            return list(self.rows)
        archive = self._truthy("AA", "auto-archive") or dest.startswith("/archive")
        self.xnat.leave(self.exchange)  # its own commit is no abuse
        try:
            return [self._committed(row, archive) for row in self.rows.values()]
        except Refused:
            raise XnatError(400, "unable to archive for the Prearchive session") from None

    def _committed(self, row: Row, archive: bool) -> str:
        """The address after a commit within the import."""
        return self.xnat.store.commit(row, archive, self._truthy("overwrite_files")).uri

    # -- one file

    def _take(self, entry: Entry) -> None:
        """Import one file (GradualDicomImporter)."""
        self.count += 1
        base = entry.name.rpartition("/")[2]
        unreadable = "unable to read DICOM object %s" % base
        fault = self.exchange.fault
        if fault and fault.kind == "disk full" and fault.entry == self.count:
            raise ServerTrouble(400, unreadable)
        try:
            image, file, trouble = self._read(entry)
        except ValueError:
            raise NotDicom(400, unreadable) from None
        except ZipTrouble:
            raise XnatError(400, unreadable) from None
        for value, what in (image.sop_class, "Class"), (image.sop_instance, "Instance"):
            if not value:
                raise XnatError(400, "object %s contains no SOP %s UID" % (base, what))
        self.xnat.pause(self.xnat.knobs.seconds_per_file)
        reject = self.xnat.knobs.reject
        if reject(image.description) if callable(reject) else image.description in reject:
            return
        self._write(self._row(image), file)
        if trouble:
            raise XnatError(400, unreadable)

    def _read(self, entry: Entry) -> Tuple[Image, Stored, bool]:
        """What is in a file, its digest, and whether its end is damaged."""
        head, size, digest, trouble = b"", 0, hashlib.sha256(), False
        try:
            for data in entry.chunks:
                head += data[:HEAD - len(head)]
                size += len(data)
                digest.update(data)
        except (ZipTrouble, tarfile.TarError):
            trouble = True
        try:
            image = read_image(head)
        except ValueError:
            if trouble:
                raise ZipTrouble("cut") from None
            raise
        base = re.sub(r"[^\w.-]", "_", entry.name.rpartition("/")[2], flags=re.ASCII)
        return image, Stored(
            self._scan(image), base, entry.name, image.sop_class, image.sop_instance,
            image.series, image.number, image.description, size, digest.hexdigest(), trouble,
            not trouble or reaches_pixels(head), image.study), trouble

    @staticmethod
    def _scan(image: Image) -> str:
        """The id of the scan a file belongs to."""
        if re.fullmatch(r"[\w.-]+", image.number, re.ASCII):
            return image.number
        return re.sub(r"[^\w-]", "_", image.series, flags=re.ASCII)

    def _row(self, image: Image, new: bool = False) -> Row:
        """The prearchive session of a file; a project that the user cannot read is no error
        but `Unassigned` (section 4.3)."""
        store, params, user = self.xnat.store, self.params, self.exchange.user
        project = store.project(user, params.get("PROJECT_ID", ""))
        if project is None and self.xnat.knobs.route_by_header:
            project = store.project(user, image.study_description)
        place = project.id if project else UNASSIGNED
        label = params.get("EXPT_LABEL") or escaped(image.patient) or "dicom_upload"

        def make(timestamp: str) -> Row:
            return Row(place, timestamp, label, params.get("SUBJECT_ID") or escaped(image.patient),
                       image.study, self._truthy("prevent_auto_commit"),
                       self._truthy("prevent_anon"), params.get("SOURCE", ""),
                       params.get("VISIT", ""))

        with self.xnat.changed:
            if new:
                row = store.add(make(store.timestamp()))
            else:
                row = store.join(place, image.study, label, make)
            if row.uri not in self.rows:
                self.rows[row.uri] = row
                self.xnat.enter(self.exchange, row)
                self.xnat.changed.notify_all()
            return row

    def _write(self, row: Row, file: Stored) -> None:
        """Put a file into its scan, under a lock that another POST may hold (section 5)."""
        with self.xnat.changed:
            file = replace(file, name=self._safe_name(row, file))
            locked = file.scan + "/" + file.name if self.since(1, 8, 8) else file.name
            lock = row.uri, locked
            self.xnat.writes(self.exchange, row, locked)
            if lock in self.xnat.store.file_locks:
                raise XnatError(400, CONCURRENT)
            self.xnat.store.file_locks.add(lock)
            self.xnat.changed.notify_all()
        try:
            self.xnat.pause(self.xnat.knobs.write_delay)
            self._keep(row, file)
        finally:
            with self.xnat.changed:
                self.xnat.store.file_locks.discard(lock)

    def _safe_name(self, row: Row, file: Stored) -> str:
        """Its own name, unless another instance has that (section 9)."""
        other = row.files.get((file.scan, file.name))
        same = other is None or (other.sop_instance, other.sop_class) == (
            file.sop_instance, file.sop_class)
        if same and not self._truthy("rename"):
            return file.name
        return hash_name(file.sop_instance, file.scan)

    def _keep(self, row: Row, file: Stored) -> None:
        """The file is there."""
        with self.xnat.changed:
            row.files[file.scan, file.name] = file.scripted(self.xnat.knobs.site_script)
            row.lastmod = time.monotonic()
            self.xnat.changed.notify_all()


# ---- The routes ------------------------------------------------------------------------------

Route = Callable[..., Answer]
ROUTES: List[Tuple[List[str], "re.Pattern[str]", Route]] = []
NAME = "([^/]+)"
PREARCHIVED = "/data/prearchive/projects/%s/%s/%s" % (NAME, NAME, NAME)
EXPERIMENT = "/data/projects/%s/subjects/%s/experiments/%s" % (NAME, NAME, NAME)


def route(methods: str, path: str) -> Callable[[Route], Route]:
    """Register the function that answers these methods on this path."""
    def register(function: Route) -> Route:
        ROUTES.append((methods.split(), re.compile(path + "/?"), function))
        return function
    return register


def answer_of(xnat: "Standin", exchange: Exchange) -> Answer:
    """Find the route and take it."""
    path = re.sub("^/REST/", "/data/", exchange.path)
    path = re.sub("^/data/archive/(?=(?:projects|subjects|experiments)(?:/|$))", "/data/", path)
    allowed = True
    for methods, pattern, function in ROUTES:
        match = pattern.fullmatch(path)
        if match and exchange.method in methods:
            answer = function(xnat, exchange, *match.groups())
            csv_wanted = exchange.params.get("format") == "csv" and b'"ResultSet"' in answer.body
            return as_csv(answer) if csv_wanted else answer
        allowed = allowed and not match
    if not allowed:
        raise XnatError(405, "Method Not Allowed")
    raise XnatError(404, "Not Found")


@route("GET POST", "/(?:app/template/(?:Login|XDATScreen_UpdateUser|InactiveAccount).vm)?")
def login_page(xnat: "Standin", exchange: Exchange) -> Answer:
    """What a client that follows redirects gets to see."""
    return Answer(200, LOGIN_PAGE.encode(), "text/html;charset=UTF-8")


@route("GET POST", "/data/JSESSION")
def jsession(xnat: "Standin", exchange: Exchange) -> Answer:
    """Log in (section 7)."""
    token = "; XNAT_CSRF=" + exchange.cookie[:8] if truthy(exchange.params.get("CSRF")) else ""
    return Answer(200, (exchange.cookie + token).encode())


@route("DELETE", "/data/JSESSION")
def log_out(xnat: "Standin", exchange: Exchange) -> Answer:
    """Log out."""
    with xnat.changed:
        xnat.accounts.sessions.pop(exchange.cookie, None)
    return Answer()


@route("PUT", "/data/services/auth")
def log_in_by_form(xnat: "Standin", exchange: Exchange) -> Answer:
    """The login of PyPI's xnat: user and password in the body."""
    words = dict(parse_qsl(b"".join(iter(exchange.body.some, b"")).decode()))
    user = xnat.accounts.by_password(words.get("username", ""), words.get("password", ""))
    if user is None:
        return tomcat_page(401, LOGIN_FAILED)
    exchange.cookie, exchange.new_session = xnat.accounts.new_session(user), True
    return Answer(200, exchange.cookie.encode())


@route("GET", "/data/auth")
def who(xnat: "Standin", exchange: Exchange) -> Answer:
    """Who is logged in."""
    return Answer(200, ("User '%s' is logged in" % exchange.user.name).encode())


@route("GET", "/xapi/users/username")
def username(xnat: "Standin", exchange: Exchange) -> Answer:
    """The same, for the newer API."""
    return Answer(200, exchange.user.name.encode())


@route("GET POST", "/data/services/tokens/issue")
def issue_token(xnat: "Standin", exchange: Exchange) -> Answer:
    """An alias token (section 7)."""
    alias, secret = xnat.accounts.new_token(exchange.user)
    return as_json({"alias": alias, "secret": secret, "xdatUserId": exchange.user.name,
                    "singleUse": False, "enabled": True,
                    "estimatedExpirationTime": int(time.time() * 1000) + 172800000})


@route("GET POST", "/data/services/tokens/invalidate/" + NAME + "(?:/[^/]+)?")
def invalidate_token(xnat: "Standin", exchange: Exchange, alias: str) -> Answer:
    """The token is good no longer."""
    with xnat.changed:
        xnat.accounts.tokens.pop(alias, None)
    return Answer()


@route("GET", "/xapi/siteConfig/buildInfo")
def build_info(xnat: "Standin", exchange: Exchange) -> Answer:
    """The version."""
    return as_json({"version": xnat.knobs.version, "buildNumber": "1", "buildDate": "today",
                    "sha": "0000000", "isDirty": "false", "timestamp": "0", "title": "stand-in"})


# The data types that lead to a session's files: for clients that make their classes of them.
TYPES: Tuple[Tuple[str, str, str], ...] = (
    ("projectData", "", "name"),
    ("subjectData", "", "label project experiments/experiment:experimentData"),
    ("experimentData", "", "label project date"),
    ("subjectAssessorData", "experimentData", "subject_ID"),
    ("imageSessionData", "subjectAssessorData", "UID scans/scan:imageScanData"),
    ("mrSessionData", "imageSessionData", ""),
    ("imageScanData", "", "UID type series_description quality note"),
    ("mrScanData", "imageScanData", ""),
    ("abstractResource", "", "label"),
    ("resource", "abstractResource", ""),
    ("resourceCatalog", "resource", ""),
)


def element_schema(word: str) -> str:
    """An element: its name if it is a string, or list/name:type."""
    parts = re.fullmatch(r"(\w+)(?:/(\w+):(\w+))?", word)
    assert parts
    if not parts[2]:
        return '<xs:element name="%s" type="xs:string"/>' % word
    return ('<xs:element name="%s"><xs:complexType><xs:sequence><xs:element name="%s" '
            'type="xnat:%s" maxOccurs="unbounded"/></xs:sequence></xs:complexType></xs:element>'
            % parts.groups())


def type_schema(name: str, base: str, fields: str) -> str:
    """One of TYPES as a complex type."""
    elements = "".join(map(element_schema, fields.split()))
    body = "<xs:sequence>%s</xs:sequence>" % elements
    if base:
        body = ('<xs:complexContent><xs:extension base="xnat:%s">%s</xs:extension>'
                "</xs:complexContent>" % (base, body))
    else:
        body += '<xs:attribute name="ID" type="xs:string"/>'
    return '<xs:complexType name="%s">%s</xs:complexType>\n' % (name, body)


@route("GET", "/xapi/schemas/xnat")
def schema(xnat: "Standin", exchange: Exchange) -> Answer:
    """The schema of those types."""
    text = ('<xs:schema targetNamespace="http://nrg.wustl.edu/xnat" '
            'xmlns:xnat="http://nrg.wustl.edu/xnat" xmlns:xs="http://www.w3.org/2001/XMLSchema">\n'
            "%s</xs:schema>\n" % "".join(type_schema(*each) for each in TYPES))
    return Answer(200, text.encode(), "application/xml")


@route("GET", "/xapi/schemas")
def schemas(xnat: "Standin", exchange: Exchange) -> Answer:
    """The names of the schemas."""
    return as_json(["xnat"])


@route("GET", "/data/search/elements")
def search_elements(xnat: "Standin", exchange: Exchange) -> Answer:
    """None either."""
    return table([])


@route("GET", "/xapi/siteConfig/buildInfo/version")
def version(xnat: "Standin", exchange: Exchange) -> Answer:
    """The version alone."""
    return Answer(200, xnat.knobs.version.encode())


@route("POST", "/data/services/import")
def import_files(xnat: "Standin", exchange: Exchange) -> Answer:
    """Section 1."""
    return Import(xnat, exchange).answer()


# -- projects

def readable(xnat: "Standin", exchange: Exchange, name: str) -> Project:
    """The project, or a 404: an unreadable one cannot be told from a missing one."""
    project = xnat.store.project(exchange.user, name)
    if project is None:
        raise XnatError(404, NOT_FOUND)
    return project


def item(kind: str, **fields: object) -> Answer:
    """XNAT's JSON form of one item."""
    return as_json({"items": [{"children": [], "meta": {"xsi:type": kind, "isHistory": False},
                               "data_fields": fields}]})


@route("GET", "/data/projects")
def list_projects(xnat: "Standin", exchange: Exchange) -> Answer:
    """permissions=edit lists those the user may change (section 7)."""
    edit = exchange.params.get("permissions") == "edit"
    rows = []
    for project in xnat.store.projects.values():
        if edit and xnat.store.may_edit(exchange.user, project.id):
            rows.append({"id": project.id, "secondary_id": project.id})
        elif not edit and xnat.store.project(exchange.user, project.id):
            rows.append({"ID": project.id, "secondary_ID": project.id, "name": project.id,
                         "description": "", "pi_firstname": "", "pi_lastname": "",
                         "URI": "/data/projects/" + project.id})
    return table(rows, title="Projects", totalRecords=str(len(rows)))


@route("GET", "/data/projects/" + NAME)
def show_project(xnat: "Standin", exchange: Exchange, name: str) -> Answer:
    """One project, by id or alias."""
    project = readable(xnat, exchange, name)
    return item("xnat:projectData", ID=project.id, secondary_ID=project.id, name=project.id)


@route("GET", "/data/projects/" + NAME + "/prearchive_code")
def prearchive_code(xnat: "Standin", exchange: Exchange, name: str) -> Answer:
    """0, 4 or 5."""
    return Answer(200, str(readable(xnat, exchange, name).prearchive_code).encode())


# -- the prearchive

def local_time(moment: float) -> str:
    """A monotonic moment as XNAT writes times."""
    then = time.time() - (time.monotonic() - moment)
    return time.strftime("%Y-%m-%d %H:%M:%S.0", time.localtime(then))


def row_columns(xnat: "Standin", row: Row) -> Dict[str, Any]:
    """A prearchive session in 19 columns (section 8)."""
    return {
        "project": row.project, "timestamp": row.timestamp, "lastmod": local_time(row.lastmod),
        "uploaded": local_time(row.lastmod), "scan_date": "2020-01-02", "scan_time": "10:15:00",
        "subject": row.subject, "folderName": row.name, "name": row.name, "tag": row.tag,
        "status": row.status, "url": row.uri, "autoarchive": xnat.store.code(row.project),
        "prevent_anon": str(row.prevent_anon).lower(),
        "prevent_auto_commit": str(row.prevent_auto_commit).lower(),
        "SOURCE": row.source, "VISIT": row.visit, "PROTOCOL": "", "TIMEZONE": ""}


@route("GET", "/data/prearchive(?:/projects)?")
def list_prearchives(xnat: "Standin", exchange: Exchange) -> Answer:
    """All the sessions of the projects one can read."""
    return table([row_columns(xnat, row) for row in xnat.prearchive
                  if xnat.store.project(exchange.user, row.project)])


@route("GET", "/data/prearchive/projects/" + NAME)
def list_prearchive(xnat: "Standin", exchange: Exchange, name: str) -> Answer:
    """A project's sessions."""
    project = xnat.store.project(exchange.user, name)
    if project is None and not (name == UNASSIGNED and exchange.user.admin):
        raise XnatError(403, "Invalid permissions for retrieving project.")
    if "prearchive" in xnat.knobs.refuse_lists:
        raise XnatError(403, "Invalid permissions for retrieving project.")
    place = project.id if project else UNASSIGNED
    return table([row_columns(xnat, row) for row in xnat.prearchive if row.project == place])


def find_row(xnat: "Standin", exchange: Exchange, *place: str) -> Row:
    """The session at an address, for one who may edit it."""
    row = xnat.store.rows.get("/prearchive/projects/%s/%s/%s" % place)
    if not xnat.store.may_edit(exchange.user, place[0]):
        raise XnatError(403, "Invalid permissions for this prearchive session.")
    if row is None:
        raise XnatError(404, "Unable to locate prearc resource.")
    return row


def built_scans(xnat: "Standin", exchange: Exchange, *place: str) -> Scans:
    """The scans, which exist only after a build."""
    row = find_row(xnat, exchange, *place)
    if row.built is None:
        raise XnatError(404, "Unable to locate prearc resource.")
    return row.built


@route("GET", PREARCHIVED)
def show_row(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """One session: a table of one row, none if it is gone, or its XML."""
    if exchange.params.get("format") == "json":
        try:
            return table([row_columns(xnat, find_row(xnat, exchange, *place))])
        except XnatError as error:
            if error.status == 404:
                return table([])
            raise
    scans = built_scans(xnat, exchange, *place)
    return Answer(200, session_xml(find_row(xnat, exchange, *place), scans).encode(), "text/xml")


def session_xml(row: Row, scans: Scans) -> str:
    """A session's XML, as its last build left it."""
    kinds = {"PT": "PETSession", "MR": "MRSession", "CT": "CTSession", "OT": "OtherDicomSession"}
    modality = modality_of(file for files in scans.values() for file in files.values())
    lines = ["<?xml version=\"1.0\" encoding=\"UTF-8\"?>",
             '<xnat:%s ID="" project=%s label=%s UID=%s modality="%s" '
             'xmlns:xnat="http://nrg.wustl.edu/xnat" '
             'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">' % (
                 kinds[modality], quoteattr(row.project), quoteattr(row.name), quoteattr(row.tag),
                 modality),
             "<xnat:scans>", *(scan_xml(*each) for each in scans.items()), "</xnat:scans>",
             "</xnat:%s>" % kinds[modality], ""]
    return "\n".join(lines)


def scan_xml(scan: str, files: Mapping[str, Stored]) -> str:
    """One scan in it."""
    description = next(iter(files.values())).description
    return ('<xnat:scan ID=%s UID=%s type=%s xsi:type="%s">\n'
            "<xnat:series_description>%s</xnat:series_description>\n"
            '<xnat:file URI=%s content="RAW" format="DICOM" label="DICOM" '
            'xsi:type="xnat:resourceCatalog"/>\n</xnat:scan>' % (
                quoteattr(scan), quoteattr(series_uid(files)), quoteattr(description),
                data_type(modality_of(files.values()), "Scan"), html.escape(description),
                quoteattr("SCANS/%s/DICOM/scan_%s_catalog.xml" % (scan, scan))))


@route("GET", PREARCHIVED + "/scans")
def row_scans(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """The scans of a built session."""
    return table([{"ID": scan, "xsiType": data_type(modality_of(files.values()), "Scan"),
                   "series_description": next(iter(files.values())).description}
                  for scan, files in built_scans(xnat, exchange, *place).items()])


def dicom_resource(scan: str, files: Mapping[str, Stored]) -> Dict[str, Any]:
    """One resource and its counts."""
    return {"category": "scans", "cat_id": scan, "label": "DICOM", "file_count": len(files),
            "file_size": sum(file.size for file in files.values())}


@route("GET", PREARCHIVED + "/resources")
def row_resources(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """The counts of all scans of a built session."""
    return table([dicom_resource(scan, files)
                  for scan, files in built_scans(xnat, exchange, *place).items()])


def one_scan(scans: Scans, scan: str) -> Dict[str, Stored]:
    """The files of a scan, or a 404."""
    if scan not in scans:
        raise XnatError(404, NOT_FOUND)
    return scans[scan]


@route("GET", PREARCHIVED + "/scans/" + NAME + "/resources")
def row_scan_resources(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """The counts of one scan."""
    files = one_scan(built_scans(xnat, exchange, *place[:3]), place[3])
    columns = dicom_resource(place[3], files)
    return table([{key: columns[key] for key in ("label", "file_count", "file_size")}])


@route("GET", PREARCHIVED + "/scans/" + NAME + "/resources/DICOM/files")
def row_scan_files(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """The files of one scan."""
    files = one_scan(built_scans(xnat, exchange, *place[:3]), place[3])
    return table([{"Name": name, "Size": file.size, "URI": "%s/%s" % (exchange.path, name)}
                  for name, file in files.items()])


@route("GET", PREARCHIVED + "/logs/last")
def row_log(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """Why the last action failed."""
    return Answer(200, find_row(xnat, exchange, *place).log.encode())


@route("DELETE", PREARCHIVED)
def delete_row(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """Away with it."""
    xnat.store.remove(find_row(xnat, exchange, *place))
    return Answer()


@route("POST", PREARCHIVED)
def act_on_row(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """The actions of section 6.2."""
    row, action = find_row(xnat, exchange, *place), exchange.params.get("action")
    if action == "commit":
        return commit(xnat, exchange, row)
    if row.status.startswith("_"):
        raise XnatError(409, "session document locked")
    if action == "build":
        row.status = "_BUILDING"
        xnat.pause(xnat.knobs.build_delay)
        xnat.store.build(row)
        row.status = "READY"
    elif action == "reset-status":
        row.status = "READY"
    elif action == "set-status":
        row.status = exchange.params.get("status", row.status)
    elif action == "move":
        target = xnat.store.project(exchange.user, exchange.params.get("newProject", ""))
        if target is None or not xnat.store.may_edit(exchange.user, target.id):
            raise XnatError(403, "Invalid permissions for the new project.")
        xnat.store.remove(row)
        row.project = target.id
        xnat.store.add(row)
        return Answer(301, ("/data" + row.uri).encode())
    else:
        raise XnatError(400, "No action parameter specified, or an unknown one.")
    return Answer(200, ("/data" + row.uri).encode(), "text/uri-list")


def commit(xnat: "Standin", exchange: Exchange, row: Row) -> Answer:
    """Build and perhaps archive: 301 archived, 200 left in the prearchive (section 6.2)."""
    fault = exchange.fault
    wait = fault.seconds if fault and fault.kind == "queued" else 0
    row.label = exchange.params.get("EXPT_LABEL", "")
    with xnat.committing(exchange, row):
        try:
            result = xnat.store.commit(row, truthy(exchange.params.get("AA")),
                                       truthy(exchange.params.get("overwrite_files")),
                                       queue_seconds=wait)
        except Refused as refused:
            if not xnat.since(1, 7, 6):
                raise
            raise XnatError(500, "FAILED: Unable to archive %s: Operation Failed: %s"
                            % (row.name, refused.text)) from None
    if isinstance(result, Session):
        return Answer(301, ("/data" + result.uri).encode())
    return Answer(200, ("/data" + result.uri).encode(), "text/uri-list")


@route("POST", "/data/services/archive")
def archive_service(xnat: "Standin", exchange: Exchange) -> Answer:
    """Archive a session that is built (section 6.3); a plain form may hold the parameters."""
    if "x-www-form-urlencoded" in exchange.headers.get("content-type", ""):
        form = b"".join(iter(exchange.body.some, b"")).decode()
        exchange.params = {**dict(parse_qsl(form)), **exchange.params}
    source = re.sub("^/data", "", exchange.params.get("src", ""))
    place = source.split("/")[3:]
    if len(place) != 3 or place[0] == UNASSIGNED:
        raise XnatError(400, "Invalid source")
    row = find_row(xnat, exchange, *place)
    if row.status.startswith("_"):
        raise XnatError(403, "Operation already in progress on this prearchive entry.")
    if row.built is None:
        raise XnatError(500, "FAILED: not built")
    try:
        session = xnat.store.commit(row, True, truthy(exchange.params.get("overwrite_files")))
    except Refused as refused:
        raise XnatError(500, "FAILED: " + refused.text) from None
    return Answer(200, ("/data%s\r\n" % session.uri).encode(), "text/uri-list")


# -- the archive

def sessions_of(xnat: "Standin", project: Project) -> List[Session]:
    """A project's sessions, by label."""
    return [session for (place, _), session in sorted(xnat.archive.items())
            if place == project.id]


def listing(exchange: Exchange, title: str, rows: List[Dict[str, Any]], usual: str) -> Answer:
    """A list of the archive: the columns asked for, or the `usual` ones; the URI is always there.
    Parameters that are columns choose rows."""
    wanted = exchange.params.get("columns", usual).lower().split(",")
    wanted = [column.rpartition("/")[2] for column in wanted] + ["uri"]
    rows = [row for row in rows if all(str(row[key]) == exchange.params.get(key, str(row[key]))
                                       for key in ("ID", "label", "project") if key in row)]
    rows = [{key: value for key, value in row.items() if key.lower() in wanted} for row in rows]
    return table(rows, title=title, totalRecords=str(len(rows)))


def experiment_columns(session: Session) -> Dict[str, Any]:
    """All that a list of experiments can tell of one."""
    return {"ID": session.id, "project": session.project, "date": "2020-01-02",
            "xsiType": data_type(session.modality, "Session"), "label": session.label,
            "insert_date": "2020-01-02 10:15:00.0", "subject_ID": "XNAT_S_" + session.subject,
            "subject_label": session.subject, "uid": session.uid,
            "URI": "/data/experiments/" + session.id}


def named(subject: str, given: str) -> bool:
    """Whether a subject, by its label, is the one given by label or by ID."""
    return given in (subject, "XNAT_S_" + subject)


@route("GET", "/data/projects/" + NAME + "/subjects")
def list_subjects(xnat: "Standin", exchange: Exchange, name: str) -> Answer:
    """A project's subjects."""
    project = readable(xnat, exchange, name)
    subjects = sorted({session.subject for session in sessions_of(xnat, project)})
    rows = [{"ID": "XNAT_S_" + subject, "project": project.id, "label": subject,
             "insert_date": "2020-01-02 10:15:00.0", "insert_user": exchange.user.name,
             "xsiType": "xnat:subjectData", "URI": "/data/subjects/XNAT_S_" + subject}
            for subject in subjects]
    return listing(exchange, "Subjects", rows, "ID,project,label,insert_date,insert_user")


@route("GET", "/data/projects/" + NAME + "/subjects/" + NAME)
def show_subject(xnat: "Standin", exchange: Exchange, name: str, subject: str) -> Answer:
    """One subject."""
    project = readable(xnat, exchange, name)
    for session in sessions_of(xnat, project):
        if named(session.subject, subject):
            return item("xnat:subjectData", ID="XNAT_S_" + session.subject, label=session.subject,
                        project=project.id)
    raise XnatError(404, NOT_FOUND)


USUAL = "ID,project,date,xsiType,label,insert_date"  # columns of a list of experiments


@route("GET", "/data/projects/" + NAME + "(?:/subjects/" + NAME + ")?/experiments")
def list_experiments(xnat: "Standin", exchange: Exchange, name: str,
                     subject: Optional[str]) -> Answer:
    """The sessions of a project or of a subject."""
    project = readable(xnat, exchange, name)
    rows = [experiment_columns(session) for session in sessions_of(xnat, project)
            if subject is None or named(session.subject, subject)]
    return listing(exchange, "Experiments", rows, USUAL)


@route("GET", "/data/experiments")
def list_all_experiments(xnat: "Standin", exchange: Exchange) -> Answer:
    """All sessions that the user can read; with project= and columns=, what section 13.1 wants to
    know of a whole project."""
    if "archive" in xnat.knobs.refuse_lists:
        raise XnatError(403, "The request requires user authorization.")
    rows = [experiment_columns(session) for session in xnat.archive.values()
            if xnat.store.project(exchange.user, session.project)]
    return listing(exchange, "Experiments", rows, USUAL)


def find_session(xnat: "Standin", exchange: Exchange, project: Optional[str],
                 subject: Optional[str], name: str) -> Session:
    """An archived session, or a 404: by its label within a project, by its ID anywhere."""
    place = readable(xnat, exchange, project).id if project else ""
    for session in xnat.archive.values():
        if (name == session.id or place and name == session.label) and (
                xnat.store.project(exchange.user, session.project)
                and place in ("", session.project)
                and (subject is None or named(session.subject, subject))):
            return session
    raise XnatError(404, NOT_FOUND)


@route("GET", EXPERIMENT)
@route("GET", "/data/()()experiments/" + NAME)
@route("GET", "/data/projects/" + NAME + "/()experiments/" + NAME)
def show_session(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """One session."""
    session = find_session(xnat, exchange, place[0], place[1] or None, place[2])
    return item(data_type(session.modality, "Session"), ID=session.id, label=session.label,
                project=session.project, subject_ID="XNAT_S_" + session.subject, UID=session.uid,
                date="2020-01-02")


@route("GET", "(?:/data/experiments/%s|%s)/resources" % (NAME, EXPERIMENT))
def session_resources(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """What belongs to the session and to none of its scans, which is nothing; with all=true what
    belongs to its scans as well."""
    session = session_at(xnat, exchange, *place)
    scans = list(session.scans) if truthy(exchange.params.get("all")) else []
    return resources(xnat, exchange, session, scans)


# Below a session, XNAT knows the long way and the one by ID, not the one between them.
SCANS = "(?:/data/experiments/%s|%s)/scans" % (NAME, EXPERIMENT)


def session_at(xnat: "Standin", exchange: Exchange, number: Optional[str], *place: str) -> Session:
    """A session by its number, or by its place."""
    if number:
        return find_session(xnat, exchange, None, None, number)
    return find_session(xnat, exchange, *place)


def row_id(session: Session, scan: str, kind: int = 0) -> int:
    """The number of a scan or of its resource in the database: no two have the same."""
    return 100000 * session.number + 10 * list(session.scans).index(scan) + kind


def scan_columns(session: Session, scan: str) -> Dict[str, Any]:
    """One scan."""
    files = one_scan(session.scans, scan)
    description = next((file.description for file in files.values()), "")
    return {"ID": scan, "type": "", "quality": "usable", "note": "",
            "series_description": description, "UID": session.series(scan),
            "modality": modality_of(files.values()), "frames": len(files)}


@route("GET", SCANS)
def session_scans(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """Its scans."""
    session = session_at(xnat, exchange, *place)
    rows = [{"xnat_imagescandata_id": row_id(session, scan),
             "xsiType": data_type(modality_of(files.values()), "Scan"),
             **scan_columns(session, scan), "URI": "%s/%s" % (exchange.path, scan)}
            for scan, files in session.scans.items()]
    return listing(exchange, "Scans", rows, "xnat_imagescandata_id,ID,type,quality,xsiType,note,"
                   "series_description")


@route("GET", SCANS + "/" + NAME)
def show_scan(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """One scan."""
    session = session_at(xnat, exchange, *place[:4])
    files = one_scan(session.scans, place[4])
    return item(data_type(modality_of(files.values()), "Scan"), **scan_columns(session, place[4]))


@route("GET", SCANS + "/" + NAME + "/resources")
def scan_resources(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """The counts of one scan, or of ALL (XnatImagescandata.getScansByIdORType)."""
    session = session_at(xnat, exchange, *place[:4])
    every = xnat.knobs.all_scans and unquote(place[4]) in ("ALL", "*")
    return resources(xnat, exchange, session, list(session.scans) if every else [place[4]])


def resources(xnat: "Standin", exchange: Exchange, session: Session,
              scans: List[str]) -> Answer:
    """The resources of these scans and their counts. With cache_file_stats, newer versions tell
    what was stored earlier, else they count (CatalogUtils.populateTable); older ones have
    statistics or not, and gather them when they are asked to (section 13.1)."""
    stored = truthy(exchange.params.get("cache_file_stats"))
    if stored:
        session.counted.update(scans)
    rows: List[Dict[str, Any]] = []
    for scan in scans:
        rows.append({**dicom_resource(scan, one_scan(session.scans, scan)),
                     "xnat_abstractresource_id": row_id(session, scan, 1),
                     "element_name": "xnat:resourceCatalog", "cat_desc": "", "tags": "",
                     "content": "RAW", "format": "DICOM"})
        if xnat.knobs.snapshots:
            rows.append({**rows[-1], "xnat_abstractresource_id": row_id(session, scan, 2),
                         "label": "SNAPSHOTS", "file_count": 2, "file_size": 2000,
                         "format": "GIF"})
    for row in rows:
        if stored and xnat.knobs.stored_count:
            row.update(file_count=xnat.knobs.stored_count)
        if xnat.knobs.statistics == "never" or (
                xnat.knobs.statistics == "on request" and row["cat_id"] not in session.counted):
            row.update(file_count="", file_size="")
    return table(rows, title="Resources", totalRecords=str(len(rows)))


@route("GET", SCANS + "/" + NAME + "/resources/" + NAME + "/files")
def scan_files(xnat: "Standin", exchange: Exchange, *place: str) -> Answer:
    """The files of one scan; its resource is named by its label or its number."""
    session, scan = session_at(xnat, exchange, *place[:4]), place[4]
    files = one_scan(session.scans, scan)
    if place[5] not in ("DICOM", str(row_id(session, scan, 1))):
        raise XnatError(404, NOT_FOUND)
    files = files if xnat.knobs.file_names else {}
    return table([{"Name": name, "Size": file.size, "URI": "%s/%s" % (exchange.path, name),
                   "collection": "DICOM", "file_tags": "", "file_format": "DICOM",
                   "file_content": "RAW", "cat_ID": "1", "digest": file.sha256[:32]}
                  for name, file in files.items()], title="Files")


# ---- Authentication --------------------------------------------------------------------------

def cookies_of(exchange: Exchange) -> Dict[str, str]:
    """The cookies sent."""
    pairs = (pair.partition("=") for pair in exchange.headers.get("cookie", "").split(";"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def basic_of(exchange: Exchange) -> Optional[Tuple[str, str]]:
    """The user and password sent, split at the first colon."""
    kind, _, value = exchange.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return None
    name, colon, password = b64decode(value).decode("utf-8", "replace").partition(":")
    if not colon:
        raise ValueError("Invalid basic authentication token")
    return name, password


def authenticate(xnat: "Standin", exchange: Exchange) -> Optional[Answer]:
    """Find the user, in the order of section 11; an answer if the request ends here."""
    cookie = cookies_of(exchange).get("JSESSIONID", "")
    user = xnat.accounts.by_cookie(cookie) if cookie else None
    try:
        basic = basic_of(exchange)
    except ValueError as error:
        return tomcat_page(500, str(error))
    if user:
        exchange.cookie = cookie
    if basic and (user is None or user.name != xnat.accounts.tokens.get(basic[0], basic)[0]):
        wrong_before = xnat.accounts.wrong_logins
        user = xnat.accounts.by_password(*basic)
        if user is None:
            if wrong_before and xnat.accounts.wrong_logins > wrong_before:
                xnat.abuse(exchange, "wrong login number %d" % xnat.accounts.wrong_logins)
            return tomcat_page(401, LOGIN_FAILED)
        if not exchange.cookie:
            exchange.cookie, exchange.new_session = xnat.accounts.new_session(user), True
    elif user and user.disabled:
        user = None
    if user is None and xnat.knobs.require_login:
        return ask_for_login(exchange)
    exchange.user = user or GUEST
    if exchange.user.expired:
        return Answer(302, headers=(
            ("Location", exchange.site + "/app/template/XDATScreen_UpdateUser.vm"),))
    if basic is None and exchange.method != "GET" and is_browser(exchange) and (
            exchange.params.get("XNAT_CSRF") != exchange.cookie[:8]):
        return tomcat_page(500, "INVALID CSRF")
    return None


def is_browser(exchange: Exchange) -> bool:
    """Whether XNAT takes the agent for a browser."""
    agent = exchange.headers.get("user-agent", "")
    return bool(BROWSER.search(agent)) and "XNATDesktopClient" not in agent


def ask_for_login(exchange: Exchange) -> Answer:
    """Nobody is logged in."""
    if is_browser(exchange):
        return Answer(302, headers=(("Location", exchange.site + "/app/template/Login.vm"),))
    answer = tomcat_page(401, "Full authentication is required to access this resource")
    return answer._replace(headers=(("WWW-Authenticate", 'Basic realm="XNAT"'),))


def site_answer(xnat: "Standin", exchange: Exchange) -> Answer:
    """What XNAT itself answers."""
    open_to_all = exchange.path in ("/", "/data/services/auth") or exchange.path.startswith("/app/")
    refusal = None if open_to_all else authenticate(xnat, exchange)
    if refusal is None:
        try:
            refusal = answer_of(xnat, exchange)
        except XnatError as error:
            refusal = xnat.page(error.status, error.text)
    if exchange.new_session:
        expiry = '"%d,%d"' % (time.time() * 1000, xnat.knobs.session_timeout * 1000)
        refusal = refusal._replace(headers=refusal.headers + (
            ("Set-Cookie", "JSESSIONID=%s; Path=/; HttpOnly" % exchange.cookie),
            ("Set-Cookie", "SESSION_EXPIRATION_TIME=%s; Path=/" % expiry)))
    if refusal.body.startswith((b"/data/", b"/xapi/")):
        exchange.address = refusal.body.decode().splitlines()[0]
    return refusal


# ---- Faults ----------------------------------------------------------------------------------

class Faults:
    """The faults still to come; of several that match a request, the first that is due."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self._lock = threading.Lock()
        self._waiting: List[List[Any]] = []  # fault, requests to let pass, times left
        for fault in faults:
            self.append(fault)

    def append(self, fault: Fault) -> None:
        """One more."""
        with self._lock:
            self._waiting.append([fault, fault.skip, fault.times])

    def clear(self) -> None:
        """No more faults."""
        with self._lock:
            self._waiting.clear()

    def take(self, line: str) -> Optional[Fault]:
        """The fault that meets this request."""
        with self._lock:
            for waiting in self._waiting:
                fault, skip, times = waiting
                if times == 0 or not re.search(fault.where, line):
                    continue
                if skip:
                    waiting[1] -= 1
                    continue
                if times is not None:
                    waiting[2] -= 1
                return fault
        return None


def met(xnat: "Standin", exchange: Exchange) -> Answer:
    """The answer to a request, with what its fault does to it."""
    fault = exchange.fault
    if fault is None:
        return site_answer(xnat, exchange)
    before(xnat, exchange, fault)
    if fault.kind == "early status":
        return nginx_page(fault.status, fault.retry_after, linger=True)
    if fault.kind in ("background", "queued"):
        return go_on_alone(xnat, exchange, fault)
    if fault.kind == "late landing":
        return land_late(xnat, exchange, fault)
    make = INSTEAD.get(fault.kind)
    if make:
        Spool(exchange.body.some).file.close()
        return make(xnat, fault)
    return after(xnat, exchange, fault, site_answer(xnat, exchange))


def before(xnat: "Standin", exchange: Exchange, fault: Fault) -> None:
    """What happens before the body is read."""
    if fault.kind == "reset before":
        raise Vanish(reset=True)
    if isinstance(exchange.body, Body) and (
            fault.kind == "reset during" or fault.kind == "late landing" and fault.after_bytes):
        exchange.body.cut_after = fault.after_bytes
    elif fault.kind == "stall before":
        xnat.pause(fault.seconds)
    elif fault.kind == "drop sessions":
        with xnat.changed:
            xnat.accounts.sessions.clear()
    elif fault.kind == "disable account":
        user = xnat.accounts.users.get(claimed_user(xnat, exchange))
        if user:
            user.disabled = True


def vanish(last_words: bytes = b"") -> Answer:
    """FIN without an answer."""
    raise Vanish(reset=False, last_words=last_words)


INSTEAD: Dict[str, Callable[["Standin", Fault], Answer]] = {
    "status": lambda xnat, fault: nginx_page(fault.status, fault.retry_after),
    "error page": lambda xnat, fault: xnat.page(fault.status, fault.text),
    "close": lambda xnat, fault: vanish(),
    "login page": lambda xnat, fault: Answer(200, LOGIN_PAGE.encode(), "text/html;charset=UTF-8"),
    "empty": lambda xnat, fault: Answer(200, b"", "text/uri-list"),
    "redirect": lambda xnat, fault: Answer(
        fault.status if fault.status // 100 == 3 else 302,
        headers=(("Location", fault.location),)),
    "garbage": lambda xnat, fault: vanish(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    "answer": lambda xnat, fault: Answer(
        fault.status, fault.body, dict(fault.headers).get("Content-Type", "text/plain"),
        tuple(pair for pair in fault.headers if pair[0] != "Content-Type")),
}


def go_on_alone(xnat: "Standin", exchange: Exchange, fault: Fault) -> Answer:
    """The proxy gives up while XNAT works on."""
    exchange.body = Spool(exchange.body.some)
    exchange.background = True
    threading.Thread(target=work, args=(xnat, exchange), daemon=True).start()
    if fault.kind == "queued":
        xnat.wait_for(lambda: exchange.over or any(
            row.queued for row in xnat.prearchive if exchange.path.endswith(row.uri)))
        return vanish()
    return nginx_page(fault.status if fault.status != 503 else 504, fault.retry_after)


def work(xnat: "Standin", exchange: Exchange, after_seconds: float = 0) -> Answer:
    """The work for a client that may have gone; its body is in a Spool."""
    try:
        xnat.pause(after_seconds)
        return site_answer(xnat, exchange)
    finally:
        exchange.over = True
        if isinstance(exchange.body, Spool):
            exchange.body.file.close()
        xnat.journal_update(exchange)


def land_late(xnat: "Standin", exchange: Exchange, fault: Fault) -> Answer:
    """What came of a body, and is imported only later. A client that is still there gets an
    answer, one that has gone does not; the import happens either way."""
    remains = Remains(exchange.body.some)
    exchange.body = Spool(remains.some)
    exchange.background = True
    if remains.end is None:
        return work(xnat, exchange, fault.seconds)
    threading.Thread(target=work, args=(xnat, exchange, fault.seconds), daemon=True).start()
    raise remains.end


def after(xnat: "Standin", exchange: Exchange, fault: Fault, answer: Answer) -> Answer:
    """What happens to an answer on its way back."""
    if fault.kind == "late status":
        return nginx_page(fault.status, fault.retry_after)
    if fault.kind in ("reset after", "close after"):
        raise Vanish(reset=fault.kind == "reset after")
    if fault.kind == "stall":
        xnat.pause(fault.seconds)
    elif fault.kind == "truncate":
        exchange.truncate = True
    elif fault.kind == "other project":
        other = ("projects/" + (fault.text or "OTHER")).encode()
        return answer._replace(body=re.sub(rb"projects/[^/]+", other, answer.body))
    elif fault.kind == "extra line":
        other_line = fault.text or "/data/prearchive/projects/BRAIN/20200102_101500000/another"
        return answer._replace(body=answer.body + other_line.encode() + b"\r\n")
    return answer


def claimed_user(xnat: "Standin", exchange: Exchange) -> str:
    """Who a request says it is from."""
    try:
        basic = basic_of(exchange)
    except ValueError:
        basic = None
    if basic:
        return xnat.accounts.tokens.get(basic[0], basic)[0]
    return xnat.accounts.sessions.get(cookies_of(exchange).get("JSESSIONID", ""), ("", 0))[0]


# ---- HTTP ------------------------------------------------------------------------------------

class Handler(BaseHTTPRequestHandler):
    """One connection; what is said on it is for the functions above."""
    protocol_version = "HTTP/1.1"
    server_version = "Apache-Coyote/1.1"
    sys_version = ""
    disable_nagle_algorithm = True
    rbufsize = 64 * 1024
    server: "Server"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def handle_expect_100(self) -> bool:
        """The body asks for itself when it is read."""
        return True

    def serve(self) -> None:
        """One request."""
        xnat = self.server.xnat
        body = Body(self, xnat.line)
        exchange = xnat.journal_begin(self, body)
        if exchange.path.startswith("/_standin/"):
            return self._send(body, administer(xnat, exchange), exchange)
        try:
            answer = self._answer(exchange)
        except Vanish as end:
            xnat.journal_end(exchange, None)
            return self._vanish(end)
        except OSError:  # the client went away
            xnat.journal_end(exchange, None)
            self.close_connection = True
            return None
        xnat.journal_end(exchange, answer.status)
        return self._send(body, answer, exchange)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = serve

    def _answer(self, exchange: Exchange) -> Answer:
        """The answer; a mistake in the stand-in itself is shown and is a 500."""
        if exchange.outside:
            return tomcat_page(404, "Not Found")
        try:
            return met(self.server.xnat, exchange)
        except (Vanish, OSError):
            raise
        except Exception:
            traceback.print_exc()
            return tomcat_page(500, "the stand-in itself failed")

    def _send(self, body: Body, answer: Answer, exchange: Exchange) -> None:
        """Send it whole, then see to the rest of the request's body."""
        unread = not body.done
        far_too_much = body.chunked or (body.length or 0) - body.count > SWALLOW
        if unread and (answer.linger or body.unasked or far_too_much) or exchange.truncate:
            self.close_connection = True
        headers = [("Content-Type", answer.type), ("Content-Length", str(len(answer.body))),
                   *answer.headers]
        if self.close_connection:
            headers.append(("Connection", "close"))
        self.send_response(answer.status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers_with(b"" if self.command == "HEAD" else
                              answer.body[:len(answer.body) // 2] if exchange.truncate else
                              answer.body)
        if not unread or body.unasked:
            return
        if answer.linger:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(5)
            body.drain()
        elif not body.drain(SWALLOW):
            self.close_connection = True

    def end_headers_with(self, data: bytes) -> None:
        """Headers and body in one piece."""
        self._headers_buffer.append(b"\r\n" + data)  # type: ignore[attr-defined]
        self.flush_headers()

    def _vanish(self, end: Vanish) -> None:
        """End the connection without an answer."""
        self.close_connection = True
        if end.last_words:
            self.wfile.write(end.last_words)
        if end.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                       struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())


class Server(ThreadingHTTPServer):
    """Loopback only, unless it is given a socket; quiet; its threads never keep the process."""
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    xnat: "Standin"
    tls: Optional[ssl.SSLContext] = None

    def __init__(self, port: int, receive_buffer: int,
                 listener: Optional[socket.socket] = None) -> None:
        self._receive_buffer = receive_buffer
        self._open: Set[socket.socket] = set()
        self.connections = 0
        super().__init__(("127.0.0.1", port), Handler, bind_and_activate=listener is None)
        if listener:
            self.socket.close()
            self.socket = listener
            self.server_name, self.server_port = listener.getsockname()

    def server_bind(self) -> None:
        """As HTTPServer does, without asking the DNS for the machine's name."""
        if self._receive_buffer:  # so that a slow line is felt at the other end
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def get_request(self) -> Tuple[socket.socket, Any]:
        """A connection; its TLS handshake is made in its own thread."""
        connection, address = super().get_request()
        if self.tls:
            connection = self.tls.wrap_socket(connection, server_side=True,
                                              do_handshake_on_connect=False)
        self._open.add(connection)
        self.connections += 1
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """The connection is over."""
        self._open.discard(request)
        super().shutdown_request(request)

    def close_all(self) -> None:
        """Hang up on everybody."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


def administer(xnat: "Standin", exchange: Exchange) -> Answer:
    """The stand-in's own routes, for tests in another process."""
    what = exchange.method, exchange.path.rpartition("/")[2]
    if what == ("GET", "requests"):
        return as_json([asdict(request) for request in xnat.requests])
    if what == ("GET", "abuses"):
        return as_json(xnat.abuses)
    if what == ("GET", "tree"):
        return as_json(xnat.tree())
    if what == ("GET", "instances"):
        return as_json({label: xnat.instances(label) for label in xnat.labels()})
    if what == ("GET", "stored"):
        return as_json({label: xnat.stored(label) for label in xnat.labels()})
    if what == ("POST", "forget"):
        xnat.forget()
        return as_json(None)
    if what == ("POST", "faults"):
        value = json.loads(b"".join(iter(exchange.body.some, b"")))
        for words in value if isinstance(value, list) else [value]:
            words = {**words, "body": words.get("body", "").encode(),
                     "headers": tuple(map(tuple, words.get("headers", ())))}
            xnat.fail(**words)
        return as_json(None)
    return tomcat_page(404, "Not Found")


# ---- The stand-in itself ---------------------------------------------------------------------

@dataclass
class Window:
    """The time of one commit."""
    exchange: Exchange
    uri: str
    key: Tuple[str, str]
    ended: Optional[float] = None


class Standin:
    """An XNAT to try things on; a context manager that serves while it is entered."""

    def __init__(self, *, port: int = 0, context_path: str = "",
                 tls: Optional[Tuple[str, str]] = None, users: Optional[Iterable[User]] = None,
                 projects: Optional[Iterable[Project]] = None, faults: Iterable[Fault] = (),
                 listener: Optional[socket.socket] = None, **knobs: Any) -> None:
        self.knobs = Knobs(**knobs)
        self.context_path = context_path.rstrip("/")
        self.changed = threading.Condition()  # the one lock; notified whenever anything happens
        self._stopping = threading.Event()
        self.accounts = Accounts(self.knobs, default_users() if users is None else users,
                                 self.changed)
        self.store = Store(self.knobs, default_projects() if projects is None else projects,
                           self.changed, self.pause)
        self.faults = Faults(faults)
        self.line = Line(self.knobs.rate, self.pause)
        self._log: Dict[int, Request] = {}
        self._numbers = 0
        self._forgotten = 0              # requests up to this one are of clients that were killed
        self._abuses: List[str] = []
        self._importing: Dict[int, Dict[str, Set[str]]] = {}  # request -> row uri -> files written
        self._windows: List[Window] = []
        self._tls: Optional[ssl.SSLContext] = None
        if tls:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*tls)
        self._listen(port, listener)
        self.port = self._server.server_port
        self.url = "%s://%s:%d%s" % ("https" if tls else "http", self._server.server_name,
                                     self.port, self.context_path)

    def _listen(self, port: int, listener: Optional[socket.socket] = None) -> None:
        """Take the port, or a socket that listens in a network of its own; connections wait until
        somebody serves."""
        self._server = Server(port, 64 * 1024 if self.knobs.rate else 0, listener)
        self._server.xnat, self._server.tls = self, self._tls

    def _serve(self) -> None:
        """Answer what comes to the port."""
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _hang_up(self) -> None:
        """Leave the port, and all connections."""
        self._server.shutdown()
        self._server.close_all()
        self._server.server_close()

    def __enter__(self) -> "Standin":
        self._serve()
        threading.Thread(target=self._idle_thread, daemon=True).start()
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], value: Any, trace: Any) -> None:
        self._stopping.set()
        self._hang_up()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Killed, and started again at the end: nobody listens, all logins are forgotten, what
        is on disk stays. Work that was under way comes to its end unheard."""
        self._hang_up()
        try:
            yield
        finally:
            with self.changed:
                self.accounts.sessions.clear()
            self._listen(self.port)
            self._serve()

    def pause(self, seconds: float) -> None:
        """Sleep, unless the stand-in is being closed."""
        if seconds > 0:
            self._stopping.wait(seconds)

    def _idle_thread(self) -> None:
        """SessionXMLRebuilder."""
        while not self._stopping.wait(self.knobs.tick_seconds):
            self.store.archive_idle()

    def page(self, status: int, text: str) -> Answer:
        """An error page."""
        return status_page(status, text, 2 if self.since(1, 11) else 1)

    def since(self, *version: int) -> bool:
        """Whether this XNAT is that version or newer."""
        return self.knobs.since(*version)

    # -- for tests: what happened

    @property
    def requests(self) -> List[Request]:
        """All requests so far, in the order they began."""
        with self.changed:
            return list(self._log.values())

    @property
    def connections(self) -> int:
        """How many connections were opened; a client may keep one for many requests."""
        return self._server.connections

    @property
    def abuses(self) -> List[str]:
        """What no client should do, a sentence each."""
        with self.changed:
            return list(self._abuses)

    def imports(self) -> List[Request]:
        """The import POSTs."""
        return [request for request in self.requests if request.method == "POST"
                and request.path.endswith("/services/import")]

    def commits(self) -> List[Request]:
        """The commits."""
        return [request for request in self.requests if request.method == "POST"
                and request.params.get("action") == "commit" and "/prearchive/" in request.path]

    def wait_for(self, predicate: Callable[[], Any], timeout: float = 10) -> Any:
        """Wait until it is true; looked at again whenever anything happens."""
        with self.changed:
            return self.changed.wait_for(predicate, timeout)

    def fail(self, kind: str, where: str = "", **more: Any) -> None:
        """Inject a fault, from now on."""
        self.faults.append(Fault(kind, where, **more))

    def forget(self) -> None:
        """Forget the log, the sessions and the faults; users and projects stay."""
        with self.changed:
            self._log.clear()
            self._abuses.clear()
            self._windows.clear()
            self.faults.clear()
            self.accounts.wrong_logins = 0
            for row in list(self.store.rows.values()):
                self.store.remove(row)
            self.store.archive.clear()
            self.store.archived_by_idle.clear()

    # -- for tests: what is there

    def keep(self, exchange: Exchange, file: IO[bytes]) -> None:
        """Keep a copy of a posted file, if that is asked for."""
        if self.knobs.keep:
            with open("%s/%d.zip" % (self.knobs.keep, exchange.number), "wb") as copy:
                shutil.copyfileobj(file, copy)
            file.seek(0)

    def kept(self) -> List[Tuple[Request, Path]]:
        """The import POSTs that came with a file, and where the copy of each is."""
        copies = [(each, Path(self.knobs.keep, "%d.zip" % each.number)) for each in self.imports()]
        return [(request, copy) for request, copy in copies if copy.exists()]

    @property
    def archive(self) -> Dict[Tuple[str, str], Session]:
        """(project, label) -> session, in the archive."""
        with self.changed:
            return dict(self.store.archive)

    @property
    def prearchive(self) -> List[Row]:
        """The rows of the prearchive, oldest first."""
        with self.changed:
            return list(self.store.rows.values())

    @property
    def archived_by_idle(self) -> List[Archived]:
        """What the idle thread built or archived by itself."""
        with self.changed:
            return list(self.store.archived_by_idle)

    def labels(self) -> List[str]:
        """All sessions' labels."""
        return sorted({label for _, label in self.archive} | {row.name for row in self.prearchive})

    def files(self, label: str) -> List[Stored]:
        """All files of a session, wherever they are."""
        with self.changed:
            found = [file for row in self.store.rows.values() if row.name == label
                     for file in row.files.values()]
            for (_, name), session in self.store.archive.items():
                found += session.files if name == label else []
            return found

    def stored(self, label: str) -> List[str]:
        """The sorted sha256 of all files of a session, wherever they are."""
        return sorted(file.sha256 for file in self.files(label))

    def instances(self, label: str) -> "Counter[str]":
        """How often each SOP instance of a session is there."""
        return Counter(file.sop_instance for file in self.files(label))

    def tree(self) -> List[str]:
        """All that is there, for people."""
        with self.changed:
            lines, last = ["archive"], ("", "")
            for session in sorted(self.store.archive.values(),
                                  key=lambda s: (s.project, s.subject, s.label)):
                if session.project != last[0]:
                    lines.append("  " + session.project)
                if (session.project, session.subject) != last:
                    lines.append("    " + session.subject)
                last = session.project, session.subject
                lines.append("      %s  %d files" % (session.label, len(session.files)))
                lines += ["        " + line for line in scan_lines(session.files)]
            lines.append("prearchive")
            for row in self.store.rows.values():
                lines.append("  %s  %s  %s  %s  %d files" % (
                    row.project, row.timestamp, row.name, row.status, len(row.files)))
                lines += ["        " + line for line in scan_lines(row.files.values())]
            return lines

    # -- for tests: what somebody else does

    def make_session(self, project: str, label: str, subject: str = "007",
                     uid: str = "") -> Session:
        """A session in the archive as people make one in XNAT's pages: without any scan."""
        with self.changed:
            return self.store.new_session(project, label, subject, uid)

    def make_scan(self, project: str, label: str, scan: str, uid: str = "") -> None:
        """A scan without files in an archived session, as people make one: it may have no UID."""
        with self.changed:
            session = self.store.archive[project, label]
            session.scans[scan] = {}
            session.by_hand[scan] = uid

    # -- the log

    def journal_begin(self, handler: Handler, body: Body) -> Exchange:
        """A request has come in."""
        path, _, query = handler.path.partition("?")
        inside = path.startswith(self.context_path + "/") or path.startswith("/_standin/")
        path = path[len(self.context_path):] if inside else path
        headers = {name.lower(): value for name, value in handler.headers.items()}
        site = "%s://%s%s" % ("https" if self._server.tls else "http",
                              headers.get("host", "127.0.0.1"), self.context_path)
        with self.changed:
            self._numbers += 1
            exchange = Exchange(
                self._numbers, handler.command, path, query,
                dict(parse_qsl(query, keep_blank_values=True)), headers, body, site,
                handler.client_address[1], not inside, body.chunked)
            if not path.startswith("/_standin/"):
                exchange.fault = self.faults.take(exchange.line)
                self._log[exchange.number] = self._record(exchange)
                self._look_for_abuse(exchange)
                self.changed.notify_all()
        return exchange

    def _record(self, exchange: Exchange) -> Request:
        """A request as far as it is known when it comes in."""
        secret = ("authorization", "cookie")
        auth = [name for name, header in (("basic", "authorization"), ("cookie", "cookie"))
                if header in exchange.headers]
        return Request(
            exchange.number, exchange.method, exchange.path, exchange.params,
            {name: value for name, value in exchange.headers.items() if name not in secret},
            "+".join(auth), exchange.started, claimed_user(self, exchange),
            fault=exchange.fault.kind if exchange.fault else "", port=exchange.port)

    def journal_update(self, exchange: Exchange, **more: Any) -> None:
        """More is known of a request."""
        with self.changed:
            if exchange.number in self._log:
                self._log[exchange.number] = replace(
                    self._log[exchange.number], params=exchange.params,
                    file_name=exchange.file_name, entries=tuple(exchange.entries),
                    address=exchange.address, **more)
            self.changed.notify_all()

    def journal_end(self, exchange: Exchange, status: Optional[int]) -> None:
        """A request is about to be answered, or never will be."""
        self.journal_update(exchange, answered=time.monotonic(), status=status,
                            body_bytes=exchange.body.count)

    # -- abuse

    def abuse(self, exchange: Exchange, what: str) -> None:
        """Note what no client should do."""
        with self.changed:
            self._abuses.append("request %d (%s %s): %s" % (
                exchange.number, exchange.method, exchange.path, what))

    def _look_for_abuse(self, exchange: Exchange) -> None:
        """What the request line and the headers give away."""
        if BROWSER.search(exchange.headers.get("user-agent", "")):
            self.abuse(exchange, "the agent looks like a browser")
        shown = unquote(exchange.path), *exchange.params.values()
        hidden = {user.password for user in self.accounts.users.values()}
        hidden |= set(self.accounts.sessions)
        for secret in hidden:
            if any(secret == text or len(secret) > 4 and secret in text for text in shown):
                self.abuse(exchange, "a password or a session id in the URL")

    def forget_clients(self) -> None:
        """All clients have been killed: of what still goes on here those to come know nothing."""
        with self.changed:
            self._forgotten = self._numbers
            self._importing.clear()

    def unknown(self, exchange: Exchange) -> bool:
        """Whether no client can know that this goes on."""
        return exchange.background or exchange.number <= self._forgotten

    def enter(self, exchange: Exchange, row: Row) -> None:
        """An import reaches a session."""
        if self.unknown(exchange):
            return
        self._importing.setdefault(exchange.number, {})[row.uri] = set()
        for window in self._windows:
            if window.key == (row.project, row.name) and not self.unknown(window.exchange) and (
                    window.ended is None or window.ended > exchange.started):
                self.abuse(exchange, "an import into %s while it was committed by request %d"
                           % (row.name, window.exchange.number))

    def leave(self, exchange: Exchange) -> None:
        """An import is over."""
        with self.changed:
            self._importing.pop(exchange.number, None)

    def writes(self, exchange: Exchange, row: Row, name: str) -> None:
        """An import writes a file; another that runs may have written it too."""
        for number, rows in self._importing.items():
            if number != exchange.number and name in rows.get(row.uri, ()):
                if not self.unknown(exchange):
                    self.abuse(exchange, "it wrote %s in %s, as request %d did at the same time"
                               % (name, row.name, number))
        if exchange.number in self._importing:
            self._importing[exchange.number][row.uri].add(name)

    @contextlib.contextmanager
    def committing(self, exchange: Exchange, row: Row) -> Iterator[None]:
        """The time of a commit."""
        window = Window(exchange, row.uri, (row.project, row.name))
        with self.changed:
            for other in self._windows:
                if other.uri == row.uri and other.ended is None and not self.unknown(
                        other.exchange):
                    self.abuse(exchange, "a second commit while request %d commits"
                               % other.exchange.number)
            for number, rows in self._importing.items():
                if row.uri in rows:
                    self.abuse(exchange, "a commit while request %d imports" % number)
            self._windows.append(window)
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                window.ended = time.monotonic()


def scan_lines(files: Iterable[Stored]) -> List[str]:
    """One line for each scan."""
    counts = Counter((file.scan, file.description) for file in files)
    return ["%s %s  %d files" % (scan, description, count)
            for (scan, description), count in counts.items()]


# ---- The command line ------------------------------------------------------------------------

def main(argv: Optional[List[str]] = None) -> int:
    """Serve until INT or TERM."""
    parser = argparse.ArgumentParser(prog="xnat_standin", description="A stand-in for XNAT.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--version", default="1.8.11", help="which XNAT to be (%(default)s)")
    parser.add_argument("--code", type=int, choices=(0, 4, 5), default=4,
                        help="BRAIN's prearchive code (%(default)s)")
    parser.add_argument("--rate", type=float, default=0, help="bytes a second of the line")
    parser.add_argument("--seconds-per-file", type=float, default=0, help="import time")
    parser.add_argument("--idle-seconds", type=float, default=300)
    parser.add_argument("--drain", action="store_true", help="take the bytes, do little else")
    parser.add_argument("--context-path", default="")
    parser.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"))
    options = parser.parse_args(argv)
    projects = default_projects()
    projects[0].prearchive_code = options.code
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        standin = Standin(port=options.port, context_path=options.context_path, tls=options.tls,
                          projects=projects, version=options.version, rate=options.rate,
                          seconds_per_file=options.seconds_per_file, drain=options.drain,
                          idle_seconds=options.idle_seconds)
    except OSError as error:
        parser.exit(3, "port %d: %s: give another as --port\n" % (options.port, error.strerror))
    with standin as xnat:
        print("XNAT stand-in %s at %s" % (options.version, xnat.url))
        print("login alice s3cret, project BRAIN")
        print("python3 dicomUpload.py %s alice s3cret BRAIN ROOTDIR" % xnat.url, flush=True)
        stop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
