"""What the README says is what the program does."""

import ast
import re
import sys
from dataclasses import fields
from pathlib import Path

import dicomUpload
from tests import picture
from tests.dicom import README_TREE, readme_tree
from tests.support import EXCLUSIONS, ROOT, SCRIPT, UploadTest, variation
from tests.support import load_tests as load_tests  # several at a time

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list:
    """The fenced blocks of the README."""
    return re.findall(r"^```\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def drawn_paths(drawing: str) -> list:
    """The lowest folders of a tree drawn with box characters."""
    above: dict = {}
    paths = []
    for line in drawing.splitlines()[1:]:
        found = re.match(r"([│├└─\s]*)(\S.*)$", line)
        depth = len(found[1]) // 4
        above[depth] = found[2]
        if depth == 3:
            paths.append("/".join(above[level] for level in (1, 2, 3)))
    return paths


def words_of_the_code() -> list:
    """Every text in the program, with … for what it fills in."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…"
                                 for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def alike(line: str) -> str:
    """A line of a run without what differs from run to run."""
    line = re.sub(r"\d[\d,.]* (bytes|kB|MB|GB)(/s)?", "SIZE", line)
    line = re.sub("level [01]", "level N", line)
    return re.sub(r" +", " ", re.sub(r"\d+(\.\d)? s\b|_\d{8}-\d{6}-\d{3}", "TIME", line))


class Readme(UploadTest):
    @variation
    def test_the_picture_of_a_run_is_what_a_run_shows_now(self) -> None:
        drawn, made = (sorted(alike(line) for line in text.splitlines() if line[:1] != "[")
                       for text in (picture.BLOCK.findall(README)[0], picture.picture()))
        self.assertEqual(drawn, made)
        self.assertRegex(README, r"(?m)^\[\d of 4 sessions  .* MB  .*  about .* left\]  \S+")

    def test_it_can_be_read_in_ten_minutes(self) -> None:
        self.assertLessEqual(len(README.splitlines()), 320)
        prose = re.sub(r"(?ms)^```.*?^```$|^\|.*?$", "", README)
        self.assertLessEqual(len(prose.split()), 1800)

    def test_what_goes_wrong_is_told_in_the_words_of_the_code(self) -> None:
        section = README.partition("## When something goes wrong")[2].partition("\n## ")[0]
        rows = re.findall(r"(?m)^\| (`.+?`) \| (.+?) \| (.+?) \|$", section)
        self.assertGreater(len(rows), 20)
        texts = words_of_the_code()
        messages = [message for row in rows for message in re.findall("`([^`]+)`", row[0])]
        for message in messages:
            with self.subTest(message):
                self.assertTrue(any(message in text for text in texts), "not in the code")
        for each in dicomUpload.MEANINGS:
            if not re.match("run again( later)?$", each.to_do):  # nothing to look up
                with self.subTest(each.sign):
                    said = f"{each.means}: {each.to_do}"
                    self.assertTrue(any(message in said for message in messages), said)

    def test_the_options_in_the_readme_are_those_of_the_help(self) -> None:
        section = README.partition("| option | meaning")[2].partition("\n\n")[0]
        told = re.findall(r"(?m)^\| `(-.*?)` \| (.*) \|$", section.replace("\\|", "|"))
        wanted = []
        for each in fields(dicomUpload.Settings):
            if each.metadata.get("flags"):
                name = ", ".join(each.metadata["flags"])
                wanted.append((f"{name} {each.metadata.get('metavar') or ''}".strip(),
                               each.metadata["help"] % {"default": each.metadata.get("default")}))
        self.assertEqual(told, wanted)
        ran = self.run_command([sys.executable, str(SCRIPT), "--help"])
        words = " ".join(ran.out.split())
        for name, text in wanted:
            self.assertIn(" ".join(name.split()), words)
            self.assertIn(" ".join(text.split()), words.replace("- ", "-"), name)

    def test_the_columns_of_the_report_in_the_readme_are_those_of_a_report(self) -> None:
        section = README.partition("| column | what it is |")[2].partition("\n\n")[0]
        told = [name for row in re.findall(r"(?m)^\| (`.*?`) \|", section)
                for name in re.findall("`(.*?)`", row)]
        nobody = dicomUpload.Outcome(dicomUpload.Session("", ""), [])
        self.assertEqual(sorted(told), sorted(dicomUpload.row_of(
            nobody, dicomUpload.Series("", ""))))

    def test_help_fits_into_80_columns(self) -> None:
        ran = self.run_command([sys.executable, str(SCRIPT), "--help"], {"COLUMNS": "80"})
        self.assertEqual([line for line in ran.out.splitlines() if len(line) > 80], [])

    def test_the_tree_in_the_readme_is_the_tree_of_the_demo(self) -> None:
        drawing = next(block for block in blocks() if block.startswith("dicomdir\n"))
        self.assertEqual(sorted(drawn_paths(drawing)), sorted(README_TREE))

    def test_the_demo_shows_the_tree_in_the_server(self) -> None:
        self.assertIn("python3 tests/demo.py\npython3 -m unittest\n", blocks())
        ran = self.run_command([sys.executable, str(ROOT / "tests/demo.py")])  # from any folder
        self.assertEqual(ran.status, 0, ran.text)
        for label in ("007_post", "007_pre", "008_post", "008_pre"):
            self.assertRegex(ran.out, rf"(?m)^{label} .*archived, \d+ files verified$")
        server = ran.out.partition("holds now:")[2]
        self.assertIn("T1-MPRAGE_0011", server)
        self.assertNotIn("JJWANGS", server)
        self.assertNotIn("AAHEAD", server)

    def test_the_call_of_the_original_works_word_for_word(self) -> None:
        call = next(block for block in blocks() if block.startswith("python dicomUpload.py $URL"))
        self.assertEqual(call, "python dicomUpload.py $URL $USER $PASS $PROJECT $ROOTDIR "
                               "--config $CONFIG\n")
        readme_tree(self.root, files=2)
        tools = self.folder / "bin"
        tools.mkdir()
        (tools / "python").symlink_to(sys.executable)
        for name in (SCRIPT, EXCLUSIONS):
            (self.folder / name.name).symlink_to(name)
        with self.xnat() as server:
            ran = self.run_command(["bash", "-c", f"export PATH={tools}:$PATH\n{call}"], {
                "URL": server.url, "USER": "alice", "PASS": "s3cret", "PROJECT": "BRAIN",
                "ROOTDIR": "dicomdir", "CONFIG": "Exclusions.json"})
            self.assertEqual(ran.status, 0, ran.text)
            self.assertEqual(len(server.stored("007_pre")), 4)
            self.assertEqual(len(server.stored("007_post")), 2)

    def test_every_exit_status_stands_in_docstring_help_and_readme(self) -> None:
        docstring = SCRIPT.read_text(encoding="utf-8").split('"""')[1]
        ran = self.run_command([sys.executable, str(SCRIPT), "--help"])
        for place in (docstring, ran.out, README):
            words = " ".join(place.replace("|", " ").split())
            for meaning in ("0 all is there (or left out on purpose)",
                            "1 some series or sessions failed, or are gone here; after a dry run "
                            "also: some of it is missing on the server",
                            "2 wrong options, ROOTDIR or config, nothing sent",
                            "3 could not start or had to stop (no zip, no curl, server unreachable,"
                            " login refused, no right to the project, workdir in use or full, the"
                            " server refuses everything)",
                            "130, 143 stopped by a signal"):
                self.assertIn(meaning, words)

    def test_the_exclusions_in_the_readme_are_the_file(self) -> None:
        self.assertIn(f"```\n{EXCLUSIONS.read_text(encoding='utf-8').strip()}\n```", README)

    def test_only_what_is_on_the_card_lies_at_the_top(self) -> None:
        card = {"dicomUpload.py", "Exclusions.json", "runupload.sh", "runuploadDocker.sh",
                "Dockerfile", "tests", "README.md"}
        seen = {path.name for path in Path(ROOT).iterdir() if not path.name.startswith(".")}
        self.assertEqual(card - seen, set())
        self.assertEqual(seen - card - {"__pycache__", "work"}, set())

    def test_the_image_has_the_version_of_the_program(self) -> None:
        text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
        self.assertIn(f'image.version="{dicomUpload.VERSION}"', text)
