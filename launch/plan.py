"""``c2g plan``: memory, seconds per step and scaling of a training run, before it runs."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from hpc_c2g.files import write_atomically
from hpc_c2g.generators.config import GENERATORS
from hpc_c2g.planning.plan import PlanConfig, make_plan
from hpc_c2g.planning.profile import ClusterProfile, Here, as_yaml
from hpc_c2g.planning.report import formulas, memory_table, scaling_table, step_table
from launch.cli import run_verb

CLUSTERS = {"here": Here, "h100": ClusterProfile, "a100": ClusterProfile}


def plan(config: PlanConfig) -> None:
    """Predict, print the tables and the formulas with their numbers, write what was asked for."""
    made = make_plan(config)
    console = Console(width=130)
    measured = config.profile is None and isinstance(config.cluster, Here)
    console.print(f"profile ({'measured here' if measured else 'as given'}):\n{as_yaml(made.profile)}", highlight=False)
    for table in (memory_table(made), step_table(made), scaling_table(made, "strong"), scaling_table(made, "weak")):
        console.print(table)
    console.print(formulas(made), highlight=False, markup=False)
    if config.save_profile is not None:
        write_atomically(Path(config.save_profile), as_yaml(made.profile).encode())
        print(f"written: {config.save_profile} (use it with profile={config.save_profile})")
    if config.out is not None:
        write_atomically(Path(config.out), json.dumps(made.record(), indent=2).encode())
        print(f"written: {config.out}")


def main() -> None:
    """Entry point."""
    run_verb("plan", PlanConfig, plan, {"generator": GENERATORS, "cluster": CLUSTERS})


if __name__ == "__main__":
    main()
