"""HTTP/1.1 as all ports of the service speak it: the API, the Vault API and the metrics of workers.

``protocol`` is uvicorn's protocol with the rules of RFC 9110 and 9112 that uvicorn leaves out,
``connections`` bounds the connections of a port, and ``host_check`` refuses requests that name another host
or come from a page of another origin. Knows no route and no caller.
"""
