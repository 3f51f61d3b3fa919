"""Private names of other packages, one file per package; no other file uses them.

Each name is here because the package has no public equivalent. Each has a test in ``tests/private`` that fails when the
package changes it; ``pyproject.toml`` allows only versions that pass.
"""
