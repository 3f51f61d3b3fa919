"""The command line of ``specforge fit | validate | test``: files, keys, values, and Lightning's."""
