"""Silences the training libraries."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """A context in which the training libraries print no progress bar, log line or warning, and send no telemetry."""
    import logging

    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # TRL reads it
    constants.HF_HUB_DISABLE_TELEMETRY = True  # read from the environment at import, which may have happened already
    verbosity = transformers_logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("trl", "accelerate", "peft")]
    levels = [logger.level for logger in loggers]
    bars, data_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
            if data_bars:
                enable_progress_bars()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
