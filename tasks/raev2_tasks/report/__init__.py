"""Run folders become a page."""
