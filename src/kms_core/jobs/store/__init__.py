"""Job records in Redis, moved by Lua scripts."""
