"""Attention of rows whose parts are on different devices: keys travel around a ring. Must not know models."""
