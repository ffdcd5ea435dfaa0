"""`python -m cai_cli`: what torchrun and accelerate launch."""

from cai_cli.cli import main

main()
