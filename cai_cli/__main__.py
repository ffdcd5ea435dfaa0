"""`python -m cai_cli`: what torchrun and accelerate launch."""

import os
import sys

# `python -m` puts the working folder first, where a user's own datasets.py would be run in place of the library. It is
# kept only if it holds this package.
if not sys.flags.safe_path and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]

from cai_cli.cli.app import main

main()
