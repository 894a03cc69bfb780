"""`python -m benchmarks NAME`: one module a benchmark, its `main`'s keywords are the command line."""

import tyro

from benchmarks import (
    attributes,
    contrastive,
    estimators,
    faults,
    graphs,
    kernels,
    modality_parallel,
    peers,
    references,
    refinement,
    scaling,
    step,
    stream,
    targets,
)

MAINS = {
    "kernels": kernels.main,
    "step": step.main,
    "stream": stream.main,
    "scaling": scaling.main,
    "modality_parallel": modality_parallel.main,
    "estimators": estimators.main,
    "faults": faults.main,
    "references": references.main,
    "peers": peers.main,
    "targets": targets.main,
    "attributes": attributes.main,
    "graphs": graphs.main,
    "contrastive": contrastive.main,
    "refinement": refinement.main,
}

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(MAINS, prog="python -m benchmarks")
