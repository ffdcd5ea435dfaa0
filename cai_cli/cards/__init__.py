"""README.md files of models and datasets, and the export of datasets."""
