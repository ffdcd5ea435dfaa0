"""The report of a run folder as one self-contained HTML page: collect reads the files, charts draws, page renders."""
