"""Serving over HTTP: the front process, the worker process that runs the engine, and what lies between them."""
