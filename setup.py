"""Build entry point. The package is pure Python so far; metadata lives in pyproject.toml."""

from setuptools import setup

setup()
