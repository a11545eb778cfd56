"""The transit API of Vault and OpenBao over the keys of this service; their clients work unchanged.

``routing`` declares and finds routes, ``transit`` and ``sys`` hold them, ``models`` has bodies and answers.
docs/vault-api.md is for users.
"""
