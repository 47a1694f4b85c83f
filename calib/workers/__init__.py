"""Sweeps shared by many: processes of this machine (``parallel``) or Ray actors (``cluster``), part by part."""
