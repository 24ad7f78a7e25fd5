"""`training_args.bin`: a pickle, read without executing anything.

A pickle names functions and calls them. Here each name resolves to a stand-in that records its arguments and runs
nothing. Only names of libraries that such a file contains (transformers, accelerate, torch's devices and dtypes)
resolve; any other name is refused before an object is made.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.imports.restricted import Refused, Restricted

LARGEST = 2**20
LIBRARIES = ("transformers.", "accelerate.", "trl.", "peft.", "axolotl.", "llamafactory.")
NAMES = {("torch", "device"), ("torch", "dtype"), ("collections", "OrderedDict"), ("builtins", "set")}
DTYPES = ("float16", "float32", "float64", "bfloat16")
INSTEAD = (
    'print it where it was written: python -c \'import torch, json; print(torch.load("training_args.bin",'
    " weights_only=False).to_json_string())' > args.json"
)


class StandIn:
    """Stand-in for a library's object: its class by name, constructor arguments and attributes. It runs nothing."""

    kind = ""

    def __new__(cls, *arguments: Any, **_: Any) -> Any:
        # An enum is made of its value, torch.device of its name.
        if len(arguments) == 1 and isinstance(arguments[0], (str, int, float)):
            return arguments[0]
        if cls.kind in ("collections.OrderedDict", "builtins.set"):
            return dict(arguments[0]) if cls.kind.endswith("Dict") and arguments else list(*arguments)
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class _Reader(Restricted):
    def answer(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) in NAMES or (module.startswith(LIBRARIES) and "." not in name):
            return type(name, (StandIn,), {"kind": f"{module}.{name}"})
        return None


def read_pickle(path: Path) -> dict[str, Any]:
    """The attributes of the arguments in a file. Raises ConfigError, in one line, for any other file."""
    try:
        arguments = _last_object(_bytes(path))
        if isinstance(arguments, StandIn):
            return {name: _plain(value) for name, value in vars(arguments).items()}
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except Refused as error:
        raise ConfigError(f"{path}: a pickle that {error}, which is refused unread; {INSTEAD}") from None
    except Exception as error:  # a broken pickle can fail anywhere
        raise ConfigError(f"{path}: not a pickle of arguments ({type(error).__name__}); {INSTEAD}") from None
    raise ConfigError(f"{path}: a pickle of something else than arguments; {INSTEAD}")


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > LARGEST:
        raise ConfigError(f"{path}: is larger than {LARGEST:,} bytes; arguments are not")
    content = path.read_bytes()
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        inside = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
        if len(inside) != 1 or inside[0].file_size > LARGEST:
            raise ConfigError(f"{path}: an archive without one data.pkl; give what torch.save wrote")
        return archive.read(inside[0])


def _last_object(content: bytes) -> Any:
    """The single object of a file; torch's older format puts three before it (a number, a version, the system)."""
    stream = io.BytesIO(content)
    found = _Reader(stream).load()
    for _ in range(3):
        if isinstance(found, StandIn) or stream.tell() >= len(content):
            break
        found = _Reader(stream).load()
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
