"""Manners towards the terminal and the network: other libraries' messages and retries are kept away."""

from __future__ import annotations

import logging as python_logging
import os
import socket
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from bwsk_fx import _torch_private as private


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings and progress bars of transformers and datasets, and gives their settings back."""
    import datasets
    import huggingface_hub
    from transformers.utils import logging

    hub_verbosity = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    data_verbosity, data_bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # PyTorch writes the traceback of an error that is told in one line anyway.
    loggers = {name: python_logging.getLogger(name) for name in private.noisy_loggers()}
    disabled = {name: logger.disabled for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.disabled = disabled[name]
        huggingface_hub.logging.set_verbosity(hub_verbosity)
        logging.set_verbosity(verbosity)
        datasets.logging.set_verbosity(data_verbosity)
        if bars:
            logging.enable_progress_bar()
        if not data_bars:
            datasets.enable_progress_bars()


def use_cache_when_offline() -> None:
    """Tells the Hub's client to look only into its cache when the Hub's name does not resolve.

    Otherwise it tries every file five times over half a minute before it says so. Call it before huggingface_hub is
    imported; behind a proxy, which resolves names itself, it does nothing.
    """
    if "HF_HUB_OFFLINE" in os.environ or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
