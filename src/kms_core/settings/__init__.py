"""Settings: shapes, reading, validation, and warnings about weak values."""
