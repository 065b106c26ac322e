"""The OpenAPI document of the service, and its page."""

from sso_service.web.openapi.document import document
from sso_service.web.openapi.endpoints import docs_endpoint, openapi_endpoint
from sso_service.web.openapi.page import page

__all__ = ["docs_endpoint", "document", "openapi_endpoint", "page"]
