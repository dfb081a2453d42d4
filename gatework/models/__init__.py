"""Backbones made of the parts."""
