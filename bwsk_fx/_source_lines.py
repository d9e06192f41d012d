"""Where the user's code is, in tracebacks and in running calls."""

from __future__ import annotations

import linecache
import os
import sys
from pathlib import Path
from types import FrameType, TracebackType

import torch

_TORCH_ROOT = str(Path(torch.__file__).parent) + os.sep
_OWN_ROOT = str(Path(__file__).parent) + os.sep


def user_frame(trace: TracebackType | None) -> str | None:
    """Name the innermost frame of a traceback that is neither PyTorch's nor the recorder's, if there is one."""
    place = None
    while trace is not None:
        if is_users(trace.tb_frame):
            place = _describe(trace.tb_frame, trace.tb_lineno)
        trace = trace.tb_next
    return place


def function_in(trace: TracebackType | None, place: str) -> str | None:
    """Name PyTorch's outermost function in a file, or a folder, that a traceback goes through, if there is one."""
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith(_TORCH_ROOT + place):
            return code.co_name
        trace = trace.tb_next
    return None


def is_users(frame: FrameType) -> bool:
    """Whether a frame runs neither PyTorch's code nor this library's."""
    return not frame.f_code.co_filename.startswith((_TORCH_ROOT, _OWN_ROOT))


def _describe(frame: FrameType, line: int) -> str:
    filename = frame.f_code.co_filename
    code = linecache.getline(filename, line).strip()
    return f'File "{filename}", line {line}, in {frame.f_code.co_name}\n    {code}'


def current_source() -> str | None:
    """Name the innermost frame of the caller's callers that is neither PyTorch's nor the recorder's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not is_users(frame):
        frame = frame.f_back
    return None if frame is None else _describe(frame, frame.f_lineno)
