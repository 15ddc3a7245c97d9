"""Dependencies point one way: the folders form an acyclic graph, and the mathematics depends on nothing."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest
from helpers.imports import FILES, folder_imports, folder_of, imports, imports_of, is_within

from hpc_c2g.distributed import environment

FOLDERS = folder_imports()
MATHEMATICS_MAY_IMPORT = (
    *("__future__", "collections", "contextlib", "copy", "dataclasses", "functools", "math", "operator", "typing"),
    *("torch", "hpc_c2g.errors", "hpc_c2g.kkt"),
)


def test_the_walk_sees_imports_of_every_form():
    source = """
import a.b
if TYPE_CHECKING:
    import types_only
def f():
    from c import d
    importlib.import_module("e.f")
from . import g
from ..h import i
"""
    assert imports(source, "p.q.m") == {"a.b", "c", "c.d", "e.f", "p.q", "p.q.g", "p.h", "p.h.i"}
    assert "types_only" in imports(source, "p.q.m", types_too=True)


def test_the_walk_sees_every_folder_and_the_dependencies_between_them():
    expected = {folder_of(file) for file in FILES.values()}
    assert {"hpc_c2g/kkt", "hpc_c2g/training/engines", "launch/_compose"} <= expected == FOLDERS.keys()
    assert "hpc_c2g/training/engines" in FOLDERS["hpc_c2g/training"]
    uses = FOLDERS["hpc_c2g/training"]["hpc_c2g/kkt"]
    assert any(use.startswith("hpc_c2g.training.trainer -> hpc_c2g.kkt.") for use in uses)


def test_the_folders_form_an_acyclic_graph():
    try:
        TopologicalSorter(FOLDERS).prepare()
    except CycleError as error:
        cycle = error.args[1][::-1]
        pytest.fail(
            "\n".join(
                f"{source} imports {target}: {', '.join(FOLDERS[source][target][:3])}"
                for source, target in pairwise(cycle)
            )
        )


def test_the_mathematics_depends_on_torch_and_the_error_type_alone():
    offenders = {
        module: found
        for module in FILES
        if module.startswith("hpc_c2g.kkt.")
        and (found := [n for n in imports_of(module, types_too=True) if not is_within(n, MATHEMATICS_MAY_IMPORT)])
    }
    assert offenders == {}


def test_nothing_imports_the_command_line():
    library = [module for module in FILES if is_within(module, ("hpc_c2g",))]
    assert len(library) > 100
    offenders = {
        module: found
        for module in library
        if (found := sorted(n for n in imports_of(module, types_too=True) if is_within(n, ("launch", "hydra"))))
    }
    assert offenders == {}


def test_only_one_module_reads_the_launch_environment():
    """No other module holds the name of a launcher's variable as a string of its own (docstrings and messages may)."""
    variables = {*environment.TORCHRUN, *environment.SRUN, *environment.RECORDED} - {"OMP_NUM_THREADS"}
    trees = {module: ast.parse(file.read_text()) for module, file in FILES.items()}
    named = {
        module: variables & {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        for module, tree in trees.items()
    }
    assert {*environment.TORCHRUN, *environment.SRUN} <= named.pop(environment.__name__)
    assert {module: names for module, names in named.items() if names} == {}
