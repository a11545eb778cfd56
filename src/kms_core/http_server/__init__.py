"""HTTP/1.1 of all ports of the service: the API, the Vault API and the metrics of workers.

``protocol`` is uvicorn's protocol with rules of RFC 9110 and RFC 9112 that uvicorn leaves out.
``connections`` bounds the connections of a port, and refuses requests for another host or from a page of
another origin.
"""
