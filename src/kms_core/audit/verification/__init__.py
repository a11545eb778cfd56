"""Verification of audit logs: chains, anchors, receipts, and the monitor."""
