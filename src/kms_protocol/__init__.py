"""Code that client and server share: shapes of the API, the encryption context, units, errors."""

from typing import Final

__version__: Final = "0.3.0.dev0"
