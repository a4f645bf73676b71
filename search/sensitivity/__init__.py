"""Scorers: how much the model loses where one layer gets one choice. One file each."""
