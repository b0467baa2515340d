"""--compression auto: which level the next part is zipped at, by what the run has measured.

A machine of numbers stands for the real one: zips share its cores, POSTs its line.
"""

import contextlib
import itertools
import unittest
from typing import Any, Iterator, List, NamedTuple

from dicomUpload import AUTO, Level
from tests.support import WHOLE

MB = 10 ** 6


class Machine(NamedTuple):
    """What a run meets. `line` and `shrinks` may depend on the number of the part."""

    line: Any                 # MB a second
    shrinks: Any = 0.47       # what level 1 leaves of a byte
    imports: float = 0        # seconds of XNAT's own for a part
    cores: int = 2
    procs: int = 4
    part: int = 4             # MB, in the mean: from half to one and a half, as series differ
    zips: Any = (600.0, 50.0)  # MB a second that one core takes at level 0, at level 1
    posts: float = 1e6        # MB a second that one core puts on the line


class Run:
    """One run in a clock of its own: what level each part took, and when all were there."""

    def __init__(self, machine: Machine, level: int = AUTO, parts: int = 100) -> None:
        self.machine = machine
        self.seconds = 0.0
        self.levels: List[int] = []
        self.level = Level(level, lambda: self.seconds, patience=0)
        self._at = [""] * parts
        self._left = [0.0] * parts  # MB or seconds of what a part is at
        steps = [self._part(part) for part in range(parts)]
        waiting, room, slots = iter(range(parts)), 2 * machine.procs, machine.procs
        going: List[int] = []
        packed: List[int] = []
        while True:
            begun = list(itertools.islice(waiting, room)) + packed[:slots]
            room -= len(begun) - len(packed[:slots])
            slots, packed = slots - len(packed[:slots]), packed[slots:]
            for part in begun:
                next(steps[part])
            going += begun
            if not going:
                break
            part = self._let_go_on(going)
            stage = self._at[part]
            next(steps[part], None)
            if stage == "packing":
                packed.append(part)
            elif stage == "importing":
                room, slots = room + 1, slots + 1
            if stage != "on the line":
                going.remove(part)

    def _let_go_on(self, going: List[int]) -> int:
        """Until the first of them is over with what it is at: which one."""
        speeds = {part: self._speed(part, going) for part in going}
        first = min(going, key=lambda part: self._left[part] / speeds[part])
        took = self._left[first] / speeds[first]
        self.seconds += took
        for part in going:
            self._left[part] -= took * speeds[part]
        return first

    def _speed(self, part: int, going: List[int]) -> float:
        machine, at = self.machine, self._at[part]
        if at == "importing":
            return 1
        posting, packing = (sum(self._at[each] == what for each in going)
                            for what in ("on the line", "packing"))
        even = min(1, machine.cores / (posting + packing))  # of a core, for each
        need = min(1.0, of(machine.line, part) / machine.posts / max(1, posting))
        if at == "packing":  # what the others leave
            return machine.zips[self.levels[part]] * min(
                1, max(even, (machine.cores - posting * need) / packing))
        return machine.posts * min(need, max(even, (machine.cores - packing) / posting))

    def _part(self, part: int) -> Iterator[None]:
        machine, megabytes = self.machine, self.machine.part * (0.5 + part * 37 % 101 / 100)
        count = round(megabytes * MB)
        level = self.level.choose(count)
        self.levels.append(level)
        self._at[part], self._left[part] = "packing", megabytes
        with self.level.at(f"packing {level}", count):
            yield
        made = round(count * of(machine.shrinks, part)) if level else count
        self.level.learn(f"zipped {level}", made, count)
        with self.level.at("waiting", made):
            yield
            with self.level.at("posting", made):
                self._at[part], self._left[part] = "on the line", made / MB
                yield
                self._at[part], self._left[part] = "importing", machine.imports
                yield


def of(value: Any, part: int) -> float:
    return float(value(part) if callable(value) else value)


def shown(levels: List[int]) -> str:
    return "".join(map(str, levels))


class LevelTest(unittest.TestCase):

    def test_auto_is_within_a_tenth_of_the_better_of_0_and_1_on_usual_lines_and_servers(
            self) -> None:
        """Those whose line is as fast as the disk may be over it: many parts are packed before the
        first answer tells."""
        table = [Machine(line) for line in (1, 2.5, 12.5, 30, 50, 62, 80, 100, 125, 250)]
        table += [Machine(line, imports=seconds) for line in (2.5, 12.5, 125, 1000)
                  for seconds in (0.16, 1.6)]
        table += [Machine(line, 1.0) for line in (2.5, 12.5, 125)]
        table += [Machine(line, cores=cores) for line in (12.5, 125) for cores in (1, 4, 16)]
        table += [Machine(line, procs=procs) for line in (12.5, 80, 125) for procs in (1, 2, 16)]
        table += [Machine(line, part=part) for line in (12.5, 125) for part in (1, 70)]
        table += [Machine(1000, posts=250, zips=(330.0, 50.0), cores=cores) for cores in (1, 2, 4)]
        # A share gives the files no sooner than that, at either level.
        table += [Machine(12.5, zips=(25.0, 22.0), procs=procs) for procs in (1, 2, 4)]
        for machine in table if WHOLE else table[::3]:
            with self.subTest(machine=machine):
                auto = Run(machine, parts=200)
                better = min(Run(machine, level, 200).seconds for level in (0, 1))
                self.assertLess(auto.seconds, 1.10 * better, shown(auto.levels))

    def test_between_the_two_a_mix_is_faster_than_either(self) -> None:
        machine = Machine(100)
        better = min(Run(machine, level).seconds for level in (0, 1))
        self.assertLess(Run(machine).seconds, 0.85 * better)

    def test_packing_is_not_free_while_all_wait_for_the_processors_and_not_for_the_line(
            self) -> None:
        # Seconds that a GB took on two cores: at level 0, at level 1, on the line; what to do
        # while seven zips wait.
        for storing, zipping, posting, wanted in ((4.3, 11.3, 4.9, 0), (3.3, 14.0, 4.3, 0),
                                                  (3.3, 12.0, 8.6, 1), (0.5, 12.0, 4.3, 1)):
            level = Level(AUTO, patience=0)
            level.choose(MB)
            for what, value in (("packing 0", storing), ("packing 1", zipping),
                                ("zipped 1", 470 * MB), ("posting", posting)):
                level.learn(what, value, 1000 * MB)
            with contextlib.ExitStack() as waiting:
                for _ in range(7):
                    waiting.enter_context(level.at("waiting", 4 * MB))
                self.assertEqual(level.choose(4 * MB), wanted, (storing, posting))

    def test_a_level_that_nobody_has_tried_yet_is_tried_once_in_a_while(self) -> None:
        level = Level(AUTO, patience=0)
        for what, value in (("packing 0", 40.0), ("posting", 80.0)):  # a share, a slow line
            level.learn(what, value, 1000 * MB)
        with contextlib.ExitStack() as waiting:
            for _ in range(3):
                waiting.enter_context(level.at("waiting", 4 * MB))
            self.assertEqual([part for part in range(40) if level.choose(4 * MB)], [0, 16, 32])
            level.learn("packing 1", 42.0, 1000 * MB)  # it is the share that takes its time
            level.learn("zipped 1", 470 * MB, 1000 * MB)
            self.assertEqual([level.choose(4 * MB) for _ in range(20)], [1] * 20)

    def test_on_a_slow_line_all_but_the_first_part_take_1_and_it_does_not_flutter(self) -> None:
        for line in (1, 2.5, 12.5):
            self.assertEqual(shown(Run(Machine(line)).levels), "0" + "1" * 99)

    def test_on_a_fast_line_all_parts_take_0_once_an_answer_has_come(self) -> None:
        self.assertEqual(shown(Run(Machine(1000)).levels), "01111111" + "0" * 92)

    def test_it_follows_a_line_that_changes_once_the_parts_on_their_way_are_through(self) -> None:
        for before, after, last in ((1000, 2.5, "1"), (2.5, 1000, "0")):
            levels = Run(Machine(lambda part, before=before, after=after: (
                before if part < 50 else after))).levels
            # A small part may go at 1 while many bytes wait: it costs nothing then.
            self.assertGreaterEqual(shown(levels)[70:].count(last), 27, shown(levels))

    def test_images_that_do_not_shrink_settle_on_0_with_a_look_where_it_costs_nothing(self) -> None:
        for line, least in ((2.5, 80), (12.5, 80), (125, 80), (1000, 92)):
            levels = Run(Machine(line, 1.0)).levels
            self.assertGreaterEqual(levels.count(0), least, shown(levels))

    def test_images_that_shrink_from_now_on_are_noticed_and_those_that_do_no_more(self) -> None:
        for shrinks, last in ((lambda part: 1.0 if part < 50 else 0.4, "1"),
                              (lambda part: 0.4 if part < 50 else 1.0, "0")):
            levels = Run(Machine(12.5, shrinks)).levels
            tail = shown(levels)[70:]
            self.assertGreaterEqual(tail.count(last), 25, shown(levels))

    def test_a_level_that_was_given_is_taken_whatever_is_measured(self) -> None:
        for level in (0, 1, 6, 9):
            chooser = Level(level)
            for _ in range(3):
                self.assertEqual(chooser.choose(MB), level)
            self.assertEqual(chooser.used, {level: 3})

    def test_what_failed_is_no_measurement_and_is_ahead_of_nobody(self) -> None:
        level = Level(AUTO)
        level.choose(MB)
        with self.assertRaises(OSError), level.at("waiting", MB), level.at("posting", MB):
            raise OSError("refused")
        self.assertEqual(level.choose(MB), 1)  # nothing is known yet, but that one part went first
        self.assertEqual(sum(level._going.values(), []), [])


if __name__ == "__main__":
    unittest.main()
