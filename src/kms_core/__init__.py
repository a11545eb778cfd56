"""The product: one age envelope, key backends, jobs, audit and policy.

Start reading at ``service.py`` (``Kms``, the one interface to keys), then one backend
(``backends/age.py``), then ``envelope/sealing.py`` (what a ciphertext is), then ``jobs/execution/runner.py``.
"""
