"""All conversions by name."""

from importlib import import_module

from potstill.core.errors import UsageError
from potstill.core.suggestions import suggest
from potstill.transforms.convert.conversion import CONVERSIONS, Conversion, build_conversion
from potstill.transforms.convert.listing import list_conversion_modules, list_conversion_names


def parse_conversion(text: str) -> Conversion:
    """The conversion that `--to` describes: `deltanet` or `experts:experts=4,top_k=1`.

    Raises:
        UsageError: there is no such conversion, or an option of it is wrong.
    """
    for module in list_conversion_modules():
        import_module(module)
    name, _, options = text.partition(":")
    if name not in CONVERSIONS:
        names = list_conversion_names()
        raise UsageError(f"there is no conversion {name!r}{suggest(name, names)}; choose one of {', '.join(names)}")
    return build_conversion(CONVERSIONS[name], options)
