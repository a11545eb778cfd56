"""Programs that this one starts and keeps running: tied to its life, and started again when they die."""
