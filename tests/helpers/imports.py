"""The imports of each module of the toolkit, everything that a module reaches by them, and the graph of the folders."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import hpc_c2g

ROOT = Path(hpc_c2g.__file__).parent.parent


def module_files() -> dict[str, Path]:
    files = {}
    for file in [*ROOT.glob("hpc_c2g/**/*.py"), *ROOT.glob("launch/**/*.py")]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


FILES = module_files()


def for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST, types_too: bool) -> Iterator[ast.AST]:
    """All nodes, also inside functions; without the blocks that only type checkers run, unless ``types_too``."""
    for child in ast.iter_child_nodes(tree):
        if types_too or not for_types_only(child):
            yield child
            yield from nodes(child, types_too)


def imports(source: str, module: str = "", types_too: bool = False) -> set[str]:
    """Full names that ``source`` imports, also inside functions and by ``import_module("...")``."""
    found = set()
    for node in nodes(ast.parse(source), types_too):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


@cache
def imports_of(module: str, types_too: bool = False) -> frozenset[str]:
    """Full names that a module of the toolkit imports."""
    return frozenset(imports(FILES[module].read_text(), module, types_too))


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def reachable(start: str) -> dict[str, list[str]]:
    """Every name that importing and running ``start`` can import, with the chain that leads there."""
    chains, queue = {start: [start]}, [start]
    while queue:
        module = queue.pop()
        if module not in FILES:
            continue
        packages = {module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1)}
        for name in packages | imports_of(module):
            if name not in chains:
                chains[name] = [*chains[module], name]
                queue.append(name)
    return chains


def folder_of(file: Path) -> str:
    return file.parent.relative_to(ROOT).as_posix()


def folder_imports() -> dict[str, dict[str, list[str]]]:
    """Per folder, the other folders that its files import, each with those imports as ``module -> imported module``.

    Imports inside functions and under ``TYPE_CHECKING`` count.
    """
    graph: dict[str, dict[str, list[str]]] = {folder_of(file): {} for file in FILES.values()}
    for module, file in FILES.items():
        for name in sorted(imports_of(module, types_too=True) & FILES.keys()):
            source, target = folder_of(file), folder_of(FILES[name])
            if source != target:
                graph[source].setdefault(target, []).append(f"{module} -> {name}")
    return graph
