"""``c2g board DIR``: TensorBoard on a study, its means and figures first, or on a run; on this machine's own address alone."""

from __future__ import annotations

import getpass
import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from hpc_c2g.errors import UserError
from hpc_c2g.studies.study import FILE
from launch._compose.arguments import as_overrides
from launch._compose.cli import run_verb, user_errors
from launch.collect import collected

HOST = "127.0.0.1"


@dataclass
class BoardConfig:
    """Settings of the board.

    Attributes:
        study_dir: Folder of a study, or of one run.
        port: Port of the server; 0 takes a free one.
        collect: Update the study's board first.
    """

    study_dir: str = "???"
    port: int = 6006
    collect: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UserError(f"port={self.port} is not a port", "give one from 1024 to 65535, or 0 for a free one")


def board(config: BoardConfig) -> None:
    """Update the board, print its addresses, and replace this process by TensorBoard."""
    from hpc_c2g.monitoring.event_file import BOARD
    from hpc_c2g.reporting.board import FOLDER

    folder = Path(config.study_dir)
    if (folder / FILE).is_file():
        if config.collect:
            found = collected(folder)
            print(f"board: {len(found.changed)} parts updated", file=sys.stderr)
        shown = folder / FOLDER
        if not shown.is_dir():
            raise UserError(f"study_dir={folder} has no board yet", "drop collect=false")
    elif (folder / BOARD).is_dir():
        shown = folder
    else:
        raise UserError(
            f"study_dir={folder} is neither a study nor a run", "name the folder of a sweep or of a training run"
        )
    port = config.port or _free_port()
    _check_free(port)
    host = socket.gethostname()
    print(f"TensorBoard on {host}, for this machine alone (Ctrl-C ends it):")
    for what, page in pages(shown).items():
        print(f"  {what:<22} http://localhost:{port}/{page}")
    print("from another machine, in a terminal of its own:")
    print(f"  ssh -N -L {port}:localhost:{port} {shlex.quote(f'{getpass.getuser()}@{host}')}", flush=True)
    words = ["--logdir", str(shown), "--host", HOST, "--port", str(port), "--reload_multifile", "true"]
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *words])


def pages(shown: Path) -> dict[str, str]:
    """Return TensorBoard's pages by title; it selects no run if there are more than 40, unless the address names them."""
    from hpc_c2g.reporting.board import FOLDER, RUNS, STUDY

    if shown.name != FOLDER:
        return {"everything": "", "layout by question": "#custom_scalars", "samples": "#images"}

    def of(tab: str, runs: str) -> str:
        return f"#{tab}&regexInput={quote(f'^{runs}', safe='')}"

    return {
        "means over seeds": of("custom_scalars", f"{STUDY}/mean"),
        "against swept fields": of("scalars", f"{STUDY}/against"),
        "figures and samples": of("images", f"{STUDY}/pictures"),
        "all runs as a table": "#hparams",
        "runs": of("custom_scalars", f"{RUNS}/"),
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def _check_free(port: int) -> None:
    with socket.socket() as wanted:
        wanted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            wanted.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port={port} cannot be opened: {error.strerror}", "give another one, or port=0 for any"
            ) from error


def main() -> None:
    """Run the verb."""
    with user_errors("board"):
        overrides = as_overrides(sys.argv[1:], BoardConfig, ["study_dir"])
    run_verb("board", BoardConfig, board, overrides=overrides)


if __name__ == "__main__":
    main()
