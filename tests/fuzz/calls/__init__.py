"""Who draws calls of what: a module for each part of the package."""
