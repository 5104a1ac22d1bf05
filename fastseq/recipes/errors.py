"""Errors whose message is all that a user needs; the command line prints them without a traceback."""

from __future__ import annotations


class RecipeError(ValueError):
    """Something that the user can put right."""


class ConfigError(RecipeError):
    """A configuration that cannot be used; the message names the key."""


class DataError(RecipeError):
    """A data file that cannot be read; the message names the file and the line."""


class FetchError(RecipeError):
    """Data that could not be brought, or is not what it should be."""


class CheckpointError(RecipeError):
    """A checkpoint that is missing, damaged or of another kind."""


class WriteError(RecipeError):
    """A file that could not be written: the disk is full, or the folder is not the user's."""
