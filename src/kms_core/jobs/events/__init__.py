"""Webhook deliveries: outbox, dispatcher and requests."""
