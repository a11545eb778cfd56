"""The checks of ``kms doctor``. They read and change nothing."""
