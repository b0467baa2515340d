"""What chance finds: random trees, configs and server answers, each drawn from a printed seed.

Whatever is drawn: no traceback, the exit status that the contract says, every file among those that
the server has or among those that are named as not sent, and the same plan for the same tree.
A few seeds are played in the usual suite, always the same, as many as the time allows.
DICOMUPLOAD_TEST_SEED plays chosen ones; `python3 -m tests.test_fuzz SECONDS FIRST-SEED` plays on
and tells what it finds.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple
from unittest import mock

import dicomUpload
from tests.dicom import dicom_file, dicomdir_file, uid, write_series
from tests.support import WHOLE, Ran, UploadTest, alone
from tests.xnat_standin import Fault, Standin

ALONE = True  # it runs main() here, with our arguments, streams and signals
LONG = 9 if WHOLE else 0.5
SECONDS = {"trees": 0.5 * LONG, "configs": 0.25 * LONG, "answers": 0.5 * LONG}
GOOD = "0/s/G_0001"  # each tree has this series: it is never one without any


# ---- Trees -----------------------------------------------------------------------------------

def text_name(draw: random.Random) -> bytes:
    """A name from all of Unicode, with a liking for what breaks shells, zips and terminals."""
    ranges = ((1, 0x7F), (0x20, 0x7E), (0x80, 0x17F), (0x300, 0x36F), (0x590, 0x6FF),
              (0x2000, 0x206F), (0x3040, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    low, high = draw.choice(ranges)
    count = draw.choice((1, 2, 5, 20, 90))
    return "".join(chr(draw.randint(low, high)) for _ in range(count)).encode()


def any_name(draw: random.Random, number: int) -> bytes:
    """A name for a file or folder: text, bytes that are none, or an ordinary one."""
    plain = draw.choice((b"IM%04d", b"IM%04d.dcm", b"1.2.3.%d", b"%d.gz", b"%d.ZIP", b"-%d", b"%d",
                         b"DICOMDIR%d", b"._%d", b" %d ", b"%d.tar", b"=%d", b"..%d")) % number
    drawn = draw.choice((lambda: plain, lambda: plain, lambda: text_name(draw), lambda: bytes(
        draw.randint(1, 255) for _ in range(draw.choice((1, 3, 40))))))()
    if draw.random() < 0.85:  # else two may become one label
        drawn = b"%d" % number + drawn
    name = drawn.replace(b"/", b"_").replace(b"\0", b"_")[:draw.choice((40, 255))]
    return name if name not in (b".", b"..") else b"_"


def content(draw: random.Random, study: str, number: int) -> Tuple[bytes, bool]:
    """The bytes of a file, and whether they are DICOM."""
    more: Dict[str, Any] = {"study": study, "series": uid(study, 1), "instance": number,
                            "rows": draw.randint(1, 4), "sop_instance": uid(study, number, "file")}
    good = dicom_file(preamble=draw.random() < 0.8, explicit=draw.random() < 0.7, **more)
    junk = draw.choice((b"", b"\0" * 700, b"DICM", b"text\n" * 100, dicomdir_file(), bytes(
        draw.getrandbits(8) | 0x40 for _ in range(draw.randint(1, 999)))))
    return (good, True) if draw.random() < 0.7 else (junk, False)


class Tree:
    """A random tree on the disk, and what is to become of it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw = os.fsencode(root), random.Random(seed)
        self.numbers = itertools.count(1)
        self.exclude: List[str] = []
        self.sendable: Dict[bytes, str] = {}   # path of a DICOM file in a series -> its sha256
        self.junk: List[bytes] = []            # paths of what is none
        self.loose: List[bytes] = []           # paths of files where folders belong
        self.trouble = False                   # whether something cannot be sent
        write_series(root / GOOD, study=uid(seed, "good"), files=1)
        for _ in range(self.draw.randint(1, 3)):
            self.level(self.root, 0, "")
        if self.draw.random() < 0.3:
            self.draw_config()

    def level(self, folder: bytes, depth: int, study: str) -> None:
        """A subject, session or series, or something in its place."""
        path = self.free(folder)
        hidden = is_hidden(path, self.root)
        kind = self.draw.random()
        if kind < 0.04:
            os.symlink(b"/nonexistent/" + b"x", path)
            self.trouble |= not hidden
        elif kind < 0.08:
            os.symlink(self.draw.choice((b".", b"..")), path)
        elif kind < 0.16:
            data, dicom = content(self.draw, uid("loose", path), 1)
            self.write(path, data)
            if not is_hidden(path, self.root):
                self.loose.append(path)
                self.trouble |= dicom
        elif depth == 2:
            os.mkdir(path)
            self.series(path, study, 0)
        else:
            os.mkdir(path)
            if self.draw.random() < 0.03:  # one that becomes the same label
                for twin in (path.swapcase(), path + b" ", path + b"_"):
                    with contextlib.suppress(OSError):
                        os.mkdir(twin)
            study = uid(path, self.draw.random()) if depth == 1 else ""
            for _ in range(self.draw.choice((0, 1, 1, 2, 3))):
                self.level(path, depth + 1, study)

    def series(self, folder: bytes, study: str, depth: int) -> None:
        """Files of a series folder, and folders in it."""
        for _ in range(self.draw.choice((0, 1, 2, 4, 8))):
            path, kind = self.free(folder), self.draw.random()
            if kind < 0.03:
                os.symlink(self.draw.choice((b"/nonexistent/x", path.rpartition(b"/")[2])), path)
            elif kind < 0.06:
                os.symlink(self.draw.choice((b".", b"..", b"/proc/self/fd/0", b"/dev/null")), path)
            elif kind < 0.08:
                os.mkfifo(path)
            elif kind < 0.2 and depth < 5:
                os.mkdir(path)
                self.series(path, study, depth + 1)
            else:
                self.write(path, content(self.draw, study, next(self.numbers))[0])

    def free(self, folder: bytes) -> bytes:
        """A path in the folder where nothing is yet."""
        while True:
            path = folder + b"/" + any_name(self.draw, next(self.numbers))
            if not os.path.lexists(path):
                return path

    @staticmethod
    def write(path: bytes, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)

    def draw_config(self) -> None:
        """Leave some series out by a piece of a name."""
        names = [name for _, _, name, _ in self.folders() if is_text(name)]
        if names:
            name = os.fsdecode(self.draw.choice(names))
            start = self.draw.randrange(len(name))
            piece = name[start:start + self.draw.randint(1, 4)]
            if piece.lower() not in "g_0001":
                self.exclude = [self.draw.choice((piece, piece.upper(), piece.lower()))]

    def folders(self) -> Iterator[Tuple[bytes, bytes, bytes, bytes]]:
        """Subject, session, series and path of each series folder."""
        for subject in shown_folders(self.root):
            for session in shown_folders(self.root + b"/" + subject):
                above = self.root + b"/" + subject + b"/" + session
                for series in shown_folders(above):
                    yield subject, session, series, above + b"/" + series


def shown_folders(folder: bytes) -> List[bytes]:
    """The folders that are subjects, sessions or series: neither links nor hidden."""
    return [entry.name for entry in os.scandir(folder)
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(b".")]


def is_hidden(path: bytes, root: bytes) -> bool:
    """Whether it, or a folder above it, says by a dot that it is no data."""
    return any(each.startswith(b".") for each in os.path.relpath(path, root).split(b"/"))


def is_text(name: bytes) -> bool:
    try:
        return bool(name.decode())
    except UnicodeDecodeError:
        return False


def shown(name: bytes) -> str:
    """A name as the log shows it."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode()
                   for each in os.fsdecode(name))


def in_report(name: bytes) -> str:
    """A name as the report shows it."""
    text = shown(name)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def label(*names: bytes) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", "_".join(map(os.fsdecode, names)))


def is_image(data: bytes) -> bool:
    """Whether `content` made this to be DICOM: our own marks, not the uploader's reading."""
    return b"SYNTHETIC STUDY" in data


class FuzzTest(UploadTest):
    """What the three games share: a folder for each seed, and the properties."""

    def setUp(self) -> None:
        super().setUp()
        self.base = self.folder

    def begin(self, seed: int, game: str) -> random.Random:
        """A fresh folder for a seed."""
        self.place = self.base / f"{game}-{seed}"
        self.place.mkdir()
        self.root, self.work = self.place / "dicomdir", self.place / "work"
        return random.Random(f"{game} {seed}")

    def end(self) -> None:
        shutil.rmtree(os.fsencode(self.place))

    def in_process(self, arguments: List[str]) -> Ran:
        """Run the command's main() here: for dry runs, which start no programs."""
        out, err = io.StringIO(), io.StringIO()
        mask = os.umask(0o077)
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        handlers = [signal.getsignal(each) for each in numbers]
        try:
            with mock.patch.object(sys, "argv", arguments[1:]), contextlib.redirect_stdout(out), \
                    contextlib.redirect_stderr(err):
                status = dicomUpload.main()
        finally:
            os.umask(mask)
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)
        return Ran(status, out.getvalue(), err.getvalue())

    # -- trees

    def play_trees(self, seed: int) -> None:
        """A tree: planned twice, uploaded, and looked through."""
        self.begin(seed, "trees")
        self.root.mkdir()
        tree = Tree(self.root, seed)
        options = ["--max-files", str(tree.draw.choice((1, 2, 500)))]
        if tree.exclude:
            config = self.place / "config.json"
            config.write_text(json.dumps({"Exclude": tree.exclude}), encoding="utf-8")
            options += ["--config", str(config)]
        with self.xnat() as server:
            plans = [self.in_process(self.arguments(server.url, *options, "--dry-run", "--procs",
                                                    "1")) for _ in range(2)]
            first, second = [re.sub("(?m)^Room for zips.*", "", plan.text) for plan in plans]
            self.assertEqual(first, second, "two plans of one tree")
            asked = len(server.requests)
            ran = self.upload(server, *options, "--retries", "0")
            missing = int("would send " in plans[0].out)
            self.assertEqual(plans[0].status, ran.status or missing, plans[0].text + ran.text)
            if self.meet_in_a_label(tree):
                self.assertEqual((ran.status, asked), (2, 0), ran.text)
                return self.end()
            self.assertIn(ran.status, (0, 1), ran.text)
            self.look_through(tree, server, ran)
            if tree.draw.random() < 0.3:  # a second run sends nothing
                before = len(server.imports())
                again = self.upload(server, *options, "--retries", "0")
                self.assertEqual((again.status, len(server.imports())), (ran.status, before),
                                 again.text)
        return self.end()

    def meet_in_a_label(self, tree: Tree) -> bool:
        """Whether two folders become one label; links to nothing count as folders too."""
        subjects, sessions = [], []
        for subject in shown_or_dangling(tree.root):
            subjects.append(label(subject).lower())
            folder = tree.root + b"/" + subject
            inside = shown_or_dangling(folder) if os.path.isdir(folder) else [b""]
            sessions += [label(subject, name) for name in inside]
        return len(set(subjects)) < len(subjects) or len(set(sessions)) < len(sessions)

    def look_through(self, tree: Tree, server: Standin, ran: Ran) -> None:
        """Each file is on the server, or said to be none for it, or in a series not sent."""
        rows = {(row["subject"], row["session"], row["series"]): row for row in self.report()}
        log, trouble = self.log(), tree.trouble
        for path in tree.loose:
            self.assertIn(f"where a folder belongs: {shown(path)}\n", log)
        for subject, session, series, folder in tree.folders():
            row = rows[in_report(subject), in_report(session), in_report(series)]
            if any(each.lower() in os.fsdecode(series).lower() for each in tree.exclude):
                self.assertEqual(row["status"], "left out")
                continue
            images, bad, blank = self.look_through_series(folder, log, b"/".join(
                (subject, session, series)))
            self.assertLessEqual(int(row["damaged files"]), blank)
            trouble |= bad or row["damaged files"] != "0"
            wanted = "not sent" if bad else "sent" if images else "no DICOM"
            self.assertEqual(row["status"], wanted, f"{folder!r} {row}\n{ran.text}")
            if bad:
                self.assertTrue(row["message"])
                self.assertIn(f"\n  {label(subject, session)} {shown(series)}: ", ran.out)
            elif images:
                stored = server.stored(label(subject, session))
                self.assertEqual(images - set(stored), set(), f"{folder!r}\n{ran.text}")
        self.assertEqual(ran.status, int(trouble), ran.text)

    def look_through_series(self, folder: bytes, log: str, place: bytes
                            ) -> Tuple[Set[str], bool, int]:
        """The digests of a series' DICOM files, whether something keeps it from being sent, and
        how many files are blank: named as their neighbours are, they are damaged."""
        images, bad, blank = set(), False, 0
        for above, folders, names in walk(folder):
            for name in names + [each for each in folders if each.startswith(b".")]:
                path = above + b"/" + name
                inside = path[len(folder) + 1:]
                if name.startswith(b"."):  # no data; rsync's half files have such names too
                    self.assertTrue(f": {shown(place + b'/' + inside)}" in log or
                                    re.fullmatch(rb"\..+\.[A-Za-z0-9]{6}", name, re.DOTALL), path)
                elif os.path.islink(path):
                    bad |= not os.path.exists(path)
                elif os.path.isfile(path):
                    with open(path, "rb") as file:
                        data = file.read()
                    if not is_image(data):
                        blank += not data.strip(b"\0")
                        self.assertRegex(log, r"(not DICOM|damaged): "
                                         + re.escape(shown(place + b"/" + inside)))
                    else:
                        images.add(hashlib.sha256(data).hexdigest())
                        bad |= not is_text(inside) or bool(
                            re.search(rb"[\r\n\x7f]|\.(zip|tar|tgz|gz)$", inside, re.IGNORECASE))
            folders[:] = [each for each in folders if not each.startswith(b".")]
        return images, bad, blank

    # -- configs

    def play_configs(self, seed: int) -> None:
        """A config: refused, or exactly its names are left out."""
        draw = self.begin(seed, "configs")
        names = ["T1_0001", "AAHEAD_SCOUT", "İstanbul", "ﬀ STRASSE", "straße"]
        for number, name in enumerate(names, 1):
            write_series(self.root / "007" / "pre" / name, study=uid("config"), number=number,
                         files=1, rows=1)
        with self.xnat() as server:
            self.try_configs(draw, server, names)
        self.end()

    def try_configs(self, draw: random.Random, server: Standin, names: List[str]) -> None:
        config = self.place / "config.json"
        for _ in range(20):
            raw = any_config(draw)
            config.write_bytes(raw)
            arguments = self.arguments(server.url, "--config", str(config), "--dry-run")
            real = draw.random() < 0.02
            ran = self.run_command(arguments) if real else self.in_process(arguments)
            wanted = exclusions(raw)
            if wanted is None:
                self.assertEqual((ran.status, ran.out), (2, ""), f"{raw!r}: {ran.text}")
                self.assertIn("--config", ran.err, repr(raw))
                self.assertEqual(ran.err.count("\n"), 1, f"{raw!r}: {ran.err}")
                continue
            self.assertIn(ran.status, (0, 1), f"{raw!r}: {ran.text}")
            self.assertEqual(ran.status, int("would send" in ran.out), f"{raw!r}: {ran.text}")
            for name in names:
                out = any(each.lower() in name.lower() for each in wanted)
                self.assertRegex(
                    ran.out, f"(?m)^007_pre +{re.escape(name)} +"
                    f"{'left out' if out else 'would send'}", repr(raw))

    # -- answers

    def play_answers(self, seed: int) -> None:
        """A server that answers some requests with anything; then one that is well again."""
        draw = self.begin(seed, "answers")
        sessions = {f"{number:03}_s": f"{number:03}/s" for number in range(1, draw.randint(2, 4))}
        for name, place in sessions.items():
            for number in range(1, draw.randint(2, 3)):
                write_series(self.root / place / f"S_{number:04}", study=uid(name), files=2,
                             number=number, rows=1)
        if draw.random() < 0.1:
            return self.play_noise(draw)
        drops = draw.choice((0, 0, 0.2, 1))  # files that the server throws away in silence
        reject = random.Random(seed).random
        with Standin(faults=any_faults(draw, not drops),
                     reject=lambda _: reject() < drops) as server:
            faults = [each[0] for each in server.faults._waiting]
            ran = self.upload(server, "--retries", "0", "--timeout", "1", "--procs",
                              str(draw.choice((1, 4))), timeout=100)
            told = f"{drops} {faults}\n{ran.text}"
            self.assertIn(ran.status, (0, 1, 3), told)
            self.look_at_sessions(server, ran, list(sessions), told)
            server.faults.clear()
            server.knobs.reject = ()
            again = self.upload(server, "--retries", "0", timeout=100)
            self.assertIn(again.status, (0, 1), f"{told}\n{again.text}")
            self.look_at_sessions(server, again, list(sessions), f"{told}\n{again.text}")
        return self.end()

    def look_at_sessions(self, server: Standin, ran: Ran, labels: List[str], told: str) -> None:
        """What is said to be there is there, whole; what is not there is named."""
        rows = self.report() if "Report:" in ran.out else []
        short = False
        for name in labels:
            folder = self.root / name.replace("_", "/")
            wanted = {hashlib.sha256(path.read_bytes()).hexdigest()
                      for path in folder.rglob("*.dcm")}
            whole = wanted <= set(server.stored(name)) and ("BRAIN", name) in server.archive
            said = re.search(rf"(?m)^{name} +(?:archived|already there), (\d+) file", ran.out)
            if said:
                self.assertGreaterEqual(len(server.stored(name)), int(said[1]), told)
            if said and int(said[1]) == len(wanted):
                self.assertTrue(whole, told)
            if not whole:
                short = True
                mine = [row for row in rows if row["label"] == name]
                self.assertTrue(not rows or mine and any(row["message"] for row in mine) or
                                re.search(rf"(?m)^  {name}\b", ran.out), told)
        self.assertFalse(short and ran.status == 0, told)

    def play_noise(self, draw: random.Random) -> None:
        """What answers is no XNAT, and maybe no HTTP: the run ends with 3."""
        with Noise(draw) as noise:
            ran = self.run_command(self.arguments(f"http://127.0.0.1:{noise.port}", "--retries",
                                                  "0", "--timeout", "1"))
            self.assertEqual(ran.status, 3, f"{noise.sent!r}\n{ran.text}")
            self.assertIn("dicomUpload: ", ran.err)
        self.end()


def shown_or_dangling(folder: bytes) -> List[bytes]:
    """What the plan takes for folders: those, and links to nothing, if not hidden."""
    return [entry.name for entry in os.scandir(folder) if not entry.name.startswith(b".") and (
        entry.is_dir(follow_symlinks=False) or
        entry.is_symlink() and not os.path.exists(entry.path))]


def walk(folder: bytes) -> Iterator[Tuple[bytes, List[bytes], List[bytes]]]:
    """os.walk, with links to folders among the files."""
    for above, folders, names in os.walk(folder):
        links = [each for each in folders if os.path.islink(above + b"/" + each)]
        yield above, folders, names + links


# ---- Configs ---------------------------------------------------------------------------------

def any_value(draw: random.Random, depth: int = 0) -> Any:
    """Something that JSON can hold."""
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return draw.choice(("AAHEAD", "t1", "", "ß", "İ", "i", "\u0307", "ﬀ", "_", "STRASSE", "\0",
                            "\ud800", "x" * 2000, "007", "S"))
    if kind < 6:
        return draw.choice((None, True, 0, -1.5, 1e308 * 10, 10 ** 30, float("nan")))
    if kind < 8:
        return [any_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(("Exclude", "exclude", "a", "")): any_value(draw, depth + 1)
            for _ in range(draw.randrange(3))}


def any_config(draw: random.Random) -> bytes:
    """The bytes of a config: good, nearly good, or anything."""
    names = [draw.choice(("AAHEAD", "t1", "ß", "ﬀ", "İ", "_0", "ſ"))
             for _ in range(draw.randrange(3))]
    value = {"Exclude": names} if draw.random() < 0.3 else (
        {"Exclude": any_value(draw)} if draw.random() < 0.5 else any_value(draw))
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    raw = text.encode(draw.choice(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "utf-32", "utf-7")),
                      "surrogatepass")
    game = draw.random()
    if game < 0.3:
        spoiled = bytearray(raw)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(spoiled) + 1)
            spoiled[at:at + draw.randrange(3)] = bytes(
                draw.choice((0x22, 0x7B, 0x5B, 0x5D, 0x2C, draw.randrange(256)))
                for _ in range(draw.randrange(3)))
        raw = bytes(spoiled)
    elif game < 0.4:
        raw = bytes(draw.randrange(256) for _ in range(draw.randrange(60)))
    elif game < 0.45:
        raw = draw.choice((b"[", b'{"Exclude":', b'{"a":[')) * draw.choice((10, 100000))
    elif game < 0.5:
        raw = b'{"Exclude": %s}' % (b"9" * draw.choice((5, 5000)))
    elif game < 0.55:
        raw = raw[:-1] + b', "Exclude": ["T1"]}'
    return raw


def exclusions(raw: bytes) -> Optional[List[str]]:
    """What a config leaves out, None if it is none."""
    def take(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        names = [key for key, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=take)
    except (ValueError, RecursionError):
        return None
    keys = list(value) if isinstance(value, dict) else ["?"]
    found = value.get("Exclude", []) if isinstance(value, dict) else None
    good = isinstance(found, list) and all(isinstance(each, str) and each for each in found)
    return found if good and set(keys) <= {"Exclude"} else None


# ---- Answers ---------------------------------------------------------------------------------

ROW = '{"ResultSet": {"Result": [%s]}}'
HERE, THERE = "/data/prearchive/projects/", "/20200102_101500000/"
ROWS = tuple((ROW % rows).encode() for rows in (
    "", "{}", "7", "null", "[]", '{"ID": null}', '{"ID": "1"}, 5', '{"id": {"a": []}}',
    '{"ID": "1", "label": "DICOM", "file_count": "2"}', '{"label": "DICOM", "file_count": "0"}',
    '{"ID": "../..", "label": "DICOM", "file_count": "99"}', '{"status": "READY"}',
    '{"ID": "1", "label": "DICOM", "file_count": "²"}', '{"status": "ERROR"}', '{"label": 5}',
    '{"ID": "BRAIN"}', '{"id": "brain"}', '{"label": "001_s"}, {"label": "002_s"}',
)) + (b'{"ResultSet": []}', b'{"ResultSet": {"Result": {}}}', b'{"ResultSet": {"Result": "x"}}',
      b'{"ResultSet": null}', b"null", b"[]", b"7", b"[" * 5000, b"", b"{", b"\xff", b"9" * 5000)
ADDRESSES = tuple("".join(words).encode() for words in (
    (HERE, "BRAIN", THERE, "001_s"), (HERE, "BRAIN", THERE, "002_s", "\r\n"), (HERE, "BRAIN"),
    (HERE, "OTHER", THERE, "001_s"), (HERE, "BRAIN", THERE, "else"), ("\r\n",), ("OK",), ("<b>",),
    (HERE, "BRAIN", THERE, "001_s\r\n", HERE, "BRAIN", THERE, "001_s"), (" ",), ("<html>login",),
    (HERE, "BRAIN", THERE, "001_s\r\n", HERE, "BRAIN/2/001_s"), ("http://x", HERE, "BRAIN", THERE,
                                                                  "001_s"), ("<html>ok</html>",),
    ("/data/archive/projects/BRAIN/subjects/001/experiments/001_s",),
    ("/data/archive/projects/BRAIN/subjects/../experiments/?#",)))
PROJECT = tuple(('{"items": %s}' % items).encode() for items in (
    '[{"data_fields": {"ID": "BRAIN"}}]', '[{"data_fields": {"ID": "OTHER"}}]', "[]", "{}", "null",
    '[{"data_fields": {"ID": null}}]', '[{"data_fields": []}]', "[7]", '[{"data_fields": 7}]',
    '[{"data_fields": {"ID": "\\ud800"}}]', '[{"data_fields": {"ID": "\\n"}}]', "7", '"x"'))
VERSION = (b'{"version": "1.7"}', b'{"version": 18}', b'{"version": null}', b"[]", b"null", b"7",
           b'{"version": "1.8.%s"}' % (b"9" * 5000), b"[" * 5000, b"{}")
PLACES: Tuple[Tuple[str, Tuple[bytes, ...]], ...] = (  # a request, and what nearly fits it
    ("POST /data/JSESSION", (b"", b"<html>", b"a b", b"x" * 201, b"zzz\n", b"\xff")),
    ("GET /xapi/siteConfig/buildInfo", VERSION), (r"GET /data/projects/BRAIN\?", PROJECT),
    (r"GET /data/projects\?.*permissions", ROWS), (r"GET /data/projects/BRAIN/subjects\?", ROWS),
    (r"GET /data/projects/BRAIN/experiments\?", ROWS), ("prearchive_code", VERSION),
    *(("services/import", ADDRESSES),) * 6, *(("action=commit", ADDRESSES),) * 3,
    *((r"GET .*/scans\?", ROWS),) * 2, *((r"GET .*/resources\?", ROWS),) * 2,
    *(("GET /data/prearchive", ROWS),) * 2, ("DELETE", ADDRESSES))
WORDS = (b"/data/prearchive/projects/BRAIN/20200102_101500000/001_s", b"\r\n", b"\n", b" ",
         b"/data/prearchive/projects/OTHER/20200102_101500000/001_s", b"<html>", b"login", b"<h3>",
         b"/data/archive/projects/BRAIN/subjects/001/experiments/001_s", b'{"ResultSet":',
         b'{"ResultSet": {"Result": []}}', b'{"ResultSet": {"Result": [{}]}}', b"null", b"[1, 2]",
         b'{"ResultSet": {"Result": [{"id": null, "status": 7, "file_count": "-3", "label": 1}]}}',
         b'{"ResultSet": {"Result": [{"ID": "1", "label": "DICOM", "file_count": "2"}]}}',
         b'{"items": [{"data_fields": {"ID": "BRAIN"}}]}', b'{"items": [{"data_fields": {}}]}',
         b'{"items": [7]}', b'{"version": 18}', b'{"version": null}', b'"x"', b"5", b"-0", b"NaN",
         b"\xff\xfe\0", b"<!DOCTYPE html>", b"&#0;&#55555;&#1114112;", b"[" * 5000, b"9" * 5000,
         b"Concurrent file sends", b"\x1b]0;x\x07", b"x" * 70000, b"%s%n{}", b"HTTP/1.1 200 OK")
HEADERS = (("Location", "/app/template/Login.vm"), ("Location", "https://127.0.0.1/x"),
           ("Location", "http://["), ("Location", "\u00ff"), ("Retry-After", "99999999999999"),
           ("Retry-After", "-1"), ("Retry-After", "Wed, 21 Oct 2026 07:28:00 GMT"),
           ("Set-Cookie", "JSESSIONID=zzz"), ("Set-Cookie", 'JSESSIONID=";\\'),
           ("Content-Encoding", "gzip"), ("Transfer-Encoding", "chunked"), ("X", "y" * 9000),
           ("Content-Type", "text/html"), ("Connection", "close"), ("Content-Length", "7"))


def any_body(draw: random.Random) -> bytes:
    """What a server might say, in some order."""
    return b"".join(draw.choice(WORDS) for _ in range(draw.choice((0, 1, 1, 1, 2, 4))))


def any_faults(draw: random.Random, counts: bool) -> List[Fault]:
    """One to five requests that are answered with anything, or with what nearly fits; those for
    `counts` only if that is said."""
    faults = []
    for _ in range(draw.randint(1, 5)):
        where, near = draw.choice(PLACES)
        if not counts and re.search("scans|resources", where):
            continue
        status = draw.choice((200, 200, 201, 204, 301, 302, 400, 401, 403, 404, 409, 413, 500,
                              502, 503, 504, draw.randint(200, 999)))
        kind, body = draw.choice((
            "garbage", "close", "reset before", "reset after", "empty", "truncate", "late status",
            "login page", "extra line", "other project", "close after", "drop sessions")), b""
        if draw.random() < 0.6:
            kind, body, status = "answer", draw.choice(near), draw.choice((200, 200, 301, status))
        elif draw.random() < 0.6:
            kind, body = "answer", any_body(draw)
        faults.append(Fault(
            kind, where, times=draw.choice((1, 1, 2, None)), status=status, body=body,
            skip=draw.choice((0, 0, 1, 2)),
            headers=tuple(draw.sample(HEADERS, draw.choice((0, 0, 0, 0, 1, 2))))))
    return faults


class Noise:
    """A server that answers each connection with bytes of its own choice."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.sent: List[bytes] = []
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(50)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve)

    def __enter__(self) -> "Noise":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                connection.recv(65536)
                self.sent.append(self.noise())
                connection.sendall(self.sent[-1])

    def noise(self) -> bytes:
        """An answer, more or less."""
        draw = self.draw
        line = draw.choice((b"HTTP/1.1 %d OK" % draw.randint(0, 1100), b"HTTP/1.1 200", b"HTTP/9 1",
                            b"HTTP/1.0 200 OK", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK",
                            b"", b"SSH-2.0", b"HTTP/1.1 -5 x", b"\x16\3\1\2\0", b"HTTP/2 200"))
        headers = b"".join(b"%s: %s\r\n" % (name.encode(), value.encode("latin-1"))
                           for name, value in draw.sample(HEADERS, draw.randrange(4)))
        whole = line + b"\r\n" + headers + b"\r\n" + any_body(draw) + b"!"  # never a session id
        return whole[:draw.randrange(len(whole))] if draw.random() < 0.3 else whole


# ---- Playing ---------------------------------------------------------------------------------

Game = Callable[[int], None]


class Fuzz(FuzzTest):

    def play(self, game: str) -> None:
        """Play as many seeds as time allows, or those that are asked for."""
        chosen = re.findall(r"\d+", os.environ.get("DICOMUPLOAD_TEST_SEED", ""))
        end = time.monotonic() + SECONDS[game]
        for seed in map(int, chosen) if chosen else itertools.count(1):
            try:
                getattr(self, f"play_{game}")(seed)
            except BaseException:
                print(f"\nLost with DICOMUPLOAD_TEST_SEED={seed} in the game of {game}",
                      file=sys.stderr, flush=True)
                raise
            if not chosen and time.monotonic() > end:
                break

    def test_random_trees_arrive_or_are_told(self) -> None:
        self.play("trees")

    def test_random_configs_are_kept_or_refused(self) -> None:
        self.play("configs")

    def test_random_answers_never_make_it_say_what_is_not_so(self) -> None:
        self.play("answers")


class WhatItFound(FuzzTest):
    """What was once found, the smallest way to see it."""

    def two_files(self) -> None:
        write_series(self.root / "007" / "pre" / "S_0001", study=uid("found"), files=2)

    def test_a_version_number_without_end_is_no_version(self) -> None:
        self.two_files()
        body = b'{"version": "1.8.%s"}' % (b"9" * 5000)  # Python reads no such number
        with self.xnat(faults=[Fault("answer", "buildInfo", status=200, body=body)]) as server:
            self.assertEqual(self.upload(server).status, 0)

    def test_a_count_that_is_no_number_is_not_believed(self) -> None:
        self.two_files()
        for count in "\u00b2", "9" * 5000, "-2", "2.0":  # a raised 2 is a digit, but no number
            with self.subTest(count[:9]), self.xnat() as server:
                server.fail("answer", r"GET .*/resources\?", status=200, body=(
                    ROW % '{"label": "DICOM", "cat_id": "1", "file_count": "%s"}' % count).encode())
                ran = self.upload(server, "--workdir", str(self.folder / count[:9]))
                self.assertEqual(ran.status, 0, ran.text)
                self.assertIn("2 files verified", ran.out)

    def test_a_rate_beyond_all_numbers_is_refused(self) -> None:
        self.two_files()
        ran = self.run_command(self.arguments("http://127.0.0.1:1", "--dry-run", "--limit-rate",
                                              "9" * 400))
        self.assertEqual(ran.status, 2, ran.text)
        self.assertIn("--limit-rate", ran.err)


def main(seconds: float, first: int, games: List[str]) -> int:
    """Play on for so long, and print what is found; the number of seeds lost."""
    end, lost, played = time.monotonic() + seconds, 0, 0
    for seed in itertools.count(first):
        for game in games:
            if time.monotonic() > end:
                print(f"{played} games played, {lost} lost")
                return lost
            played += 1
            try:
                with alone(FuzzTest()) as fuzz:
                    getattr(fuzz, f"play_{game}")(seed)
            except Exception:
                lost += 1
                print(f"--- {game} {seed} LOST\n{traceback.format_exc()}", flush=True)
    return lost


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(bool(main(float(sys.argv[1]), int(sys.argv[2]),
                           sys.argv[3:] or list(SECONDS))))
    unittest.main()
