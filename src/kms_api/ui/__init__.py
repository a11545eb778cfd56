"""The pages for operators at ``/ui`` and the viewer of the OpenAPI document at ``/docs``."""
