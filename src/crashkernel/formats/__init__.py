"""Bytes to values and back, without any access to a host."""
