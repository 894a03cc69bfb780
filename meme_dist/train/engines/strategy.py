"""Which engine the launcher asked for: `accelerate launch --config_file launch/accelerate/NAME.yaml` says it in the environment."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

Name = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
SWITCHES = {"DEEPSPEED": "ACCELERATE_USE_DEEPSPEED", "FSDP": "ACCELERATE_USE_FSDP", "MEGATRON_LM": "ACCELERATE_USE_MEGATRON_LM"}
ADVICE = "choose a configuration from launch/accelerate/"
# What a launch configuration may also say, and the recipe says here: two sources of one number end in the wrong one being used.
OWNED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--accumulate"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "--clip"),
    "ACCELERATE_MIXED_PRECISION": ("no", "--precision"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "the settings of the run"),
}


class Strategy(NamedTuple):
    """`ddp` keeps everything on every rank; `zero1` shards the optimiser's state, `zero2` gradients too, `zero3` and `fsdp2` all three.

    `offload_optimizer` and `offload_parameters` keep those shards in host memory (DeepSpeed).
    """

    name: Name = "ddp"
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def stage(self) -> int:
        """DeepSpeed's number for it, 0 for the others."""
        return int(self.name[-1]) if self.name.startswith("zero") else 0


def requested(environment: Mapping[str, str] = os.environ) -> Strategy:
    """What the environment asks for. Raises ValueError for an engine that is not supported, and for settings that the run owns."""
    asked = [engine for engine, switch in SWITCHES.items() if _true(environment.get(switch))]
    if len(asked) > 1 or asked == ["MEGATRON_LM"]:
        raise ValueError(
            f"the launch configuration asks for {' and '.join(asked)}; expected one of DDP, FSDP (version 2), DeepSpeed: {ADVICE}"
        )
    _check_owned(environment)
    if asked == ["FSDP"]:
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(f"the launch configuration asks for FSDP version {version}; expected fsdp_version: 2; {ADVICE}")
        return Strategy("fsdp2")
    return _deepspeed(environment) if asked else Strategy()


@contextmanager
def hidden(environment: dict[str, str] | os._Environ[str] = os.environ) -> Iterator[None]:
    """Within it Accelerate sees a plain launch: it makes the process group and finds the device, the engines are ours.

    Accelerate's own DeepSpeed path wants `transformers` and steps inside `backward`, before a loss could be looked at; its FSDP path
    trains unconnected replicas on a CPU.
    """
    kept = {switch: environment.pop(switch) for switch in SWITCHES.values() if switch in environment}
    try:
        yield
    finally:
        environment.update(kept)


def _deepspeed(environment: Mapping[str, str]) -> Strategy:
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if stage not in ("1", "2", "3"):
        raise ValueError(f"the launch configuration asks for DeepSpeed with zero_stage {stage or 'unset'}; expected 1, 2 or 3; {ADVICE}")
    devices = [environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM")]
    if unknown := [device for device in devices if device not in ("none", "cpu")]:
        raise ValueError(f"the launch configuration offloads to {', '.join(unknown)}; expected none or cpu; {ADVICE}")
    names: dict[str, Name] = {"1": "zero1", "2": "zero2", "3": "zero3"}
    return Strategy(names[stage], *(device == "cpu" for device in devices))


def _check_owned(environment: Mapping[str, str]) -> None:
    for name, (neutral, flag) in OWNED.items():
        if (value := environment.get(name, neutral)) not in (neutral, ""):
            raise ValueError(
                f"the launch configuration sets {name}={value}, which the run decides: leave it out of the file and say {flag}"
            )


def _true(value: str | None) -> bool:
    return (value or "false").lower() in ("true", "1", "yes")
