"""The tests that `cai eval adherence` runs: those of the chosen principles of one constitution or several."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.constitution.draw import select
from cai_cli.constitution.principle_tests import PrincipleTests, Scenario, fingerprint_of, load_tests, select_tests
from cai_cli.constitution.schema import SHIPPED, CritiquePrinciple, PreferencePrinciple, load, shipped_directory
from cai_cli.prompting.adherence import adherence_criterion
from cai_cli.prompting.criteria import Criterion

Principle = CritiquePrinciple | PreferencePrinciple


@dataclass(frozen=True)
class ScenarioTest:
    """One scenario, and what the replies in it are judged by; `id` is `PRINCIPLE/NUMBER`, counted from 1."""

    id: str
    scenario: Scenario
    criterion: Criterion


@dataclass(frozen=True)
class TestSet:
    """The chosen principles with their tests.

    Attributes:
        principles: The principles that have tests, in order.
        tests: Their tests, by id.
        names: The names of the constitutions.
        files: The files that they come from.
    """

    __test__ = False  # not a class of tests, whatever pytest thinks of its name

    principles: Sequence[Principle]
    tests: dict[str, PrincipleTests]
    names: Sequence[str]
    files: Sequence[str]

    def scenarios(self, limit: int | None = None) -> list[ScenarioTest]:
        """The first `limit` scenarios, in the order of the principles."""
        every = (
            ScenarioTest(f"{p.id}/{number}", scenario, adherence_criterion(p, self.tests[p.id]))
            for p in self.principles
            for number, scenario in enumerate(self.tests[p.id].scenarios, start=1)
        )
        return list(islice(every, limit))

    def fingerprint(self) -> str:
        """The SHA-256 (hex) of the tests and of the texts that questions are derived from."""
        texts = "\n".join(adherence_criterion(p, self.tests[p.id]).text for p in self.principles)
        return sha256(f"{fingerprint_of(self.tests)}\n{texts}".encode()).hexdigest()

    def refuse_unreviewed(self, *, allowed: bool) -> None:
        """Raise CaiError (`unreviewed-tests`) for scenarios that nobody has read; only warn where they are allowed."""
        unread = [t.id for t in self.scenarios() if not t.scenario.reviewed]
        if not unread:
            return
        found = (
            f"{len(unread):,} of {len(self.scenarios()):,} scenarios are drafts that nobody has reviewed: {unread[0]}"
        )
        if allowed:
            console.warn(f"{found}, ...: the rates are those of unread tests")
            return
        raise CaiError(
            f"{found}, ...",
            hint="read each one, correct or delete it, and set `reviewed: true`; --unreviewed runs them as they are",
            code="unreviewed-tests",
        )


def constitutions(sources: Sequence[str] | None) -> list[Path]:
    """The files of `--constitution`; by default the shipped ones."""
    shipped = [shipped_directory() / name for name in SHIPPED.values()]
    return [Path(source) for source in sources] if sources else shipped


def chosen_principles(sources: Sequence[str] | None, ids: str | None, maximum: int | None) -> list[Principle]:
    """The principles of all files that `--principles` and `--max-principles` select.

    Raises:
        CaiError: As `load` and `select`; two files have a principle of the same id (`invalid-constitution`).
    """
    principles: list[Principle] = []
    for source in constitutions(sources):
        for principle in load(source).principles:
            if any(principle.id == other.id for other in principles):
                problem = f"{source}: principle id {principle.id!r} is also that of another file"
                raise CaiError(problem, code="invalid-constitution")
            principles.append(principle)
    return select(principles, ids, maximum)  # type: ignore[type-var]


def open_tests(sources: Sequence[str] | None, file: str | None, ids: str | None, maximum: int | None) -> TestSet:
    """The tests of the chosen principles.

    Args:
        sources: The files of `--constitution`; None for the shipped ones.
        file: The file of `--tests`, whose tests take the place of those that the constitutions name.
        ids: `--principles`.
        maximum: `--max-principles`.

    Raises:
        CaiError: As `chosen_principles` and `select_tests`; no chosen principle has tests (`missing-tests`).
    """
    chosen = chosen_principles(sources, ids, maximum)
    tests: dict[str, PrincipleTests] = {}
    names, files, known = [], [], set()
    for source in constitutions(sources):
        loaded = load(source)
        names.append(loaded.name)
        known |= {principle.id for principle in loaded.principles}
        files += [str(source), *([str(source.parent / loaded.tests)] if loaded.tests and not file else [])]
        tests |= {} if file else select_tests(loaded.principles, loaded.tests, source)
    if file:
        tests, files = load_tests(file), [*files, file]
        if unknown := sorted(tests.keys() - known):
            raise CaiError(
                f"{file}: tests of {unknown[0]!r}, which is no principle of {', '.join(names)}",
                hint=f"the principles are {', '.join(sorted(known)[:8])}",
                code="invalid-constitution",
            )
    without = [p.id for p in chosen if p.id not in tests]
    if len(without) == len(chosen):
        raise CaiError(
            f"no principle of {', '.join(names)} has tests",
            hint="cai eval adherence --draft MODEL writes some to review; docs/adherence.md describes the file",
            code="missing-tests",
        )
    if without:
        console.warn(f"{len(without):,} principles have no tests and are left out: {', '.join(without[:5])}")
    kept = [p for p in chosen if p.id in tests]
    return TestSet(kept, {p.id: tests[p.id] for p in kept}, names, files)
