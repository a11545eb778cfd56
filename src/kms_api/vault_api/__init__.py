"""The transit API of Vault and OpenBao, over the keys of this service: their clients work unchanged.

``app`` finds the handler, ``transit``, ``keys`` and ``system`` hold them, ``door`` is what they call of
``Kms``, ``shapes`` and ``refusals`` are what goes over the wire, ``listener`` is the second port.
docs/facade.md is for users.
"""
