"""detkit: from product photos and Pascal-VOC XML to a trained, measured, deployed detector."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from detkit.config import Config
    from detkit.errors import UserError
    from detkit.runtime.session import Session
    from detkit.types import Detections, Record

_HOMES = {
    "Config": "detkit.config",
    "Detections": "detkit.types",
    "Record": "detkit.types",
    "Session": "detkit.runtime.session",
    "UserError": "detkit.errors",
}

__all__ = ["Config", "Detections", "Record", "Session", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import detkit` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'detkit' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
