"""Addresses that the service must accept, for the command line of schemathesis, which loads this module."""

import schemathesis

from tests.support.addresses import ADDRESSES

schemathesis.openapi.format("idn-email", ADDRESSES)
