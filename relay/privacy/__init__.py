"""Erasing a person from everything the relay keeps."""
