"""Private names of other packages, a file for each package: the only files that touch them.

Each name is here because the package has no public one for the same. Each has a test in ``tests/private`` that fails
when the package changes it; the versions that ``pyproject.toml`` allows are those that pass.
"""
