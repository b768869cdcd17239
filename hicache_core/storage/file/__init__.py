"""The file backend: objects in segment files of one directory."""
