"""``age-plugin-kms``: keys of the service for ``age``, ``rage``, ``sops`` and whatever else runs age plugins.

``names`` is what recipients and identities say, ``protocol`` the lines between tool and plugin, ``machines``
what is said in which order, ``keys`` who wraps and unwraps. Source: C2SP age-plugin specification.
"""
