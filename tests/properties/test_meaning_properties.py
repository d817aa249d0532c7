"""A step's fingerprints follow the meaning of what it stands on, and nothing else (guarantees 1 and 9).

Generated notebooks: constants, functions, classes, instances, closures, decorators, partials and tables that use each
other. Each is looked at in one process as it was, and edited in another one with another hash seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdurable.checkpoint.manifest import Manifest
from nbdurable.checkpoint.plan import Verdict, decide
from tests.tools.facts import Elsewhere, Facts

USES = {"constant": "{}", "class": "{}().go()", "instance": "{}.go()", "table": "{}['x']()"}
CALLED = ("function", "closure", "decorated", "partial", "lambda")


@dataclass(frozen=True)
class Definition:
    """One definition, the names it uses, and the numbers that make out its meaning."""

    name: str
    kind: str
    uses: tuple[Definition, ...]
    numbers: tuple[int, int, int]

    def used(self) -> str:
        return USES.get(self.kind, "{}()").format(self.name)

    def reached(self) -> set[str]:
        return {self.name}.union(*(other.reached() for other in self.uses))

    def text(self) -> str:
        name, (one, two, three) = self.name, self.numbers
        sum_of = "".join(f" + {other.used()}" for other in self.uses)
        first = self.uses[0].name if self.uses else ""
        return {
            "constant": f"{name} = {one}",
            "function": f"def {name}(a={one}, *, b={two}):\n    return a - b * {three}{sum_of}",
            "class": f"class {name}:\n    limit = {one}\n\n    def go(self, by={two}):\n"
            f"        return self.limit - by * {three}{sum_of}",
            "instance": f"{name} = {first}()",
            "table": f"{name} = {{'x': {first}}}",
            "partial": f"from functools import partial\n{name} = partial({first})",
            "closure": f"def make_{name}(n):\n    def inner(a={two}):\n        return n - a * {three}{sum_of}\n"
            f"    return inner\n{name} = make_{name}({one})",
            "decorated": f"def twice_{name}(fn, by={two}):\n    def wrapper():\n        return {one} * fn() - by\n"
            f"    return wrapper\n@twice_{name}\ndef {name}():\n    return {three}{sum_of}",
            "lambda": f"{name} = lambda a={one}: a - {two} * {three}{sum_of}",
        }[self.kind]


@dataclass(frozen=True)
class Program:
    """Definitions in the order in which they stand, the sizes of cells, and what the step uses."""

    definitions: tuple[Definition, ...]
    ends: frozenset[int]  # definitions that end a cell
    wanted: tuple[Definition, ...]

    def cells(self, *, noisy: bool) -> list[str]:
        found: list[list[str]] = [[]]
        for index, one in enumerate(self.definitions):
            text = one.text()
            if noisy:
                text = "# moved\n\n" + text.replace("\n", "  # why\n").replace("return ", "return \\\n      ")
            found[-1].append(text)
            if index in self.ends:
                found.append([])
        return ["\n".join(cell) for cell in found]

    @property
    def step(self) -> str:
        return f"y = 0{''.join(f' + {one.used()}' for one in self.wanted)}"

    def edited(self, index: int, number: int) -> Program:
        """Return the program with one number of one definition changed."""
        old = self.definitions[index]
        numbers = tuple(n + 100 if i == number else n for i, n in enumerate(old.numbers))
        changed: dict[str, Definition] = {}
        for one in self.definitions:
            uses = tuple(changed[other.name] for other in one.uses)
            changed[one.name] = replace(one, uses=uses, numbers=numbers if one is old else one.numbers)
        wanted = tuple(changed[one.name] for one in self.wanted)
        return Program(tuple(changed.values()), self.ends, wanted)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    made: list[Definition] = []
    for index in range(draw(st.integers(2, 7))):
        callables = [one for one in made if one.kind in CALLED]
        classes = [one for one in made if one.kind == "class"]
        kinds = ["constant", "function", "class", "closure", "decorated", "lambda"]
        kinds += ["table", "partial"] if callables else []
        kinds += ["instance"] if classes else []
        kind = draw(st.sampled_from(kinds))
        if kind == "constant":
            uses: tuple[Definition, ...] = ()
        elif kind == "instance":
            uses = (draw(st.sampled_from(classes)),)
        elif kind in ("table", "partial"):
            uses = (draw(st.sampled_from(callables)),)
        else:
            uses = tuple(draw(st.lists(st.sampled_from(made), max_size=2))) if made else ()
        numbers = draw(st.tuples(*[st.integers(0, 9)] * 3))
        made.append(Definition(f"{kind}_{index}", kind, uses, numbers))
    wanted = tuple(draw(st.lists(st.sampled_from(made), min_size=1, max_size=2)))
    return Program(tuple(made), draw(st.frozensets(st.integers(0, 6))), wanted)


NUMBERS = {"constant": 1, "instance": 0, "table": 0, "partial": 0}  # that stand in its text; else all three


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Elsewhere, Elsewhere]]:
    folder = tmp_path_factory.mktemp("project")
    both = Elsewhere(1, folder), Elsewhere(2, folder)
    yield both
    for process in both:
        process.close()


def verdict(before: Facts, after: Facts) -> Verdict:
    recorded = Manifest(
        run_id="r", step="s", created_at=0.0, duration_s=0.0, code=before[0], inputs=before[1]
    )
    return decide(recorded, after[0], lambda: after[1], step="s", visited=False)


@settings(max_examples=150, deadline=None)
@given(program=programs(), data=st.data())
def test_a_step_runs_if_and_only_if_its_meaning_changed(
    program: Program, data: st.DataObject, processes: tuple[Elsewhere, Elsewhere]
) -> None:
    """Guarantees 1 and 9: also with comments and moved lines, in another process; and the reason names what changed."""
    first, second = processes
    before = first.facts(program.cells(noisy=False), program.step)
    same = verdict(before, second.facts(program.cells(noisy=True), program.step))
    assert same.action == "restore", same.reason
    places = [
        (index, number)
        for index, one in enumerate(program.definitions)
        for number in range(NUMBERS.get(one.kind, 3))
    ]
    if not places:
        return
    index, number = data.draw(st.sampled_from(places))
    name = program.definitions[index].name
    noisy = data.draw(st.booleans())
    edited = program.edited(index, number)
    found = verdict(before, second.facts(edited.cells(noisy=noisy), program.step))
    if name in set().union(*(one.reached() for one in program.wanted)):
        assert found.action == "execute", found.reason
        assert name in found.reason
        assert found.cause is not None
        assert found.cause.line
    else:
        assert found.action == "restore", found.reason
