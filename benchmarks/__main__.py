"""`python -m benchmarks NAME`: one module a benchmark, its `main`'s keywords are the command line."""

import tyro

from benchmarks import estimators, kernels, step

MAINS = {"kernels": kernels.main, "step": step.main, "estimators": estimators.main}

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(MAINS, prog="python -m benchmarks")
