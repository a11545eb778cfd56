"""The subcommands of ``kms``, one module each."""
