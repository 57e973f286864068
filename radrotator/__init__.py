"Turn the patient in a plain radiograph."
__version__ = "0.1.0"

_HOMES = {"RadRotator": "rotate.rotator", "Radiograph": "radiograph.image", "read_radiograph": "radiograph.read",
          "CT": "ct.volume", "read_ct": "ct.read"}  # imported when they are asked for: PyTorch alone takes seconds
__all__ = [*_HOMES]


def __getattr__(name):
    "Import one of the names that most people need."
    if name not in _HOMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__(): return sorted([*globals(), *_HOMES])
