"""``age-plugin-kms``: keys of the service for ``age``, ``rage``, ``sops`` and others with age plugins.

Source: C2SP age-plugin specification.
"""
