"""Authentication and policy: tokens, JWTs and client certificates become a Principal. Knows no HTTP."""
