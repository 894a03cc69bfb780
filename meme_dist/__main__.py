"""`python -m meme_dist` is `meme-dist`, so that `accelerate launch -m meme_dist train ...` works."""

from meme_dist.cli import main
from meme_dist.leave import leave


def program() -> None:
    """Run the command line and end the process."""
    leave(main())


if __name__ == "__main__":
    program()
