"""``c2g VERB [overrides]`` and ``python -m launch VERB [overrides]``."""

from __future__ import annotations

import difflib
import importlib
import sys

VERBS = {
    "classifier": "fit a classifier to the margin on a data set, or import your own, into a bundle",
    "certify": "measure how close a classifier is to a KKT point (uses its training data)",
    "plan": "predict memory, seconds per step and scaling of a training run, here or on a cluster",
    "train": "train a generator from a classifier bundle, without data",
    "sample": "draw images from a trained generator: a PNG grid or an .npz",
    "bound": "measure the error of the KKT sum against the batch size, beside its bound, without data",
    "evaluate": "evaluate a generator against real data, beside its baselines",
    "demo": "all steps on handwritten digits",
    "doctor": "check what would stop a study on this cluster",
    "sweep": "run a study: many runs, here or as Slurm arrays, resumed after failures",
    "status": "state of a study's tasks, and the reasons of failures",
    "logs": "print the log of a run of a study",
    "cancel": "stop a study's runs; they save first",
    "retry": "run a study's failed tasks again",
    "collect": "collect the results of a study: tables, means over seeds, figures",
    "board": "open TensorBoard on a study or a run",
    "report": "write the report of a study as one HTML file",
    "publish": "write an experiment as a folder: tables, results.json, figures",
}


def main() -> None:
    """Dispatch to the verb's module."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print("usage: c2g VERB [field=value ...]     c2g VERB --help lists the fields\n")
        print("\n".join(f"  {verb:<11} {text}" for verb, text in VERBS.items()))
        sys.exit(0 if len(sys.argv) > 1 else 2)
    verb = sys.argv.pop(1)
    if verb in ("--version", "version"):
        print(importlib.import_module("hpc_c2g").__version__)
        return
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(VERBS)}"
        print(f"c2g: error: there is no verb {verb!r} -- {hint}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"launch.{verb}").main()


if __name__ == "__main__":
    main()
