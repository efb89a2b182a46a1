"""The `memplan` command: parse, call, render. Everything it says can be had from Python as well."""
