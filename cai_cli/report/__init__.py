"""`cai report`: a run folder as one self-contained HTML page. collect (files -> data), charts, page, in that order."""
