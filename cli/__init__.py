"""The commands that inform, check and time; see __main__.py for all of them."""
