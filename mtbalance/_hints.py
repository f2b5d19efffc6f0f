"""Where public names are, for who asks a package for one that it does not have."""

import difflib
import importlib.util
import sys
from collections.abc import Callable
from typing import NoReturn

_HOMES = ("mtbalance", "mtbalance.gradient", "mtbalance.weighting")


def getattr_of(package: str) -> Callable[[str], NoReturn]:
    """Return the ``__getattr__`` of a package, which raises with a hint.

    Args:
        package: Its name.
    """

    def missing(name: str) -> NoReturn:
        message = f"module {package!r} has no attribute {name!r}"
        if name.startswith("_") or importlib.util.find_spec(f"{package}.{name}") is not None:
            raise AttributeError(message)
        hint = _hint(package, name)
        # The import statement drops what an AttributeError says, and asks by this function.
        if hint and sys._getframe(1).f_code.co_name == "_handle_fromlist":
            raise ImportError(f"cannot import name {name!r} from {package!r}.{hint}", name=name)
        raise AttributeError(f"{message}.{hint}" if hint else message)

    return missing


def _hint(package: str, name: str) -> str:
    """Return where a name, or the nearest to it, is to be had, or nothing."""
    home_of = {
        public: home
        for home in (*(home for home in _HOMES if home != package), package)
        for public in getattr(sys.modules.get(home), "__all__", ())
    }
    if name not in home_of:
        same = {public.lower().replace("_", ""): public for public in home_of}
        plain = name.lower().replace("_", "")
        near = [same[plain]] if plain in same else difflib.get_close_matches(name, home_of, n=1)
        if not near:
            return ""
        (found,) = near
        if home_of[found] == package:
            return f" Did you mean {found!r}?"
        return f" Did you mean {found!r}? Write `from {home_of[found]} import {found}`."
    return f" Write `from {home_of[name]} import {name}`."
