"""Authentication by tokens, JWTs and client certificates, and the policy. Independent of HTTP."""
