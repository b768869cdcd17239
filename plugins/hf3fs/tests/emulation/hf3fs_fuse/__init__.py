"""An emulation of 3FS's package ``hf3fs_fuse``, for tests on machines without 3FS."""
