"""Descriptions of models and pure functions of (params, batch). Must not import data, a run's config or devices."""
