"""cai: Constitutional AI (Bai et al. 2022, arXiv 2212.08073) from the shell, one subcommand a stage, on JSONL files."""

from importlib.metadata import version

__version__ = version("cai")
