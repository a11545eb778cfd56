"""Who calls: tokens, JWTs and client certificates become a Principal. Knows no HTTP; see ``authenticator.py``."""
