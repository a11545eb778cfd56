"""ASGI layers and streamed bodies around every route."""
