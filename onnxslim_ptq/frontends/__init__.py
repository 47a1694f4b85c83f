"""Other tools' interfaces, translated to recipes."""
