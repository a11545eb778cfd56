"""The HTTP API: routes turn bodies into calls of ``Kms`` or into jobs, and errors into problems."""
