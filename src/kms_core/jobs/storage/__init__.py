"""Storage that jobs read and write: local files, buckets and the spool."""
