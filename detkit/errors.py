"""Errors that are the user's to mend: one line, exit code 2, no traceback without ``--debug``."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(Exception):
    """A mistake in what the user gave. The message is one line that names the file or setting and says what to do."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """Work was asked to stop (Ctrl-C, SIGTERM) and has saved its state. The message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` for the known word nearest to `word`, or an empty string where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


# The extra that brings each optional package.
_EXTRAS = {
    **dict.fromkeys(("jinja2", "lxml", "matplotlib"), "data"),
    "httpx2": "client",
    **dict.fromkeys(("fastapi", "grpc", "h11", "prometheus_client", "python_multipart", "uvicorn"), "serve"),
    **{name: name for name in ("mlflow", "timm", "wandb")},
    **dict.fromkeys(("av", "edgefirst"), "video"),
    **dict.fromkeys(("filelock", "optuna"), "tune"),
    **dict.fromkeys(
        (
            "albumentations",
            "captum",
            "cv2",
            "filelock",
            "onnx",
            "onnxscript",
            "psutil",
            "safetensors",
            "scipy",
            "tensorboard",
            "torch",
            "torchvision",
        ),
        "train",
    ),
}


def missing(error: ModuleNotFoundError) -> UserError | None:
    """The UserError that says which extra of detkit brings the package, where it is one of its optional ones."""
    package = (error.name or "").split(".")[0]
    if package not in _EXTRAS:
        return None
    return UserError(f"{package} is not installed: run  pip install 'detkit[{_EXTRAS[package]}]'")


def need(module: str) -> ModuleType:
    """Import an optional module; raise a UserError that says what to install where it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        known = missing(error)
        if known is None:
            raise
        raise known from None
