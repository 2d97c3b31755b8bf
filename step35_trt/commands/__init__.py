"""The commands, one file for what they are about; thin."""
