"""Formats of other tools, read into conversations and pairs of replies.

`shapes.recognize` is the only detector. `turns` reads lists of messages in every spelling, `batches` the request and
result files of hosted models.
"""
