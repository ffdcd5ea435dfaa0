"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

LEAST = {"cai_cli.data": 10, "cai_cli.metrics": 10}


@pytest.mark.parametrize("name", LEAST)
def test_every_example_of_the_package_runs_and_there_are_enough(name: str) -> None:
    package = importlib.import_module(name)
    modules = [importlib.import_module(f"{name}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    results = [doctest.testmod(module) for module in modules]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) >= LEAST[name]
