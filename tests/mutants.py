"""Which lines of dicomUpload.py could be wrong without a test noticing?

    python3 -m tests.mutants [HOW-MANY [SEED [SECTION...]]]

changes one decision of the program at a time (a comparison, a boundary, a condition, an exit
status, a removed call, a dropped raise) in a copy of this folder, and runs the tests that belong
to its section there, variations and all, once they have passed without a change. What survives is
printed with its line: read it, and add a test, or take out what has no effect. Run by hand; it
takes minutes to hours.
"""
import ast
import copy
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent
SECTIONS: Dict[str, str] = {  # the tests of each section, those that notice most first
    "words": "words options telling", "tree": "header walk read",
    "packing": "level packing speed upload", "curl": "curl send meet",
    "meanings": "meanings send commit",
    "xnat": "meet compare commit send", "ledger": "ledger compare commit upload",
    "upload": "compare commit send speed upload read",
    "telling": "words telling upload readme packing",
    "options": "options meet walk", "main": "options meet upload telling walk ledger",
}
OPPOSITE = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
            ast.GtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
            ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub,
            ast.Sub: ast.Add}


class Mutant(NamedTuple):
    """One change, told and done."""

    line: int
    what: str
    tree: ast.Module


def changed(node: ast.AST) -> Optional[str]:
    """Change one decision in place; what was done, or None if there is none to change."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITE:
        node.ops[0] = OPPOSITE[type(node.ops[0])]()
        return f"comparison is now {type(node.ops[0]).__name__}"
    if isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in OPPOSITE:
        node.op = OPPOSITE[type(node.op)]()
        return f"operator is now {type(node.op).__name__}"
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return "condition is turned round"
    if isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
        return f"{node.value - 1} is now {node.value}"
    return None


def droppable(node: ast.AST) -> Iterator[Tuple[str, int]]:
    """Where in this node's blocks a raise stands, or a call whose result nobody wants."""
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        for at, each in enumerate(block if isinstance(block, list) else []):
            call = isinstance(each, ast.Expr) and isinstance(each.value, ast.Call)
            if isinstance(each, ast.Raise) or call:
                yield name, at


def mutants(source: str, seed: int) -> Iterator[Mutant]:
    """All mutants of the program, in an order drawn by `seed`."""
    places: List[Tuple[int, str, int]] = []  # a node; of what to drop, the block and the place
    for number, node in enumerate(ast.walk(ast.parse(source))):
        places += [(number, *drop) for drop in droppable(node)]
        places += [(number, "", 0)] * bool(changed(copy.deepcopy(node)))
    random.Random(seed).shuffle(places)
    for number, block, at in places:
        tree = ast.parse(source)
        node = next(itertools.islice(ast.walk(tree), number, None))
        if block:
            dropped = getattr(node, block)[at]
            getattr(node, block)[at] = ast.copy_location(ast.Pass(), dropped)
            line, what = dropped.lineno, "is left out"
        else:
            line, what = getattr(node, "lineno", 0), changed(node) or ""
        yield Mutant(line, what, ast.fix_missing_locations(tree))


def section_of(source: str, line: int) -> str:
    """The section of the program in which this line stands."""
    above = re.findall(r"(?m)^# ---- (\w+) -", "\n".join(source.splitlines()[:line]))
    return above[-1] if above else "words"


def hear_signals() -> None:
    """In a child, before exec: under nohup, or behind a shell's &, some would be ignored."""
    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)


def passes(folder: Path, program: str, modules: Dict[str, float]) -> bool:
    """Whether the tests of these modules find nothing wrong with it, each in so many seconds."""
    (folder / "dicomUpload.py").write_text(program, encoding="utf-8")
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", DICOMUPLOAD_TEST_VARIATIONS="1")
    for module, seconds in modules.items():
        if not (folder / f"tests/test_{module}.py").exists():
            continue
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "unittest", "-f", f"tests.test_{module}"], cwd=folder,
                env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                timeout=seconds, preexec_fn=hear_signals)
        except subprocess.TimeoutExpired:
            return False
        if ended.returncode:
            return False
    return True


def main() -> int:
    """Draw, try two at a time, tell; 1 if any survived, 2 if they could not be tried."""
    many, seed = (int(each) for each in (sys.argv[1:3] + ["150", "1"][len(sys.argv[1:3]):]))
    wanted = sys.argv[3:]  # sections
    source = (ROOT / "dicomUpload.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    if not set(wanted) <= set(SECTIONS):
        print(f"a section is one of {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    drawn = itertools.islice((each for each in mutants(source, seed) if not wanted or
                              section_of(source, each.line) in wanted), many)
    lock, alive = threading.Lock(), []
    seconds: Dict[str, float] = {}  # that each module may take

    def copied(folder: Path) -> Path:
        skipped = shutil.ignore_patterns(".git", "work", "__pycache__")
        return shutil.copytree(ROOT, folder, ignore=skipped)

    def work(folder: Path) -> None:
        while True:
            with lock:
                mutant = next(drawn, None)
            if mutant is None:
                return
            section = section_of(source, mutant.line)
            lives = passes(folder, ast.unparse(mutant.tree),
                           {each: seconds[each] for each in SECTIONS[section].split()})
            alive.extend([mutant] * lives)
            print(f"{'SURVIVES' if lives else 'caught  '} {section} line {mutant.line}: "
                  f"{mutant.what}: {lines[mutant.line - 1].strip()}", flush=True)

    with tempfile.TemporaryDirectory(prefix="dicomUpload-mutants-") as name:
        folders = [copied(Path(name, str(at))) for at in range(2)]
        unchanged = ast.unparse(ast.parse(source))
        for module in {each for section in wanted or SECTIONS
                       for each in SECTIONS[section].split()}:
            began = time.monotonic()  # what fails, or is too slow, anyway would catch every mutant
            if not passes(folders[0], unchanged, {module: 600}):
                print(f"tests.test_{module} fails without a mutant: no use", file=sys.stderr)
                return 2
            seconds[module] = 60 + 4 * (time.monotonic() - began)
        workers = [threading.Thread(target=work, args=(each,)) for each in folders]
        for each in workers:
            each.start()
        for each in workers:
            each.join()
    print(f"{many - len(alive)} of {many} caught, {len(alive)} survived")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
