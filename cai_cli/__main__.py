"""`python -m cai_cli`: what torchrun and accelerate launch."""

from cai_cli.cli.app import main

main()
