"""`python -m benchmarks NAME`: one module a benchmark, its `main`'s keywords are the command line."""

import tyro

from benchmarks import estimators, step

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"step": step.main, "estimators": estimators.main}, prog="python -m benchmarks")
