"""Statistics on disk: the file, whose statistics it holds, the samples kept with them, and unfinished sweeps."""
