"""Age files that commands read and write without a service."""
