"""cai: Constitutional AI (Bai et al. 2022, arXiv 2212.08073) from the shell, one subcommand a stage, on JSONL files."""

__version__ = "0.2.0"
