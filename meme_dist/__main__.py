"""`python -m meme_dist` is `meme-dist`, so that `accelerate launch -m meme_dist train ...` works."""

import sys

from meme_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
