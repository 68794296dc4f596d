"""The package's version, also where it runs from its sources."""

VERSION = "0.1.0"
