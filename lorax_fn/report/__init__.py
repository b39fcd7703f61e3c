"""Tables, and pictures of adapters, for people to read."""

from lorax_fn.report.interference import Interference as Interference
from lorax_fn.report.interference import interference as interference
