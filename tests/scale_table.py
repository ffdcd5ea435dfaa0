"""The table of docs/scale.md: `python tests/scale_table.py`. A test holds them equal."""

from cai_cli.pipeline.paper_run import paper_table

if __name__ == "__main__":
    print(paper_table())
