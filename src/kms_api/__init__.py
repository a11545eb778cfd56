"""The HTTP front: routes turn bodies into calls of ``Kms`` or into jobs, and errors into problems."""
