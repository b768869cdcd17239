"""Builds the optional native modules; everything else stands in pyproject.toml.

Each native module has a pure Python twin beside it, so a machine without a C compiler installs just
as well.
"""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            ".".join(source.with_suffix("").parts),
            sources=[str(source)],
            extra_compile_args=["-O3", "-std=c11"],
            optional=True,
        )
        for source in sorted(Path("hicache_core").glob("*/_*.c"))
    ]
)
