"""ASGI layers around every route, and streamed bodies."""
