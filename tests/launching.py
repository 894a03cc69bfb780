"""What `accelerate launch` sets for its processes, without the seconds that a launch takes."""

import argparse
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FILES = Path(__file__).resolve().parents[1] / "launch" / "accelerate"


def environment_of(engine: str, *words: str) -> dict[str, str]:
    """What `accelerate launch` with that engine's file and `words` would set for its processes."""
    arguments = ["--config_file", str(FILES / f"{engine}.yaml"), "--main_process_port", "0", *words, "-m", "meme_dist"]
    parsed: argparse.Namespace = launch_command_parser().parse_args(arguments)
    parsed, defaults, _ = _validate_launch_command(parsed)
    if not parsed.use_deepspeed:
        return prepare_multi_gpu_env(parsed)
    parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(parsed)[1]
