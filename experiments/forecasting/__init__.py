"""Forecasts of a model and of simple rules, and the scores of both."""
