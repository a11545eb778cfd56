"""Keys of Parquet files, encrypted by the service: ``KmsClient`` for the CryptoFactory of pyarrow.

>>> from pyarrow.parquet import encryption                             # doctest: +SKIP
>>> factory = encryption.CryptoFactory(KmsClient)                      # doctest: +SKIP
>>> connection = encryption.KmsConnectionConfig(                       # doctest: +SKIP
...     kms_instance_url="http://localhost:8082"
... )

It needs pyarrow, which the program that writes Parquet files installs; the client does not depend on it.
"""

from base64 import b64decode, b64encode
from typing import Final, Unpack

from kms_client.settings import Options
from kms_client.sync import Client

try:
    from pyarrow.parquet import encryption
except ImportError as exc:
    raise ImportError(
        "kms_client.parquet needs pyarrow with encryption: run `pip install pyarrow`", name="pyarrow"
    ) from exc

_NO_TOKEN: Final = ("", "DEFAULT")  # of a connection that was given none


class KmsClient(encryption.KmsClient):  # type: ignore[misc]  # Any where pyarrow is not installed
    """Encrypts the keys of Parquet files. A master key is a key id; the context is ``parquet=<key id>``.

    ``options`` are those of Client; without ``token`` and ``token_file`` the ``key_access_token`` of the
    connection is the token, if it has one.
    """

    def __init__(self, config: encryption.KmsConnectionConfig, **options: Unpack[Options]) -> None:
        super().__init__()
        if (
            not (options.get("token") or options.get("token_file"))
            and config.key_access_token not in _NO_TOKEN
        ):
            options["token"] = config.key_access_token
        self._kms = Client(config.kms_instance_url, **options)

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        context = {"parquet": master_key_identifier}
        sealed = self._kms.encrypt(key_bytes, context=context, key_id=master_key_identifier)
        return b64encode(sealed.ciphertext)

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        context = {"parquet": master_key_identifier}
        return self._kms.decrypt(b64decode(wrapped_key), context=context).plaintext
