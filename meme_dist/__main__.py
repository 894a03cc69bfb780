"""`python -m meme_dist` is `meme-dist`, so that `accelerate launch -m meme_dist train ...` works."""

from meme_dist.cli import main
from meme_dist.leave import leave
from meme_dist.train.signals import tell


def program() -> None:
    """Run the command line and end the process; a supervisor that started it learns how."""
    try:
        status = main()
    except SystemExit as error:  # how a wrong flag ends the parser
        status = error.code if isinstance(error.code, int) else 2
    tell(status)
    leave(status)


if __name__ == "__main__":
    program()
