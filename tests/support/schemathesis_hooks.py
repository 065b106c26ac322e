"""What schemathesis does not know by itself: which addresses the service has to accept. Loaded by its command line."""

import schemathesis

from tests.support.addresses import ADDRESSES

schemathesis.openapi.format("idn-email", ADDRESSES)
