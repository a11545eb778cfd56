"""What client and server share: shapes of the API, the encryption context, errors. Knows neither side."""

from typing import Final

__version__: Final = "0.1.0"
