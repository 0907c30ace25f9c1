"""Descriptions of models and pure functions of (params, batch). Must not know data, configs of a run or devices."""
