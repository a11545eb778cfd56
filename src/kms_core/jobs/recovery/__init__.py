"""Jobs whose worker died or that are due, and files of the spool that nothing needs."""
