"""The tables of docs/scale.md: `python tests/scale_table.py`. Tests hold them equal."""

from cai_cli.pipeline.memory_table import memory_table, refusals
from cai_cli.pipeline.paper_run import paper_table

if __name__ == "__main__":
    print(paper_table(), memory_table(), refusals(), sep="\n\n")
